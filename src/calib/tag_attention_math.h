// Row-wise arithmetic of calib/tag_attention.cc, with SIMD chosen at run time.
#ifndef TRIAXIAL_CALIB_TAG_ATTENTION_MATH_H_
#define TRIAXIAL_CALIB_TAG_ATTENTION_MATH_H_

#include <cstdint>

namespace triaxial {

float LargestOf(const float* x, int64_t n);  // n >= 1
// x[i] <- exp(x[i] - top); returns their sum.
float ExpAndSum(float* x, int64_t n, float top);
// y[i] <- a * x[i] + b * y[i].
void Blend(float a, const float* x, float b, float* y, int64_t n);
// Sum over i of (a * x[i] + b * y[i] - z[i])^2.
double SquaredError(float a, const float* x, float b, const float* y, const float* z, int64_t n);

}  // namespace triaxial

#endif  // TRIAXIAL_CALIB_TAG_ATTENTION_MATH_H_
