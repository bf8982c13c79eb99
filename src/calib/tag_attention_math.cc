#include "calib/tag_attention_math.h"

#include <algorithm>
#include <cmath>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "calib/tag_attention_math.cc"
#include <hwy/foreach_target.h>
#include <hwy/highway.h>
// After highway.h:
#include <hwy/contrib/math/math-inl.h>

HWY_BEFORE_NAMESPACE();
namespace triaxial {
namespace HWY_NAMESPACE {
namespace hn = hwy::HWY_NAMESPACE;

using DF = hn::ScalableTag<float>;

float LargestRow(const float* x, int64_t n) {
  const DF d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  float largest = x[0];
  int64_t i = 0;
  if (n >= lanes) {
    auto top = hn::LoadU(d, x);
    for (i = lanes; i + lanes <= n; i += lanes) top = hn::Max(top, hn::LoadU(d, x + i));
    largest = hn::GetLane(hn::MaxOfLanes(d, top));
  }
  for (; i < n; ++i) largest = std::max(largest, x[i]);
  return largest;
}

float ExpSumRow(float* x, int64_t n, float top) {
  const DF d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  const auto shift = hn::Set(d, top);
  auto sum = hn::Zero(d);
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    const auto e = hn::Exp(d, hn::Sub(hn::LoadU(d, x + i), shift));
    sum = hn::Add(sum, e);
    hn::StoreU(e, d, x + i);
  }
  float total = hn::GetLane(hn::SumOfLanes(d, sum));
  for (; i < n; ++i) total += x[i] = std::exp(x[i] - top);
  return total;
}

void BlendRow(float a, const float* x, float b, float* y, int64_t n) {
  const DF d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  const auto va = hn::Set(d, a);
  const auto vb = hn::Set(d, b);
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    hn::StoreU(hn::MulAdd(va, hn::LoadU(d, x + i), hn::Mul(vb, hn::LoadU(d, y + i))), d, y + i);
  }
  for (; i < n; ++i) y[i] = a * x[i] + b * y[i];
}

double SquaredErrorRow(float a, const float* x, float b, const float* y, const float* z, int64_t n) {
  const DF d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  const auto va = hn::Set(d, a);
  const auto vb = hn::Set(d, b);
  auto sum = hn::Zero(d);
  int64_t i = 0;
  for (; i + lanes <= n; i += lanes) {
    const auto diff =
        hn::MulAdd(va, hn::LoadU(d, x + i), hn::MulSub(vb, hn::LoadU(d, y + i), hn::LoadU(d, z + i)));
    sum = hn::MulAdd(diff, diff, sum);
  }
  double total = hn::GetLane(hn::SumOfLanes(d, sum));
  for (; i < n; ++i) {
    const double diff = double{a} * x[i] + double{b} * y[i] - z[i];
    total += diff * diff;
  }
  return total;
}

}  // namespace HWY_NAMESPACE
}  // namespace triaxial
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace triaxial {

HWY_EXPORT(LargestRow);
HWY_EXPORT(ExpSumRow);
HWY_EXPORT(BlendRow);
HWY_EXPORT(SquaredErrorRow);

float LargestOf(const float* x, int64_t n) { return HWY_DYNAMIC_DISPATCH(LargestRow)(x, n); }
float ExpAndSum(float* x, int64_t n, float top) { return HWY_DYNAMIC_DISPATCH(ExpSumRow)(x, n, top); }
void Blend(float a, const float* x, float b, float* y, int64_t n) {
  HWY_DYNAMIC_DISPATCH(BlendRow)(a, x, b, y, n);
}
double SquaredError(float a, const float* x, float b, const float* y, const float* z, int64_t n) {
  return HWY_DYNAMIC_DISPATCH(SquaredErrorRow)(a, x, b, y, z, n);
}

}  // namespace triaxial
#endif  // HWY_ONCE
