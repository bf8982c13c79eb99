#include "ops/elementwise.h"

#include <algorithm>
#include <cmath>

#include "base/check.h"
#include "base/float16.h"
#include "base/parallel.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/elementwise.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>
// After highway.h:
#include <hwy/contrib/math/math-inl.h>

HWY_BEFORE_NAMESPACE();
namespace triaxial {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using DF = hn::ScalableTag<float>;
using VF = hn::Vec<DF>;

// Loads and stores of one vector of F32 lanes from and to memory of T.
HWY_INLINE VF LoadAs(DF d, const bf16_t* p) {
  const hn::Rebind<uint16_t, DF> d16;
  const hn::RebindToUnsigned<DF> d32;
  return hn::BitCast(d, hn::ShiftLeft<16>(hn::PromoteTo(d32, hn::LoadU(d16, p))));
}
HWY_INLINE void StoreAs(DF d, VF v, float* p) { hn::StoreU(v, d, p); }
HWY_INLINE void StoreAs([[maybe_unused]] DF d, VF v, bf16_t* p) {
  const hn::Rebind<uint16_t, DF> d16;
  const hn::RebindToUnsigned<DF> d32;
  const hn::RebindToSigned<DF> di32;
  const auto bits = hn::BitCast(d32, v);
  const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(d32, 1));
  const auto rounded = hn::ShiftRight<16>(hn::Add(bits, hn::Add(odd, hn::Set(d32, 0x7fff))));
  hn::StoreU(hn::DemoteTo(d16, hn::BitCast(di32, rounded)), d16, p);
}
inline void Put(float x, float* p) { *p = x; }
inline void Put(float x, bf16_t* p) { *p = FloatToBf16(x); }

// Calls body(i) for whole vectors and rest(i) for the remaining elements of [0, n).
template <typename Body, typename Rest>
HWY_INLINE void ForEach(int64_t n, const Body& body, const Rest& rest) {
  const int64_t lanes = static_cast<int64_t>(hn::Lanes(DF()));
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) body(i);
  for (; i < n; ++i) rest(i);
}

HWY_INLINE float SumOfSquares(const float* x, int64_t n, float centre) {
  const DF d;
  const VF c = hn::Set(d, centre);
  VF sum = hn::Zero(d);
  float rest = 0;
  ForEach(
      n,
      [&](int64_t i) HWY_ATTR {
        const VF v = hn::Sub(hn::LoadU(d, x + i), c);
        sum = hn::MulAdd(v, v, sum);
      },
      [&](int64_t i) { rest += (x[i] - centre) * (x[i] - centre); });
  return hn::GetLane(hn::SumOfLanes(d, sum)) + rest;
}

HWY_INLINE float Sum(const float* x, int64_t n) {
  const DF d;
  VF sum = hn::Zero(d);
  float rest = 0;
  ForEach(
      n, [&](int64_t i) HWY_ATTR { sum = hn::Add(sum, hn::LoadU(d, x + i)); },
      [&](int64_t i) { rest += x[i]; });
  return hn::GetLane(hn::SumOfLanes(d, sum)) + rest;
}

template <typename T>
HWY_INLINE void RmsNormRowT(const float* x, const float* weight, float eps, int64_t n, T* out) {
  const DF d;
  const float factor = 1.0f / std::sqrt(SumOfSquares(x, n, 0.0f) / static_cast<float>(n) + eps);
  const VF f = hn::Set(d, factor);
  ForEach(
      n,
      [&](int64_t i) HWY_ATTR {
        StoreAs(d, hn::Mul(hn::Mul(hn::LoadU(d, x + i), f), hn::LoadU(d, weight + i)), out + i);
      },
      [&](int64_t i) { Put(x[i] * factor * weight[i], out + i); });
}

template <typename T>
HWY_INLINE void LayerNormRowT(const float* x, const float* weight, const float* bias, float eps, int64_t n,
                              T* out) {
  const DF d;
  const float mean = Sum(x, n) / static_cast<float>(n);
  const float factor = 1.0f / std::sqrt(SumOfSquares(x, n, mean) / static_cast<float>(n) + eps);
  const VF m = hn::Set(d, mean);
  const VF f = hn::Set(d, factor);
  ForEach(
      n,
      [&](int64_t i) HWY_ATTR {
        const VF v = hn::Mul(hn::Sub(hn::LoadU(d, x + i), m), f);
        StoreAs(d, hn::MulAdd(v, hn::LoadU(d, weight + i), hn::LoadU(d, bias + i)), out + i);
      },
      [&](int64_t i) { Put((x[i] - mean) * factor * weight[i] + bias[i], out + i); });
}

template <typename T>
HWY_INLINE void SwiGluRowT(const float* gate, const float* up, int64_t n, T* out) {
  const DF d;
  const VF one = hn::Set(d, 1.0f);
  ForEach(
      n,
      [&](int64_t i) HWY_ATTR {
        const VF g = hn::LoadU(d, gate + i);
        const VF silu = hn::Div(g, hn::Add(one, hn::Exp(d, hn::Neg(g))));
        StoreAs(d, hn::Mul(silu, hn::LoadU(d, up + i)), out + i);
      },
      [&](int64_t i) { Put(gate[i] / (1.0f + std::exp(-gate[i])) * up[i], out + i); });
}

template <typename T>
HWY_INLINE void ConvertT(const float* x, float factor, int64_t n, T* out) {
  const DF d;
  const VF f = hn::Set(d, factor);
  ForEach(
      n, [&](int64_t i) HWY_ATTR { StoreAs(d, hn::Mul(hn::LoadU(d, x + i), f), out + i); },
      [&](int64_t i) { Put(x[i] * factor, out + i); });
}

template <typename T>
HWY_INLINE float SoftmaxNumeratorsT(const float* x, int64_t n, T* out) {
  const DF d;
  VF largest = hn::Set(d, x[0]);
  float largest_rest = x[0];
  ForEach(
      n, [&](int64_t i) HWY_ATTR { largest = hn::Max(largest, hn::LoadU(d, x + i)); },
      [&](int64_t i) { largest_rest = std::max(largest_rest, x[i]); });
  const float shift = std::max(largest_rest, hn::GetLane(hn::MaxOfLanes(d, largest)));
  const VF s = hn::Set(d, shift);
  VF sum = hn::Zero(d);
  float sum_rest = 0;
  ForEach(
      n,
      [&](int64_t i) HWY_ATTR {
        const VF e = hn::Exp(d, hn::Sub(hn::LoadU(d, x + i), s));
        sum = hn::Add(sum, e);
        StoreAs(d, e, out + i);
      },
      [&](int64_t i) {
        const float e = std::exp(x[i] - shift);
        sum_rest += e;
        Put(e, out + i);
      });
  return hn::GetLane(hn::SumOfLanes(d, sum)) + sum_rest;
}

void RmsNormRow(const float* x, const float* weight, float eps, int64_t n, Element type, void* out) {
  if (type == Element::kF32) return RmsNormRowT(x, weight, eps, n, static_cast<float*>(out));
  RmsNormRowT(x, weight, eps, n, static_cast<bf16_t*>(out));
}

void LayerNormRow(const float* x, const float* weight, const float* bias, float eps, int64_t n, Element type,
                  void* out) {
  if (type == Element::kF32) return LayerNormRowT(x, weight, bias, eps, n, static_cast<float*>(out));
  LayerNormRowT(x, weight, bias, eps, n, static_cast<bf16_t*>(out));
}

void SwiGluRow(const float* gate, const float* up, int64_t n, Element type, void* out) {
  if (type == Element::kF32) return SwiGluRowT(gate, up, n, static_cast<float*>(out));
  SwiGluRowT(gate, up, n, static_cast<bf16_t*>(out));
}

void ConvertRow(const float* x, float factor, int64_t n, Element type, void* out) {
  if (type == Element::kF32) return ConvertT(x, factor, n, static_cast<float*>(out));
  ConvertT(x, factor, n, static_cast<bf16_t*>(out));
}

void WidenRow(const bf16_t* x, int64_t n, float* out) {
  const DF d;
  ForEach(
      n, [&](int64_t i) HWY_ATTR { hn::StoreU(LoadAs(d, x + i), d, out + i); },
      [&](int64_t i) { out[i] = Bf16ToFloat(x[i]); });
}

void AddRow(const float* x, int64_t n, float* y) {
  const DF d;
  ForEach(
      n, [&](int64_t i) HWY_ATTR { hn::StoreU(hn::Add(hn::LoadU(d, y + i), hn::LoadU(d, x + i)), d, y + i); },
      [&](int64_t i) { y[i] += x[i]; });
}

void NormRotateRow(const float* x, int heads, int head_dim, const float* weight, float eps, const float* cos,
                   const float* sin, float* out) {
  const DF d;
  const int64_t half = head_dim / 2;
  for (int h = 0; h < heads; ++h) {
    const float* in = x + int64_t{h} * head_dim;
    float* to = out + int64_t{h} * head_dim;
    if (weight != nullptr) {
      RmsNormRowT(in, weight, eps, head_dim, to);
      in = to;
    }
    ForEach(
        half,
        [&](int64_t i) HWY_ATTR {
          const VF a = hn::LoadU(d, in + i);
          const VF b = hn::LoadU(d, in + half + i);
          const VF c = hn::LoadU(d, cos + i);
          const VF s = hn::LoadU(d, sin + i);
          hn::StoreU(hn::Sub(hn::Mul(a, c), hn::Mul(b, s)), d, to + i);
          hn::StoreU(hn::Add(hn::Mul(b, c), hn::Mul(a, s)), d, to + half + i);
        },
        [&](int64_t i) {
          const float a = in[i];
          const float b = in[half + i];
          to[i] = a * cos[i] - b * sin[i];
          to[half + i] = b * cos[i] + a * sin[i];
        });
  }
}

float SoftmaxNumeratorsRow(const float* x, int64_t n, Element type, void* out) {
  if (type == Element::kF32) return SoftmaxNumeratorsT(x, n, static_cast<float*>(out));
  return SoftmaxNumeratorsT(x, n, static_cast<bf16_t*>(out));
}

}  // namespace HWY_NAMESPACE
}  // namespace triaxial
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace triaxial {

HWY_EXPORT(RmsNormRow);
HWY_EXPORT(LayerNormRow);
HWY_EXPORT(SwiGluRow);
HWY_EXPORT(ConvertRow);
HWY_EXPORT(WidenRow);
HWY_EXPORT(AddRow);
HWY_EXPORT(NormRotateRow);
HWY_EXPORT(SoftmaxNumeratorsRow);

namespace {

// Below this many elements, starting threads costs more than they save.
constexpr int64_t kMinElementsPerThread = 16384;

// Calls fn(row) for every row, in runs of rows that are worth a thread.
template <typename Fn>
void ForRows(int64_t rows, int64_t row_elements, const Fn& fn) {
  const int64_t run = std::max<int64_t>(1, kMinElementsPerThread / std::max<int64_t>(1, row_elements));
  ParallelFor((rows + run - 1) / run, [&](int64_t i) {
    for (int64_t r = i * run; r < std::min(rows, (i + 1) * run); ++r) fn(r);
  });
}

void* At(void* base, Element type, int64_t index) {
  return static_cast<uint8_t*>(base) + index * ByteSize(type);
}

}  // namespace

void RmsNorm(const float* x, const float* weight, float eps, int64_t rows, int64_t n, Element type,
             void* out) {
  const auto row = HWY_DYNAMIC_DISPATCH(RmsNormRow);
  ForRows(rows, n, [&](int64_t r) { row(x + r * n, weight, eps, n, type, At(out, type, r * n)); });
}

void LayerNorm(const float* x, const float* weight, const float* bias, float eps, int64_t rows, int64_t n,
               Element type, void* out) {
  const auto row = HWY_DYNAMIC_DISPATCH(LayerNormRow);
  ForRows(rows, n, [&](int64_t r) { row(x + r * n, weight, bias, eps, n, type, At(out, type, r * n)); });
}

void SwiGlu(const float* gate_up, int64_t rows, int64_t n, Element type, void* out) {
  const auto row = HWY_DYNAMIC_DISPATCH(SwiGluRow);
  ForRows(rows, 2 * n, [&](int64_t r) {
    row(gate_up + 2 * r * n, gate_up + (2 * r + 1) * n, n, type, At(out, type, r * n));
  });
}

void Convert(const float* x, float factor, int64_t n, Element type, void* out) {
  HWY_DYNAMIC_DISPATCH(ConvertRow)(x, factor, n, type, out);
}

void Widen(const void* x, Element type, int64_t n, float* out) {
  if (type == Element::kF32) {
    std::copy_n(static_cast<const float*>(x), n, out);
  } else {
    HWY_DYNAMIC_DISPATCH(WidenRow)(static_cast<const bf16_t*>(x), n, out);
  }
}

void AddTo(const float* x, int64_t n, float* y) { HWY_DYNAMIC_DISPATCH(AddRow)(x, n, y); }

void NormRotate(const float* x, int heads, int head_dim, const float* weight, float eps, const float* cos,
                const float* sin, float* out) {
  CHECK(head_dim % 2 == 0);
  HWY_DYNAMIC_DISPATCH(NormRotateRow)(x, heads, head_dim, weight, eps, cos, sin, out);
}

float SoftmaxNumerators(const float* x, int64_t n, Element type, void* out) {
  CHECK(n >= 1);
  return HWY_DYNAMIC_DISPATCH(SoftmaxNumeratorsRow)(x, n, type, out);
}

}  // namespace triaxial
#endif  // HWY_ONCE
