#include "io/image.h"

#include <fmt/format.h>

#include <memory>
#include <new>
#include <utility>

#include "io/exif.h"
#include "io/image_decoder.h"

namespace triaxial {
namespace {

bool StartsWith(std::string_view bytes, std::string_view prefix) {
  return bytes.substr(0, prefix.size()) == prefix;
}

Result<std::unique_ptr<ImageDecoder>> NewDecoder(std::string_view bytes) {
  if (bytes.empty()) return InvalidArgument("The image is empty; send a PNG, JPEG, WebP or GIF file.");
  if (StartsWith(bytes, "\x89PNG\r\n\x1a\n")) return NewPngDecoder(bytes);
  if (StartsWith(bytes, "\xff\xd8\xff")) return NewJpegDecoder(bytes);
  if (StartsWith(bytes, "RIFF") && bytes.size() >= 12 && bytes.substr(8, 4) == "WEBP") {
    return NewWebpDecoder(bytes);
  }
  if (StartsWith(bytes, "GIF87a") || StartsWith(bytes, "GIF89a")) return NewGifDecoder(bytes);
  return InvalidArgument("The image is of an unknown type; send a PNG, JPEG, WebP or GIF file.");
}

Status CheckLimits(const ImageHeader& header, const ImageLimits& limits) {
  if (header.width <= 0 || header.height <= 0) {
    return InvalidArgument(
        fmt::format("The image has no pixels ({} x {}); send one that has.", header.width, header.height));
  }
  if (header.width > limits.max_side || header.height > limits.max_side) {
    return TooLarge(
        fmt::format("The image is {} x {} pixels, but a side may have at most {}; send a smaller one.",
                    header.width, header.height, limits.max_side));
  }
  if (header.width * header.height > limits.max_pixels) {
    return TooLarge(
        fmt::format("The image is {} x {} pixels, but at most {} in total are accepted; send a smaller one.",
                    header.width, header.height, limits.max_pixels));
  }
  return OkStatus();
}

// A decoder past its header, within the limits.
struct OpenImage {
  std::unique_ptr<ImageDecoder> decoder;
  ImageHeader header;
};

Result<OpenImage> Open(std::string_view bytes, const ImageLimits& limits) {
  if (static_cast<int64_t>(bytes.size()) > limits.max_bytes) {
    return TooLarge(fmt::format("The image has {} bytes, but at most {} are accepted; send a smaller one.",
                                bytes.size(), limits.max_bytes));
  }
  OpenImage open;
  ASSIGN_OR_RETURN(open.decoder, NewDecoder(bytes));
  ASSIGN_OR_RETURN(open.header, open.decoder->ReadHeader());
  RETURN_IF_ERROR(CheckLimits(open.header, limits));
  return open;
}

// RGB with straight alpha to RGB on a white page, in place, rounded to nearest.
void CompositeOnWhite(std::vector<uint8_t>* pixels) {
  const size_t count = pixels->size() / 4;
  const uint8_t* in = pixels->data();
  uint8_t* out = pixels->data();
  for (size_t i = 0; i < count; ++i, in += 4, out += 3) {
    const unsigned alpha = in[3];
    for (int c = 0; c < 3; ++c) {
      out[c] = static_cast<uint8_t>((in[c] * alpha + 255 * (255 - alpha) + 127) / 255);
    }
  }
  pixels->resize(count * 3);
}

}  // namespace

Result<ImageSize> ReadImageSize(std::string_view bytes, const ImageLimits& limits) {
  ASSIGN_OR_RETURN(const OpenImage open, Open(bytes, limits));
  ImageSize size{static_cast<int>(open.header.width), static_cast<int>(open.header.height)};
  if (SwapsSides(open.header.orientation)) std::swap(size.width, size.height);
  return size;
}

Result<Image> DecodeImage(std::string_view bytes, const ImageLimits& limits) {
  ASSIGN_OR_RETURN(const OpenImage open, Open(bytes, limits));
  const ImageHeader& header = open.header;
  Image image{static_cast<int>(header.width), static_cast<int>(header.height), {}};
  try {
    image.rgb.resize(static_cast<size_t>(header.width * header.height * header.channels));
    RETURN_IF_ERROR(open.decoder->ReadPixels(image.rgb.data()));
    if (header.channels == 4) CompositeOnWhite(&image.rgb);
    if (header.orientation != 1) {
      image.rgb = TurnUpright(image.rgb, image.width, image.height, header.orientation);
    }
  } catch (const std::bad_alloc&) {
    return ResourceExhausted(fmt::format(
        "There is no memory for an image of {} x {} pixels; try again later.", image.width, image.height));
  }
  if (SwapsSides(header.orientation)) std::swap(image.width, image.height);
  return image;
}

}  // namespace triaxial
