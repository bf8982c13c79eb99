// Conversions and reductions that several kernels share.
#ifndef TRIAXIAL_OPS_CUDA_NUMBERS_CUH_
#define TRIAXIAL_OPS_CUDA_NUMBERS_CUH_

#include <cuda_bf16.h>

#include <cstdint>

namespace triaxial::cuda {

__device__ inline float FromBf16(uint16_t x) { return __uint_as_float(static_cast<uint32_t>(x) << 16); }
// The two values of a word, the lower half first.
__device__ inline float2 FromBf16Pair(uint32_t x) {
  return {__uint_as_float(x << 16), __uint_as_float(x & 0xffff0000u)};
}
__device__ inline uint16_t ToBf16(float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
__device__ inline uint32_t ToBf16Pair(float low, float high) {
  return static_cast<uint32_t>(ToBf16(low)) | static_cast<uint32_t>(ToBf16(high)) << 16;
}

__device__ inline float WarpSum(float x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(~0u, x, distance);
  return x;
}

// Sum over the block, in all threads; blockDim.x is a multiple of 32 and `scratch` has 32 floats. Ends with
// the scratch free for the next call.
__device__ inline float BlockSum(float x, float* scratch) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  x = WarpSum(x);
  if (lane == 0) scratch[warp] = x;
  __syncthreads();
  x = lane < static_cast<int>(blockDim.x) / 32 ? scratch[lane] : 0.0f;
  x = WarpSum(x);
  __syncthreads();
  return x;
}

// The same for the largest value; x >= 0.
__device__ inline float BlockMax(float x, float* scratch) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  // Floats that are not negative are in the order of their bits.
  uint32_t bits = __reduce_max_sync(~0u, __float_as_uint(x));
  if (lane == 0) scratch[warp] = __uint_as_float(bits);
  __syncthreads();
  bits = lane < static_cast<int>(blockDim.x) / 32 ? __float_as_uint(scratch[lane]) : 0;
  bits = __reduce_max_sync(~0u, bits);
  __syncthreads();
  return __uint_as_float(bits);
}

}  // namespace triaxial::cuda

#endif  // TRIAXIAL_OPS_CUDA_NUMBERS_CUH_
