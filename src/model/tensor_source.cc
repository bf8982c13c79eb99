#include "model/tensor_source.h"

#include <algorithm>
#include <cstring>
#include <functional>
#include <numeric>

#include "base/parallel.h"
#include "ops/elementwise.h"

namespace triaxial {
namespace {

constexpr float kDeviation = 0.02f;
constexpr int64_t kTaskElements = 65536;

// SplitMix64 (Steele, Lea, Flood 2014).
uint64_t Mix(uint64_t& state) {
  uint64_t z = (state += 0x9e3779b97f4a7c15u);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

// A sum of four random bytes is normal enough for weights, and cheap: billions are made at load.
void GenerateNormal(uint64_t seed, int64_t row, int64_t n, float* out) {
  constexpr float kMean = 4 * 127.5f;
  constexpr float kScale = kDeviation / 147.8f;
  uint64_t state = seed ^ (static_cast<uint64_t>(row) * 0xd1342543de82ef95u);
  const auto value = [](uint32_t four_bytes) {
    const uint32_t pairs = (four_bytes & 0x00ff00ffu) + ((four_bytes >> 8) & 0x00ff00ffu);
    return (static_cast<float>((pairs & 0xffffu) + (pairs >> 16)) - kMean) * kScale;
  };
  int64_t i = 0;
  for (; i + 2 <= n; i += 2) {
    const uint64_t bits = Mix(state);
    out[i] = value(static_cast<uint32_t>(bits));
    out[i + 1] = value(static_cast<uint32_t>(bits >> 32));
  }
  if (i < n) out[i] = value(static_cast<uint32_t>(Mix(state)));
}

}  // namespace

void Tensor::Read(int64_t first, int64_t count, Element type, void* out) const {
  if (view_.data != nullptr && view_.dtype == DType::kBf16 && type == Element::kBf16) {
    std::memcpy(out, view_.data + first * columns_ * 2, static_cast<size_t>(count * columns_ * 2));
    return;
  }
  std::vector<float> row(type == Element::kF32 ? 0 : static_cast<size_t>(columns_));
  for (int64_t r = 0; r < count; ++r) {
    uint8_t* to = static_cast<uint8_t*>(out) + r * columns_ * ByteSize(type);
    float* values = type == Element::kF32 ? reinterpret_cast<float*>(to) : row.data();
    if (view_.data != nullptr) {
      TensorView part = view_;
      part.data += (first + r) * columns_ * ByteSize(view_.dtype);
      part.elements = columns_;
      CopyToF32(part, values);
    } else if (fill_ == Fill::kNormal) {
      GenerateNormal(seed_, first + r, columns_, values);
    } else {
      std::fill_n(values, columns_, fill_ == Fill::kOne ? 1.0f : 0.0f);
    }
    if (type != Element::kF32) Convert(values, 1.0f, columns_, type, to);
  }
}

void Tensor::ReadAll(Element type, void* out) const {
  const int64_t run = std::max<int64_t>(1, kTaskElements / columns_);
  ParallelFor((rows_ + run - 1) / run, [&](int64_t i) {
    Read(i * run, std::min(run, rows_ - i * run), type,
         static_cast<uint8_t*>(out) + i * run * columns_ * ByteSize(type));
  });
}

Result<TensorSource> TensorSource::Open(const std::string& directory) {
  ASSIGN_OR_RETURN(Checkpoint checkpoint, Checkpoint::Open(directory));
  TensorSource source;
  source.checkpoint_ = std::move(checkpoint);
  return source;
}

TensorSource TensorSource::Generated() { return {}; }

Result<Tensor> TensorSource::Get(const std::string& name, const std::vector<int64_t>& shape,
                                 Fill fill) const {
  Tensor tensor;
  tensor.rows_ = shape[0];
  tensor.columns_ = std::accumulate(shape.begin() + 1, shape.end(), int64_t{1}, std::multiplies<>());
  tensor.fill_ = fill;
  tensor.seed_ = std::hash<std::string>()(name);
  if (checkpoint_) {
    ASSIGN_OR_RETURN(tensor.view_, checkpoint_->Get(name, shape));
  }
  return tensor;
}

Result<std::vector<float>> TensorSource::GetF32(const std::string& name, const std::vector<int64_t>& shape,
                                                Fill fill) const {
  ASSIGN_OR_RETURN(const Tensor tensor, Get(name, shape, fill));
  std::vector<float> values(static_cast<size_t>(tensor.rows_ * tensor.columns_));
  tensor.ReadAll(Element::kF32, values.data());
  return values;
}

}  // namespace triaxial
