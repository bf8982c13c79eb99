#include <cuda_fp8.h>

#include <algorithm>

#include "base/check.h"
#include "base/float8.h"
#include "ops/cuda/device.h"
#include "ops/cuda/fp8_rows.h"
#include "ops/cuda/launch.cuh"
#include "ops/cuda/numbers.cuh"

namespace triaxial::cuda {
namespace {

constexpr int kMaxThreads = 1024;

__device__ uint32_t ToE4m3(float2 a, float2 b) {
  const uint32_t low = __nv_cvt_float2_to_fp8x2(a, __NV_SATFINITE, __NV_E4M3);
  return low | static_cast<uint32_t>(__nv_cvt_float2_to_fp8x2(b, __NV_SATFINITE, __NV_E4M3)) << 16;
}

// One block a row, which is read once: 8 values a thread and vector wait in registers for the largest of all.
template <int kVectors>
__global__ void __launch_bounds__(kMaxThreads)
    QuantizeRowsKernel(const uint16_t* x, int width, uint8_t* out, float* scales) {
  __shared__ float scratch[32];
  const int64_t row = blockIdx.x;
  const int vectors = width / 8;
  const int threads = static_cast<int>(blockDim.x);
  const auto* from = reinterpret_cast<const uint4*>(x + row * width);
  auto* to = reinterpret_cast<uint2*>(out + row * width);
  WaitForEarlier();
  uint4 words[kVectors];
  float largest = 0;
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    const int i = static_cast<int>(threadIdx.x) + j * threads;
    words[j] = i < vectors ? from[i] : uint4{0, 0, 0, 0};
    for (const uint32_t word : {words[j].x, words[j].y, words[j].z, words[j].w}) {
      const float2 pair = FromBf16Pair(word);
      largest = fmaxf(largest, fmaxf(fabsf(pair.x), fabsf(pair.y)));
    }
  }
  largest = BlockMax(largest, scratch);
  const float scale = largest > 0 ? largest / kLargestE4m3 : 1.0f;
  const float inverse = 1.0f / scale;
  if (threadIdx.x == 0) scales[row] = scale;
#pragma unroll
  for (int j = 0; j < kVectors; ++j) {
    const int i = static_cast<int>(threadIdx.x) + j * threads;
    if (i >= vectors) break;
    const auto scaled = [inverse](uint32_t word) {
      const float2 pair = FromBf16Pair(word);
      return float2{pair.x * inverse, pair.y * inverse};
    };
    to[i] = {ToE4m3(scaled(words[j].x), scaled(words[j].y)), ToE4m3(scaled(words[j].z), scaled(words[j].w))};
  }
}

}  // namespace

void QuantizeRows(const uint16_t* x, int64_t rows, int64_t width, uint8_t* out, float* scales,
                  cudaStream_t stream) {
  CHECK(width % 16 == 0 && width <= kMaxFp8Width);
  if (rows == 0) return;
  const int64_t vectors = width / 8;
  const auto threads = static_cast<unsigned>(std::min<int64_t>(kMaxThreads, (vectors + 31) / 32 * 32));
  const auto blocks = static_cast<unsigned>(rows);
  const int n = static_cast<int>(width);
  if (vectors <= threads) {
    LaunchEarly(QuantizeRowsKernel<1>, blocks, threads, stream, x, n, out, scales);
  } else if (vectors <= 2 * threads) {
    LaunchEarly(QuantizeRowsKernel<2>, blocks, threads, stream, x, n, out, scales);
  } else {
    LaunchEarly(QuantizeRowsKernel<4>, blocks, threads, stream, x, n, out, scales);
  }
}

}  // namespace triaxial::cuda
