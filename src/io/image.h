// Images from clients: sniffed by content, measured before they are decoded, decoded to RGB.
#ifndef TRIAXIAL_IO_IMAGE_H_
#define TRIAXIAL_IO_IMAGE_H_

#include <cstdint>
#include <string_view>
#include <vector>

#include "base/status.h"

namespace triaxial {

struct ImageLimits {
  int64_t max_bytes = int64_t{32} << 20;
  int64_t max_pixels = int64_t{64} << 20;  // width * height of the stored picture
  int max_side = 32768;
};

// Interleaved 8-bit RGB, row-major, width * height * 3 bytes.
struct Image {
  int width = 0;
  int height = 0;
  std::vector<uint8_t> rgb;
};

struct ImageSize {
  int width = 0;
  int height = 0;
};

// Size after EXIF orientation, from the header alone; no pixel is decoded. Same errors as DecodeImage.
Result<ImageSize> ReadImageSize(std::string_view bytes, const ImageLimits& limits);

// Decodes PNG, JPEG, WebP or GIF (first frame). Alpha is composited on white; gray, palette, 16-bit (high
// byte) and CMYK become RGB; EXIF orientation is applied. Errors: InvalidArgument (unknown type, malformed,
// truncated), TooLarge (limits, checked from the header before anything is allocated for pixels).
Result<Image> DecodeImage(std::string_view bytes, const ImageLimits& limits);

}  // namespace triaxial

#endif  // TRIAXIAL_IO_IMAGE_H_
