#include "model/weights.h"

#include <functional>
#include <numeric>

#include "base/check.h"
#include "base/parallel.h"
#include "ops/elementwise.h"

namespace triaxial {

void ApplyFactors(const LinearPart& part, Element type, int64_t columns, void* weights) {
  const std::vector<float>& rows = part.row_factors;
  const std::vector<float>& cols = part.column_factors;
  if (rows.empty() && cols.empty()) return;
  CHECK(rows.empty() || static_cast<int64_t>(rows.size()) == part.out);
  CHECK(cols.empty() || static_cast<int64_t>(cols.size()) == columns);
  ParallelFor(part.out, [&](int64_t r) {
    thread_local std::vector<float> row;
    row.resize(static_cast<size_t>(columns));
    uint8_t* at = static_cast<uint8_t*>(weights) + r * columns * ByteSize(type);
    Widen(at, type, columns, row.data());
    for (size_t c = 0; c < row.size(); ++c) {
      if (!rows.empty()) row[c] *= rows[static_cast<size_t>(r)];
      if (!cols.empty()) row[c] *= cols[c];
    }
    Convert(row.data(), 1.0f, columns, type, at);
  });
}

std::string TextPrefix(const ModelConfig& config) {
  return config.architecture == Architecture::kQwen3Vl ? "model.language_model." : "model.";
}

ValueParts EqualizedValues(const TextConfig& config, Codec codec, const KvCalibration& calibration,
                           const std::string& attention, int layer) {
  ValueParts parts = {{attention + "v_proj", int64_t{config.num_kv_heads} * config.head_dim},
                      {attention + "o_proj", config.hidden_size}};
  if (codec != Codec::kRotated || calibration.value_equalization.empty()) return parts;
  const std::vector<float>& factors = calibration.value_equalization[static_cast<size_t>(layer)];
  const int group = config.num_heads / config.num_kv_heads;
  for (const float factor : factors) parts.v.row_factors.push_back(1 / factor);
  for (int head = 0; head < config.num_heads; ++head) {
    const auto first = factors.begin() + int64_t{head / group} * config.head_dim;
    parts.o.column_factors.insert(parts.o.column_factors.end(), first, first + config.head_dim);
  }
  return parts;
}

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
    uint8_t* to = weights + row * shape.in * ByteSize(element_);
    tensor.ReadAll(element_, to);
    ApplyFactors(part, element_, shape.in, to);
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
