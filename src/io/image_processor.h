// From a picture to the patches that the vision tower reads, exactly as the Qwen2-VL/Qwen3-VL image processor
// does.
#ifndef TRIAXIAL_IO_IMAGE_PROCESSOR_H_
#define TRIAXIAL_IO_IMAGE_PROCESSOR_H_

#include <cstdint>
#include <vector>

#include "base/status.h"
#include "io/image.h"
#include "io/model_config.h"

namespace triaxial {

// Target size: both sides multiples of patch_size * merge_size, area within [min_pixels, max_pixels], aspect
// ratio kept. Rounds half to even, as Python does. InvalidArgument if one side is more than 200 times the
// other.
Result<ImageSize> SmartResize(ImageSize size, const PreprocessorConfig& config);

// Bicubic (a = -0.5) with antialiasing on 8-bit channels, rounded to 8 bits after each of the two passes
// (horizontal first), as Pillow does.
Image ResizeBicubic(const Image& image, ImageSize size);

// One picture cut into patches. grid_h * grid_w patches, each channel(3) x y(patch) x x(patch) 8-bit samples,
// ordered by merge blocks: (block y, block x, y in block, x in block). A value is 8-bit; the model normalizes
// it as (v / 255 - mean) / std and repeats it for the two frames of the temporal patch.
struct ImagePatches {
  int grid_h = 0;  // in patches; multiples of merge_size
  int grid_w = 0;
  std::vector<uint8_t> samples;
  // Content identity: the first 128 bits of SHA-256 over grid and samples. Equal hashes count as equal
  // pictures, also when they decide whether one request may use keys and values of another.
  uint64_t hash_lo = 0;
  uint64_t hash_hi = 0;

  int tokens(int merge_size) const { return grid_h * grid_w / (merge_size * merge_size); }
};

// DecodeImage, SmartResize, ResizeBicubic and patching in one call.
Result<ImagePatches> PreprocessImage(std::string_view bytes, const ImageLimits& limits,
                                     const PreprocessorConfig& config);

// Number of tokens that the image will take, from its header alone.
Result<ImageSize> GridOf(ImageSize image,
                         const PreprocessorConfig& config);  // width = grid_w, height = grid_h

// The normalized values of patches [first, first + count), each channel(3) x frame(temporal) x y x x floats,
// as the reference's pixel_values rows.
void NormalizePatches(const ImagePatches& patches, const PreprocessorConfig& config, int first, int count,
                      float* out);

}  // namespace triaxial

#endif  // TRIAXIAL_IO_IMAGE_PROCESSOR_H_
