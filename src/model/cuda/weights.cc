#include "model/cuda/weights.h"

#include <algorithm>
#include <functional>
#include <numeric>

#include "base/check.h"
#include "base/float16.h"
#include "ops/cuda/elementwise.h"
#include "ops/cuda/fp8_rows.h"

namespace triaxial::cuda {

const void* DeviceWeights::Keep(const void* values, size_t bytes) {
  DeviceBuffer buffer(bytes);
  CUDA_OK(cudaMemcpy(buffer.data(), values, bytes, cudaMemcpyHostToDevice));
  buffers_.push_back(std::move(buffer));
  return buffers_.back().data();
}

Status DeviceWeights::Read(const std::string& name, const std::vector<int64_t>& shape, const LinearPart* part,
                           uint16_t* to) {
  const int64_t n = std::accumulate(shape.begin(), shape.end(), int64_t{1}, std::multiplies<>());
  parameters_ += n;
  if (dummy_) {
    FillNormal(std::hash<std::string>()(name), n, to, nullptr);
    return OkStatus();
  }
  ASSIGN_OR_RETURN(const Tensor tensor, source_.Get(name, shape, Fill::kNormal));
  staging_.resize(static_cast<size_t>(n));
  tensor.ReadAll(Element::kBf16, staging_.data());
  if (part != nullptr) ApplyFactors(*part, Element::kBf16, n / shape[0], staging_.data());
  CUDA_OK(cudaMemcpy(to, staging_.data(), staging_.size() * sizeof(uint16_t), cudaMemcpyHostToDevice));
  return OkStatus();
}

Result<LinearWeights> DeviceWeights::Load(const std::vector<LinearPart>& parts,
                                          const std::vector<int64_t>& in, Element output, Epilogue epilogue,
                                          bool bias) {
  LinearWeights linear;
  linear.shape = {.input = Element::kBf16, .output = output, .epilogue = epilogue, .bias = bias};
  linear.shape.in = std::accumulate(in.begin(), in.end(), int64_t{1}, std::multiplies<>());
  for (const LinearPart& part : parts) linear.shape.out += part.out;
  DeviceBuffer buffer(static_cast<size_t>(linear.shape.out * linear.shape.in) * sizeof(uint16_t));
  std::vector<float> biases;
  uint16_t* to = buffer.data<uint16_t>();
  for (const LinearPart& part : parts) {
    std::vector<int64_t> shape = in;
    shape.insert(shape.begin(), part.out);
    RETURN_IF_ERROR(Read(part.name + ".weight", shape, &part, to));
    to += part.out * linear.shape.in;
    if (!bias) continue;
    ASSIGN_OR_RETURN(const std::vector<float> values,
                     source_.GetF32(part.name + ".bias", {part.out}, Fill::kZero));
    biases.insert(biases.end(), values.begin(), values.end());
  }
  linear.weights = buffer.data();
  buffers_.push_back(std::move(buffer));
  if (!bias) return linear;
  parameters_ += static_cast<int64_t>(biases.size());
  if (output == Element::kF32) {
    linear.bias = Keep(biases.data(), biases.size() * sizeof(float));
  } else {
    std::vector<uint16_t> rounded;
    for (const float value : biases) rounded.push_back(FloatToBf16(value));
    linear.bias = Keep(rounded.data(), rounded.size() * sizeof(uint16_t));
  }
  return linear;
}

Status DeviceWeights::ToFp8(const std::string& name, LinearWeights* linear) {
  const LinearShape& shape = linear->shape;
  if (shape.in % 16 != 0 || shape.out % 16 != 0 || shape.in > kMaxFp8Width) {
    return InvalidArgument("a product of '" + name + "' is " + std::to_string(shape.out) + " by " +
                           std::to_string(shape.in) + ", but FP8 needs multiples of 16 and at most " +
                           std::to_string(kMaxFp8Width) + " columns; use --dtype bf16");
  }
  const auto matrix = std::find_if(buffers_.begin(), buffers_.end(), [&](const DeviceBuffer& buffer) {
    return buffer.data() == linear->weights;
  });
  CHECK(matrix != buffers_.end());
  DeviceBuffer rounded(static_cast<size_t>(shape.out * shape.in));
  DeviceBuffer scales(static_cast<size_t>(shape.out) * sizeof(float));
  QuantizeRows(matrix->data<uint16_t>(), shape.out, shape.in, rounded.data(), scales.data<float>(), nullptr);
  CUDA_OK(cudaStreamSynchronize(nullptr));
  linear->weights = rounded.data();
  linear->scales = scales.data<float>();
  *matrix = std::move(rounded);
  buffers_.push_back(std::move(scales));
  return OkStatus();
}

Result<const uint16_t*> DeviceWeights::LoadMatrix(const std::string& name, int64_t rows, int64_t columns) {
  DeviceBuffer buffer(static_cast<size_t>(rows * columns) * sizeof(uint16_t));
  RETURN_IF_ERROR(Read(name, {rows, columns}, nullptr, buffer.data<uint16_t>()));
  buffers_.push_back(std::move(buffer));
  return static_cast<const uint16_t*>(buffers_.back().data<uint16_t>());
}

Result<const float*> DeviceWeights::LoadTable(const std::string& name, int64_t rows, int64_t columns) {
  ASSIGN_OR_RETURN(const std::vector<float> values, source_.GetF32(name, {rows, columns}, Fill::kNormal));
  parameters_ += rows * columns;
  return static_cast<const float*>(Keep(values.data(), values.size() * sizeof(float)));
}

Result<const float*> DeviceWeights::LoadVector(const std::string& name, int64_t n, Fill fill) {
  ASSIGN_OR_RETURN(const std::vector<float> values, source_.GetF32(name, {n}, fill));
  parameters_ += n;
  return static_cast<const float*>(Keep(values.data(), values.size() * sizeof(float)));
}

Result<const float*> DeviceWeights::LoadScaled(const std::string& name, int64_t n,
                                               const std::vector<float>& factors, bool divide) {
  ASSIGN_OR_RETURN(std::vector<float> values, source_.GetF32(name, {n}, Fill::kOne));
  for (size_t i = 0; i < values.size(); ++i) {
    const float factor = factors[i % factors.size()];
    values[i] = divide ? values[i] / factor : values[i] * factor;
  }
  parameters_ += n;
  return static_cast<const float*>(Keep(values.data(), values.size() * sizeof(float)));
}

}  // namespace triaxial::cuda
