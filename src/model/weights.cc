#include "model/weights.h"

#include <functional>
#include <numeric>

namespace triaxial {

Result<Linear> LinearLoader::Load(const std::vector<LinearPart>& parts, const std::vector<int64_t>& in,
                                  Element output, Epilogue epilogue, bool bias) {
  LinearShape shape{.input = element_, .output = output, .epilogue = epilogue, .bias = bias};
  shape.in = std::accumulate(in.begin(), in.end(), int64_t{1}, std::multiplies<>());
  for (const LinearPart& part : parts) shape.out += part.out;
  uint8_t* weights = stacked_.Reserve(static_cast<size_t>(shape.out * shape.in * ByteSize(element_)));
  std::vector<float> biases;
  int64_t row = 0;
  for (const LinearPart& part : parts) {
    std::vector<int64_t> dimensions = in;
    dimensions.insert(dimensions.begin(), part.out);
    ASSIGN_OR_RETURN(const Tensor tensor, source_.Get(part.name + ".weight", dimensions, Fill::kNormal));
    tensor.ReadAll(element_, weights + row * shape.in * ByteSize(element_));
    row += part.out;
    if (!bias) continue;
    ASSIGN_OR_RETURN(const std::vector<float> part_bias,
                     source_.GetF32(part.name + ".bias", {part.out}, Fill::kZero));
    biases.insert(biases.end(), part_bias.begin(), part_bias.end());
  }
  parameters_ += shape.out * shape.in + static_cast<int64_t>(biases.size());
  return Linear(cache_, shape, weights, bias ? biases.data() : nullptr);
}

}  // namespace triaxial
