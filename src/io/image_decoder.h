// What image.cc asks of each file format. Internal to io.
#ifndef TRIAXIAL_IO_IMAGE_DECODER_H_
#define TRIAXIAL_IO_IMAGE_DECODER_H_

#include <cstdint>
#include <memory>
#include <string_view>

#include "base/status.h"

namespace triaxial {

struct ImageHeader {
  int64_t width = 0;
  int64_t height = 0;
  int channels = 3;     // of the decoded pixels: 3 is RGB, 4 is RGB and straight alpha
  int orientation = 1;  // EXIF, 1 to 8
};

// One picture in one file. The bytes outlive the decoder. Errors: InvalidArgument (malformed, truncated),
// ResourceExhausted (no memory).
class ImageDecoder {
 public:
  virtual ~ImageDecoder() = default;

  // First call, once: everything before the pixels. Its memory is bounded by the size of the file.
  virtual Result<ImageHeader> ReadHeader() = 0;

  // Second call, once: fills height * width * channels bytes, all zero before.
  virtual Status ReadPixels(uint8_t* pixels) = 0;
};

std::unique_ptr<ImageDecoder> NewPngDecoder(std::string_view bytes);
std::unique_ptr<ImageDecoder> NewJpegDecoder(std::string_view bytes);
std::unique_ptr<ImageDecoder> NewWebpDecoder(std::string_view bytes);
std::unique_ptr<ImageDecoder> NewGifDecoder(std::string_view bytes);

}  // namespace triaxial

#endif  // TRIAXIAL_IO_IMAGE_DECODER_H_
