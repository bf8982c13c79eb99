// Rows in e4m3 with one F32 scale each: how weights (a row is an output channel) and inputs (a row is a
// token) of an FP8 product are written.
#ifndef TRIAXIAL_OPS_CUDA_FP8_ROWS_H_
#define TRIAXIAL_OPS_CUDA_FP8_ROWS_H_

#include <cuda_runtime_api.h>

#include <cstdint>

namespace triaxial::cuda {

// What an FP8 product takes: width a multiple of 16, at most so many.
constexpr int64_t kMaxFp8Width = 32768;

// out[r][i] = x[r][i] / scales[r] rounded to e4m3, scales[r] = max |x[r]| / 448 (1 for a row of zeros).
// x: [rows][width] BF16, width a multiple of 16 up to kMaxFp8Width (CHECK); all on the device. Asynchronous
// on `stream`.
void QuantizeRows(const uint16_t* x, int64_t rows, int64_t width, uint8_t* out, float* scales,
                  cudaStream_t stream);

}  // namespace triaxial::cuda

#endif  // TRIAXIAL_OPS_CUDA_FP8_ROWS_H_
