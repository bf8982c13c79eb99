#include <algorithm>

#include "ops/cuda/device.h"
#include "ops/cuda/elementwise.h"
#include "ops/cuda/launch.cuh"
#include "ops/cuda/numbers.cuh"

namespace triaxial::cuda {
namespace {

constexpr int kThreads = 256;

unsigned Blocks(int64_t n) { return static_cast<unsigned>((n + kThreads - 1) / kThreads); }

__global__ void EmbedKernel(const int32_t* tokens, const uint16_t* table, int64_t width, float* hidden) {
  const int64_t row = blockIdx.x;
  const auto* from = reinterpret_cast<const uint2*>(table + tokens[row] * width);
  auto* to = reinterpret_cast<float4*>(hidden + row * width);
  for (int64_t i = threadIdx.x; i < width / 4; i += blockDim.x) {
    const uint2 words = from[i];
    const float2 a = FromBf16Pair(words.x), b = FromBf16Pair(words.y);
    to[i] = {a.x, a.y, b.x, b.y};
  }
}

// One block a row. A row is read once: its values wait in registers between the sum and the product. So do
// the weights, which a step's own weights have driven out of the L2 cache: they are on their way before the
// row is complete.
template <int kVectors>
__global__ void __launch_bounds__(kThreads)
    RmsNormKernel(const float* x, const int32_t* source, const float* weight, float eps, int width,
                  uint16_t* out) {
  __shared__ float scratch[32];
  const int64_t row = blockIdx.x;
  const auto* scale = reinterpret_cast<const float4*>(weight);
  const int vectors = width / 4;
  float4 values[kVectors], weights[kVectors];
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    const int i = static_cast<int>(threadIdx.x) + j * kThreads;
    if (i < vectors) weights[j] = scale[i];
  }
  WaitForEarlier();
  const auto* in = reinterpret_cast<const float4*>(x + (source == nullptr ? row : source[row]) * width);
  auto* to = reinterpret_cast<uint2*>(out + row * width);
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    const int i = static_cast<int>(threadIdx.x) + j * kThreads;
    values[j] = i < vectors ? in[i] : float4{0, 0, 0, 0};
  }
  float sum = 0;
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    const float4 v = values[j];
    sum += v.x * v.x + v.y * v.y + v.z * v.z + v.w * v.w;
  }
  const float factor = 1.0f / sqrtf(BlockSum(sum, scratch) / static_cast<float>(width) + eps);
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    const int i = static_cast<int>(threadIdx.x) + j * kThreads;
    if (i >= vectors) break;
    const float4 v = values[j], w = weights[j];
    to[i] = {ToBf16Pair(v.x * factor * w.x, v.y * factor * w.y),
             ToBf16Pair(v.z * factor * w.z, v.w * factor * w.w)};
  }
}

__global__ void LayerNormKernel(const float* x, const float* weight, const float* bias, float eps, int width,
                                uint16_t* out) {
  __shared__ float scratch[32];
  const int64_t row = blockIdx.x;
  const float* in = x + row * width;
  float sum = 0;
  for (int i = static_cast<int>(threadIdx.x); i < width; i += blockDim.x) sum += in[i];
  const float mean = BlockSum(sum, scratch) / static_cast<float>(width);
  float squares = 0;
  for (int i = static_cast<int>(threadIdx.x); i < width; i += blockDim.x)
    squares += (in[i] - mean) * (in[i] - mean);
  const float factor = 1.0f / sqrtf(BlockSum(squares, scratch) / static_cast<float>(width) + eps);
  for (int i = static_cast<int>(threadIdx.x); i < width; i += blockDim.x) {
    out[row * width + i] = ToBf16((in[i] - mean) * factor * weight[i] + bias[i]);
  }
}

__device__ float SiluTimes(float gate, float up) { return gate / (1.0f + expf(-gate)) * up; }

__global__ void SwiGluKernel(const uint16_t* gate_up, int64_t pairs, int64_t width, uint16_t* out) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;  // four values of a row
  const int64_t per_row = width / 4;
  const int64_t row = i / per_row, column = i % per_row;
  WaitForEarlier();
  if (i >= pairs) return;
  const auto* gates = reinterpret_cast<const uint2*>(gate_up + row * 2 * width);
  const uint2 g = gates[column], u = gates[per_row + column];
  const float2 g0 = FromBf16Pair(g.x), g1 = FromBf16Pair(g.y), u0 = FromBf16Pair(u.x), u1 = FromBf16Pair(u.y);
  reinterpret_cast<uint2*>(out)[i] = {ToBf16Pair(SiluTimes(g0.x, u0.x), SiluTimes(g0.y, u0.y)),
                                      ToBf16Pair(SiluTimes(g1.x, u1.x), SiluTimes(g1.y, u1.y))};
}

__global__ void GeluErfKernel(uint16_t* x, int64_t n) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= n) return;
  const float value = FromBf16(x[i]);
  x[i] = ToBf16(0.5f * value * (1.0f + erff(value * 0.70710678f)));
}

__global__ void AddKernel(const float4* x, int64_t n, float4* y) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= n) return;
  const float4 a = x[i], b = y[i];
  y[i] = {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w};
}

// The product is rounded to F32 before its cosine is taken, as the reference does.
__global__ void MropeKernel(const int32_t* positions, const float* frequencies, const uint8_t* axes,
                            int64_t n, int half, float* cos, float* sin) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= n) return;
  const int k = static_cast<int>(i % half);
  const float angle = __fmul_rn(static_cast<float>(positions[i / half * 3 + axes[k]]), frequencies[k]);
  sincosf(angle, sin + i, cos + i);
}

__device__ uint64_t Mix(uint64_t z) {  // SplitMix64 (Steele, Lea, Flood 2014)
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

// A sum of four random bytes is normal enough for weights.
__device__ float NormalOf(uint32_t bytes) {
  const uint32_t pairs = (bytes & 0x00ff00ffu) + ((bytes >> 8) & 0x00ff00ffu);
  return (static_cast<float>((pairs & 0xffffu) + (pairs >> 16)) - 4 * 127.5f) * (0.02f / 147.8f);
}

__global__ void FillNormalKernel(uint64_t seed, int64_t quads, uint2* x) {
  const int64_t stride = int64_t{gridDim.x} * blockDim.x;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < quads; i += stride) {
    const uint64_t a = Mix(seed + static_cast<uint64_t>(2 * i + 1) * 0x9e3779b97f4a7c15u);
    const uint64_t b = Mix(seed + static_cast<uint64_t>(2 * i + 2) * 0x9e3779b97f4a7c15u);
    x[i] = {ToBf16Pair(NormalOf(static_cast<uint32_t>(a)), NormalOf(static_cast<uint32_t>(a >> 32))),
            ToBf16Pair(NormalOf(static_cast<uint32_t>(b)), NormalOf(static_cast<uint32_t>(b >> 32)))};
  }
}

}  // namespace

void EmbedTokens(const int32_t* tokens, const uint16_t* table, int64_t rows, int64_t width, float* hidden,
                 cudaStream_t stream) {
  EmbedKernel<<<static_cast<unsigned>(rows), kThreads, 0, stream>>>(tokens, table, width, hidden);
  CUDA_OK(cudaGetLastError());
}

void RmsNorm(const float* x, const int32_t* source, const float* weight, float eps, int64_t rows,
             int64_t width, uint16_t* out, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(rows);
  const int n = static_cast<int>(width);
  const int64_t vectors = (width / 4 + kThreads - 1) / kThreads;
  if (vectors <= 2) {
    LaunchEarly(RmsNormKernel<2>, blocks, kThreads, stream, x, source, weight, eps, n, out);
  } else if (vectors <= 5) {
    LaunchEarly(RmsNormKernel<5>, blocks, kThreads, stream, x, source, weight, eps, n, out);
  } else if (vectors <= 16) {
    LaunchEarly(RmsNormKernel<16>, blocks, kThreads, stream, x, source, weight, eps, n, out);
  } else {
    throw CudaError("a hidden size of more than 16384 has no RMSNorm kernel");
  }
}

void LayerNorm(const float* x, const float* weight, const float* bias, float eps, int64_t rows, int64_t width,
               uint16_t* out, cudaStream_t stream) {
  LayerNormKernel<<<static_cast<unsigned>(rows), kThreads, 0, stream>>>(x, weight, bias, eps,
                                                                        static_cast<int>(width), out);
  CUDA_OK(cudaGetLastError());
}

void SwiGlu(const uint16_t* gate_up, int64_t rows, int64_t width, uint16_t* out, cudaStream_t stream) {
  const int64_t quads = rows * width / 4;
  LaunchEarly(SwiGluKernel, Blocks(quads), kThreads, stream, gate_up, quads, width, out);
}

void GeluErf(uint16_t* x, int64_t n, cudaStream_t stream) {
  GeluErfKernel<<<Blocks(n), kThreads, 0, stream>>>(x, n);
  CUDA_OK(cudaGetLastError());
}

void AddTo(const float* x, int64_t n, float* y, cudaStream_t stream) {
  AddKernel<<<Blocks(n / 4), kThreads, 0, stream>>>(reinterpret_cast<const float4*>(x), n / 4,
                                                    reinterpret_cast<float4*>(y));
  CUDA_OK(cudaGetLastError());
}

void MropeAngles(const int32_t* positions, const float* frequencies, const uint8_t* axes, int64_t rows,
                 int half, float* cos, float* sin, cudaStream_t stream) {
  MropeKernel<<<Blocks(rows * half), kThreads, 0, stream>>>(positions, frequencies, axes, rows * half, half,
                                                            cos, sin);
  CUDA_OK(cudaGetLastError());
}

void FillNormal(uint64_t seed, int64_t n, uint16_t* x, cudaStream_t stream) {
  const int64_t quads = n / 4;
  FillNormalKernel<<<static_cast<unsigned>(std::min<int64_t>(Blocks(quads), 132 * 16)), kThreads, 0,
                     stream>>>(seed, quads, reinterpret_cast<uint2*>(x));
  CUDA_OK(cudaGetLastError());
}

}  // namespace triaxial::cuda
