#include "base/check.h"
#include "ops/cuda/fp8_product.h"
#include "ops/cuda/launch.cuh"
#include "ops/cuda/numbers.cuh"
#include "ops/cuda/ptx.cuh"

namespace triaxial::cuda {
namespace {

constexpr int kWarps = 8;
constexpr int kChunk = 64;  // columns that a warp multiplies at a time
constexpr int kM = 2;       // tiles of 16 outputs of a thread block
constexpr int kStages = 3;  // chunks of a warp on their way

struct Params {
  const uint8_t* w;
  const float* w_scales;
  const uint8_t* x;
  const float* x_scales;
  void* y;
  int rows, in, out;
};

__device__ __forceinline__ uint4 LoadOnce(const uint8_t* p) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}

// A thread block makes 16 kM outputs of all rows; its warps take every eighth chunk of columns each and add
// up at the end. Weights are the A operand (rows = outputs), 16 consecutive columns a lane: any order of
// columns is right as long as x has the same, so nothing is shuffled on the way from memory to tensor cores.
template <int kN, bool kBf16, bool kAdd>
__global__ void __launch_bounds__(kWarps * 32, 2) Fp8ProductKernel(const Params p) {
  constexpr int kOutputs = 16 * kM, kRow = kOutputs + 4;
  __shared__ float sums[kWarps][8 * kN][kRow];
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int g = lane / 4, t = lane % 4;
  const int first_output = static_cast<int>(blockIdx.x) * kOutputs;
  const int chunks = p.in / kChunk;
  struct Stage {
    uint4 a[kM][2], b[kN];
  };
  Stage ring[kStages];
  const auto load_weights = [&](Stage& stage, int chunk) {
    if (chunk >= chunks) return;
#pragma unroll
    for (int m = 0; m < kM; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t output = first_output + m * 16 + half * 8 + g;
        stage.a[m][half] = LoadOnce(p.w + output * p.in + chunk * kChunk + t * 16);
      }
    }
  };
  const auto load_rows = [&](Stage& stage, int chunk) {
    if (chunk >= chunks) return;
#pragma unroll
    for (int n = 0; n < kN; ++n) {
      const int row = n * 8 + g;
      stage.b[n] = row < p.rows ? *reinterpret_cast<const uint4*>(p.x + static_cast<int64_t>(row) * p.in +
                                                                  chunk * kChunk + t * 16)
                                : uint4{0, 0, 0, 0};
    }
  };
  float acc[kM][kN][4] = {};
  const auto multiply = [&](const Stage& stage) {
    const auto word = [](const uint4& v, int j) { return j == 0 ? v.x : j == 1 ? v.y : j == 2 ? v.z : v.w; };
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      uint32_t b[kN][2];
#pragma unroll
      for (int n = 0; n < kN; ++n) {
        b[n][0] = F16FromE4m3(static_cast<uint16_t>(word(stage.b[n], j)));
        b[n][1] = F16FromE4m3(static_cast<uint16_t>(word(stage.b[n], j) >> 16));
      }
#pragma unroll
      for (int m = 0; m < kM; ++m) {
        const uint32_t low = word(stage.a[m][0], j), high = word(stage.a[m][1], j);
        const uint32_t a0 = F16FromE4m3(static_cast<uint16_t>(low)),
                       a1 = F16FromE4m3(static_cast<uint16_t>(high));
        const uint32_t a2 = F16FromE4m3(static_cast<uint16_t>(low >> 16));
        const uint32_t a3 = F16FromE4m3(static_cast<uint16_t>(high >> 16));
#pragma unroll
        for (int n = 0; n < kN; ++n) MmaF16(acc[m][n], a0, a1, a2, a3, b[n][0], b[n][1]);
      }
    }
  };
#pragma unroll
  for (int s = 0; s < kStages; ++s) load_weights(ring[s], warp + s * kWarps);
  WaitForEarlier();
#pragma unroll
  for (int s = 0; s < kStages; ++s) load_rows(ring[s], warp + s * kWarps);
  for (int chunk = warp; chunk < chunks;) {
#pragma unroll
    for (int s = 0; s < kStages; ++s) {
      if (chunk >= chunks) break;
      multiply(ring[s]);
      const int next = chunk + kStages * kWarps;
      load_weights(ring[s], next);
      load_rows(ring[s], next);
      chunk += kWarps;
    }
  }
#pragma unroll
  for (int m = 0; m < kM; ++m) {
#pragma unroll
    for (int n = 0; n < kN; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) sums[warp][n * 8 + t * 2 + i % 2][m * 16 + i / 2 * 8 + g] = acc[m][n][i];
    }
  }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < p.rows * kOutputs; i += kWarps * 32) {
    const int row = i / kOutputs, output = i % kOutputs;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) sum += sums[w][row][output];
    sum *= p.x_scales[row] * p.w_scales[first_output + output];
    const int64_t at = static_cast<int64_t>(row) * p.out + first_output + output;
    if constexpr (kBf16) {
      static_cast<uint16_t*>(p.y)[at] = ToBf16(sum);
    } else {
      auto* y = static_cast<float*>(p.y) + at;
      *y = kAdd ? *y + sum : sum;
    }
  }
}

template <int kN>
void Launch(const Params& p, Element output, bool add, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(p.out / (16 * kM));
  if (output == Element::kBf16) {
    LaunchEarly(Fp8ProductKernel<kN, true, false>, blocks, kWarps * 32, stream, p);
  } else if (add) {
    LaunchEarly(Fp8ProductKernel<kN, false, true>, blocks, kWarps * 32, stream, p);
  } else {
    LaunchEarly(Fp8ProductKernel<kN, false, false>, blocks, kWarps * 32, stream, p);
  }
}

}  // namespace

void Fp8Product(const uint8_t* w, const float* w_scales, const uint8_t* x, const float* x_scales,
                int64_t rows, int64_t in, int64_t out, Element output, bool add, void* y,
                cudaStream_t stream) {
  CHECK(HasFp8Product(rows, in, out) && (output == Element::kF32 || !add));
  if (rows == 0) return;
  const Params p = {
      w, w_scales, x, x_scales, y, static_cast<int>(rows), static_cast<int>(in), static_cast<int>(out)};
  if (rows <= 8) {
    Launch<1>(p, output, add, stream);
  } else {
    Launch<2>(p, output, add, stream);
  }
}

}  // namespace triaxial::cuda
