#include "io/image_processor.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <new>
#include <utility>

#include "base/check.h"
#include "base/little_endian.h"
#include "base/sha256.h"

namespace triaxial {
namespace {

constexpr int kChannels = 3;
constexpr int kMaxAspectRatio = 200;

// The picture's sides are the grid's times patch_size.
ImagePatches CutPatches(const Image& image, const PreprocessorConfig& config) {
  const int patch = config.patch_size;
  const int merge = config.merge_size;
  ImagePatches patches;
  patches.grid_h = image.height / patch;
  patches.grid_w = image.width / patch;
  patches.samples.resize(image.rgb.size());
  uint8_t* out = patches.samples.data();
  const size_t plane = static_cast<size_t>(patch) * patch;
  const auto copy_patch = [&](int row, int column) {
    for (int y = 0; y < patch; ++y) {
      const size_t pixel = (static_cast<size_t>(row) * patch + y) * image.width + column * patch;
      const uint8_t* in = &image.rgb[pixel * kChannels];
      uint8_t* to = out + y * patch;
      for (int x = 0; x < patch; ++x, in += kChannels, ++to) {
        to[0] = in[0];
        to[plane] = in[1];
        to[2 * plane] = in[2];
      }
    }
    out += kChannels * plane;
  };
  for (int block_y = 0; block_y < patches.grid_h; block_y += merge) {
    for (int block_x = 0; block_x < patches.grid_w; block_x += merge) {
      for (int y = 0; y < merge; ++y) {
        for (int x = 0; x < merge; ++x) copy_patch(block_y + y, block_x + x);
      }
    }
  }
  std::array<uint8_t, 24> head = {'t', 'r', 'i', 'a', 'x', 'i', 'a', 'l',
                                  ' ', 'i', 'm', 'a', 'g', 'e', '1', 0};
  StoreLittle(static_cast<uint32_t>(patches.grid_h), &head[16]);
  StoreLittle(static_cast<uint32_t>(patches.grid_w), &head[20]);
  Sha256 hash;
  hash.Update(head);
  hash.Update(patches.samples);
  const Sha256Digest digest = hash.Finish();
  patches.hash_lo = LoadLittle<uint64_t>(&digest[0]);
  patches.hash_hi = LoadLittle<uint64_t>(&digest[8]);
  return patches;
}

}  // namespace

Result<ImageSize> SmartResize(ImageSize size, const PreprocessorConfig& config) {
  const double width = size.width;
  const double height = size.height;
  if (size.width <= 0 || size.height <= 0 ||
      std::max(width, height) / std::min(width, height) > kMaxAspectRatio) {
    return InvalidArgument(
        fmt::format("The image is {} x {} pixels, but no side may be more than {} times the other; crop it.",
                    size.width, size.height, kMaxAspectRatio));
  }
  // Double arithmetic in the reference's order, so that no floor or ceiling falls differently.
  const double factor = config.patch_size * config.merge_size;
  const double min_pixels = static_cast<double>(config.min_pixels);
  const double max_pixels = static_cast<double>(config.max_pixels);
  double w = std::nearbyint(width / factor) * factor;  // half to even
  double h = std::nearbyint(height / factor) * factor;
  if (h * w > max_pixels) {
    const double shrink = std::sqrt(height * width / max_pixels);
    w = std::max(factor, std::floor(width / shrink / factor) * factor);
    h = std::max(factor, std::floor(height / shrink / factor) * factor);
  } else if (h * w < min_pixels) {
    const double grow = std::sqrt(min_pixels / (height * width));
    w = std::ceil(width * grow / factor) * factor;
    h = std::ceil(height * grow / factor) * factor;
  }
  return ImageSize{static_cast<int>(w), static_cast<int>(h)};
}

Result<ImageSize> GridOf(ImageSize image, const PreprocessorConfig& config) {
  ASSIGN_OR_RETURN(const ImageSize size, SmartResize(image, config));
  return ImageSize{size.width / config.patch_size, size.height / config.patch_size};
}

Result<ImagePatches> PreprocessImage(std::string_view bytes, const ImageLimits& limits,
                                     const PreprocessorConfig& config) {
  // From the header first: a picture of a refused shape is not decoded.
  ASSIGN_OR_RETURN(const ImageSize stored, ReadImageSize(bytes, limits));
  ASSIGN_OR_RETURN(const ImageSize size, SmartResize(stored, config));
  ASSIGN_OR_RETURN(Image image, DecodeImage(bytes, limits));
  try {
    if (size.width != image.width || size.height != image.height) image = ResizeBicubic(image, size);
    return CutPatches(image, config);
  } catch (const std::bad_alloc&) {
    return ResourceExhausted(fmt::format(
        "There is no memory for an image of {} x {} pixels; try again later.", size.width, size.height));
  }
}

void NormalizePatches(const ImagePatches& patches, const PreprocessorConfig& config, int first, int count,
                      float* out) {
  CHECK(first >= 0 && count >= 0 && first + count <= patches.grid_h * patches.grid_w);
  float values[kChannels][256];
  for (int c = 0; c < kChannels; ++c) {
    for (int v = 0; v < 256; ++v) {
      values[c][v] = (static_cast<float>(v) / 255.0f - config.image_mean[c]) / config.image_std[c];
    }
  }
  const size_t plane = static_cast<size_t>(config.patch_size) * config.patch_size;
  const uint8_t* in = patches.samples.data() + first * kChannels * plane;
  for (int patch = 0; patch < count; ++patch) {
    for (int c = 0; c < kChannels; ++c, in += plane) {
      for (int frame = 0; frame < config.temporal_patch_size; ++frame, out += plane) {
        for (size_t i = 0; i < plane; ++i) out[i] = values[c][in[i]];
      }
    }
  }
}

}  // namespace triaxial
