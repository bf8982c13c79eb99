// Row-wise operators around the matrix products, on the device. Sums and functions are F32; BF16 values are
// uint16_t bits. Matrices are row-major without gaps; widths are multiples of 4. All calls are asynchronous
// on `stream`.
#ifndef TRIAXIAL_OPS_CUDA_ELEMENTWISE_H_
#define TRIAXIAL_OPS_CUDA_ELEMENTWISE_H_

#include <cuda_runtime_api.h>

#include <cstdint>

namespace triaxial::cuda {

// hidden[r] = table[tokens[r]]; table: [vocab][width] BF16, hidden: [rows][width] F32.
void EmbedTokens(const int32_t* tokens, const uint16_t* table, int64_t rows, int64_t width, float* hidden,
                 cudaStream_t stream);

// out[r] = x[s] / sqrt(mean(x[s]^2) + eps) * weight, s = source[r] (r if source is null).
void RmsNorm(const float* x, const int32_t* source, const float* weight, float eps, int64_t rows,
             int64_t width, uint16_t* out, cudaStream_t stream);
// out[r] = (x[r] - mean) / sqrt(variance + eps) * weight + bias.
void LayerNorm(const float* x, const float* weight, const float* bias, float eps, int64_t rows, int64_t width,
               uint16_t* out, cudaStream_t stream);
// out[r] = silu(gate[r]) * up[r]; gate_up: [rows][2 width], gate first.
void SwiGlu(const uint16_t* gate_up, int64_t rows, int64_t width, uint16_t* out, cudaStream_t stream);
// x[i] = gelu(x[i]), exact, i < n.
void GeluErf(uint16_t* x, int64_t n, cudaStream_t stream);
// y[i] += x[i], i < n.
void AddTo(const float* x, int64_t n, float* y, cudaStream_t stream);

// Angles of interleaved MRoPE: cos, sin [rows][half] of positions[r][axes[k]] * frequencies[k]; positions:
// [rows][3].
void MropeAngles(const int32_t* positions, const float* frequencies, const uint8_t* axes, int64_t rows,
                 int half, float* cos, float* sin, cudaStream_t stream);

// x[i] = a number about normal with deviation 0.02, the same for the same seed; BF16.
void FillNormal(uint64_t seed, int64_t n, uint16_t* x, cudaStream_t stream);

}  // namespace triaxial::cuda

#endif  // TRIAXIAL_OPS_CUDA_ELEMENTWISE_H_
