#ifndef TRIAXIAL_IO_EXIF_H_
#define TRIAXIAL_IO_EXIF_H_

#include <cstdint>
#include <string_view>
#include <vector>

namespace triaxial {

// The orientation tag (1 to 8) of an EXIF block: a TIFF header with or without the leading "Exif\0\0". 1
// (upright) if the tag is absent or the block is malformed.
int ExifOrientation(std::string_view exif);

// Whether orientation swaps width and height.
inline bool SwapsSides(int orientation) { return orientation >= 5; }

// Turns a stored picture (interleaved RGB, width * height * 3 bytes) upright. orientation is 2 to 8.
std::vector<uint8_t> TurnUpright(const std::vector<uint8_t>& rgb, int width, int height, int orientation);

}  // namespace triaxial

#endif  // TRIAXIAL_IO_EXIF_H_
