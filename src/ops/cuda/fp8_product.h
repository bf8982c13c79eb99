// Products of few rows with FP8 weights, which are read once at memory speed. cuBLASLt has one algorithm for
// a scale of each channel and row; it is made for many rows (fp8 in docs/kernels.md).
#ifndef TRIAXIAL_OPS_CUDA_FP8_PRODUCT_H_
#define TRIAXIAL_OPS_CUDA_FP8_PRODUCT_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "ops/element.h"

namespace triaxial::cuda {

constexpr int64_t kMostFp8ProductRows = 16;
// Whether Fp8Product takes these sizes.
constexpr bool HasFp8Product(int64_t rows, int64_t in, int64_t out) {
  return rows <= kMostFp8ProductRows && in % 64 == 0 && out % 32 == 0;
}

// y[r][o] = sum_i x[r][i] w[o][i] * x_scales[r] * w_scales[o], added to y if `add` (F32 only).
// w: [out][in], x: [rows][in], e4m3 (fp8_rows.h); y: [rows][out] F32 or BF16; sums are F32. Asynchronous on
// `stream`; reads weights before the kernel ahead has ended.
void Fp8Product(const uint8_t* w, const float* w_scales, const uint8_t* x, const float* x_scales,
                int64_t rows, int64_t in, int64_t out, Element output, bool add, void* y,
                cudaStream_t stream);

}  // namespace triaxial::cuda

#endif  // TRIAXIAL_OPS_CUDA_FP8_PRODUCT_H_
