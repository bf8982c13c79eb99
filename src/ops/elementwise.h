// Row-wise operators around the matrix products. SIMD is chosen at run time; sums and functions are F32.
// Matrices are row-major without gaps; `out` holds values of `type`, rounded to nearest. Those that take
// `rows` use all compute threads; the others are for callers that are already parallel.
#ifndef TRIAXIAL_OPS_ELEMENTWISE_H_
#define TRIAXIAL_OPS_ELEMENTWISE_H_

#include <cstdint>

#include "ops/element.h"

namespace triaxial {

// out[r] = x[r] / sqrt(mean(x[r]^2) + eps) * weight; x: [rows][n], weight: [n].
void RmsNorm(const float* x, const float* weight, float eps, int64_t rows, int64_t n, Element type,
             void* out);
// out[r] = (x[r] - mean) / sqrt(variance + eps) * weight + bias.
void LayerNorm(const float* x, const float* weight, const float* bias, float eps, int64_t rows, int64_t n,
               Element type, void* out);
// out[r] = silu(gate[r]) * up[r]; gate_up: [rows][2 n], gate first.
void SwiGlu(const float* gate_up, int64_t rows, int64_t n, Element type, void* out);
// out[i] = factor * x[i], i < n.
void Convert(const float* x, float factor, int64_t n, Element type, void* out);
// The inverse direction: BF16 or F32 to F32.
void Widen(const void* x, Element type, int64_t n, float* out);
// y[i] += x[i], i < n.
void AddTo(const float* x, int64_t n, float* y);

// One row of heads: RMSNorm of each (if weight is given), then rotary embedding of pairs (c, c + head_dim /
// 2) by cos, sin [head_dim / 2]. x and out: [heads][head_dim], may be the same; head_dim is even.
void NormRotate(const float* x, int heads, int head_dim, const float* weight, float eps, const float* cos,
                const float* sin, float* out);

// out[i] = exp(x[i] - max(x)); returns the sum before rounding. n >= 1.
float SoftmaxNumerators(const float* x, int64_t n, Element type, void* out);

}  // namespace triaxial

#endif  // TRIAXIAL_OPS_ELEMENTWISE_H_
