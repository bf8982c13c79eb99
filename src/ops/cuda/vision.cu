#include "ops/cuda/device.h"
#include "ops/cuda/numbers.cuh"
#include "ops/cuda/vision.h"

namespace triaxial::cuda {
namespace {

constexpr int kThreads = 256;

unsigned Blocks(int64_t n) { return static_cast<unsigned>((n + kThreads - 1) / kThreads); }

__global__ void NormalizeKernel(const uint8_t* samples, const float* values, int64_t n, int frames, int plane,
                                uint16_t* pixels) {
  __shared__ float table[3 * 256];
  for (int i = static_cast<int>(threadIdx.x); i < 3 * 256; i += kThreads) table[i] = values[i];
  __syncthreads();
  const int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= n) return;
  const int64_t matrix = i / plane;  // patch and channel
  const uint16_t value = ToBf16(table[matrix % 3 * 256 + samples[i]]);
  for (int frame = 0; frame < frames; ++frame) pixels[(matrix * frames + frame) * plane + i % plane] = value;
}

__global__ void EmbedKernel(const PatchPlace* places, const float* table, int64_t hidden, float* x) {
  const PatchPlace place = places[blockIdx.x];
  for (int64_t i = threadIdx.x; i < hidden; i += kThreads) {
    float sum = 0;
#pragma unroll
    for (int c = 0; c < 4; ++c) sum += table[place.corner[c] * hidden + i] * place.factor[c];
    x[blockIdx.x * hidden + i] = sum;
  }
}

// A block per patch; a thread per pair of a head of Q or K.
__global__ void RotateKernel(const PatchPlace* places, const float* cos, const float* sin, int heads, int dim,
                             uint16_t* qkv) {
  const PatchPlace place = places[blockIdx.x];
  const int half = dim / 2, quarter = dim / 4;
  uint16_t* row = qkv + int64_t{blockIdx.x} * 3 * heads * dim;
  for (int i = static_cast<int>(threadIdx.x); i < 2 * heads * half; i += kThreads) {
    const int c = i % half;
    const int angle = (c < quarter ? place.row : place.column) * quarter + c % quarter;
    uint16_t* head = row + i / half * dim;
    const float a = FromBf16(head[c]), b = FromBf16(head[c + half]);
    head[c] = ToBf16(a * cos[angle] - b * sin[angle]);
    head[c + half] = ToBf16(b * cos[angle] + a * sin[angle]);
  }
}

// ---- Attention: 128 query rows a block, 16 a warp, against tiles of 64 keys.

constexpr int kWarps = 8;
constexpr int kQueryRows = 16 * kWarps;
constexpr int kKeys = 64;

__device__ uint32_t SharedAddress(const void* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Copies 16 bytes, or zeros if not `valid`.
__device__ void CopyAsync(void* to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(SharedAddress(to)), "l"(from),
               "r"(valid ? 16 : 0));
}
__device__ void LoadMatrices(uint32_t (&r)[4], const void* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(SharedAddress(p)));
}
__device__ void LoadMatricesTransposed(uint32_t (&r)[4], const void* p) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(SharedAddress(p)));
}
// 2^x, flushing what is tiny.
__device__ float PowerOfTwo(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ void MultiplyAdd(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// kDim: the head's channels, padded with zeros to a multiple of 16. Rows of shared memory have 8 more, so
// that the eight rows of a matrix lie in different banks.
template <int kDim>
struct AttentionShared {
  static constexpr int kStride = kDim + 8;
  uint16_t q[kQueryRows * kStride];
  uint16_t k[2][kKeys * kStride];
  uint16_t v[2][kKeys * kStride];
};

template <int kDim>
__global__ void __launch_bounds__(kWarps * 32, kDim <= 80 ? 2 : 1)
    FullAttentionKernel(const uint16_t* qkv, int rows, int heads, int dim, float scale_log2, uint16_t* out) {
  using Shared = AttentionShared<kDim>;
  constexpr int kStride = Shared::kStride;
  extern __shared__ __align__(16) uint8_t bytes[];
  Shared& shared = *reinterpret_cast<Shared*>(bytes);
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
  const int head = static_cast<int>(blockIdx.y), first = static_cast<int>(blockIdx.x) * kQueryRows;
  const int64_t row_stride = int64_t{3} * heads * dim;
  const auto copy_rows = [&](uint16_t* to, int part, int row, int count) {
    const uint16_t* from = qkv + (int64_t{part} * heads + head) * dim;
    for (int i = static_cast<int>(threadIdx.x); i < count * (kDim / 8); i += kWarps * 32) {
      const int r = i / (kDim / 8), chunk = i % (kDim / 8);
      const bool valid = row + r < rows && chunk * 8 < dim;
      CopyAsync(to + r * kStride + chunk * 8, valid ? from + (row + r) * row_stride + chunk * 8 : from,
                valid);
    }
  };
  const auto copy_tile = [&](int tile) {
    copy_rows(shared.k[tile % 2], 1, tile * kKeys, kKeys);
    copy_rows(shared.v[tile % 2], 2, tile * kKeys, kKeys);
    asm volatile("cp.async.commit_group;");
  };
  copy_rows(shared.q, 0, first, kQueryRows);
  copy_tile(0);

  // A lane's rows of a fragment are lane / 4 and that + 8.
  uint32_t q[kDim / 16][4];
  float o[kDim / 8][4] = {};
  float top[2] = {-INFINITY, -INFINITY}, sum[2] = {};
  const int tiles = (rows + kKeys - 1) / kKeys;
  for (int tile = 0; tile < tiles; ++tile) {
    if (tile + 1 < tiles) {
      copy_tile(tile + 1);
      asm volatile("cp.async.wait_group 1;");
    } else {
      asm volatile("cp.async.wait_group 0;");
    }
    __syncthreads();
    if (tile == 0) {
#pragma unroll
      for (int i = 0; i < kDim / 16; ++i) {
        LoadMatrices(q[i], shared.q + (warp * 16 + lane % 16) * kStride + i * 16 + lane / 16 * 8);
      }
    }
    const uint16_t* keys = shared.k[tile % 2];
    const uint16_t* values = shared.v[tile % 2];
    float s[kKeys / 8][4] = {};
#pragma unroll
    for (int i = 0; i < kDim / 16; ++i) {
#pragma unroll
      for (int j = 0; j < kKeys / 16; ++j) {  // two groups of eight keys
        uint32_t b[4];
        LoadMatrices(b, keys + (j * 16 + lane % 8 + lane / 16 * 8) * kStride + i * 16 + lane / 8 % 2 * 8);
        MultiplyAdd(s[2 * j], q[i], b[0], b[1]);
        MultiplyAdd(s[2 * j + 1], q[i], b[2], b[3]);
      }
    }
    if ((tile + 1) * kKeys > rows) {
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          if (tile * kKeys + j * 8 + lane % 4 * 2 + c % 2 >= rows) s[j][c] = -INFINITY;
        }
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float best = top[half];
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j) best = fmaxf(best, fmaxf(s[j][2 * half], s[j][2 * half + 1]));
      best = fmaxf(best, __shfl_xor_sync(~0u, best, 1));
      best = fmaxf(best, __shfl_xor_sync(~0u, best, 2));
      const float keep = PowerOfTwo((top[half] - best) * scale_log2);
      const float shift = best * scale_log2;
      top[half] = best;
      sum[half] *= keep;
#pragma unroll
      for (int i = 0; i < kDim / 8; ++i) {
        o[i][2 * half] *= keep;
        o[i][2 * half + 1] *= keep;
      }
#pragma unroll
      for (int j = 0; j < kKeys / 8; ++j) {
#pragma unroll
        for (int c = 2 * half; c < 2 * half + 2; ++c) {
          s[j][c] = PowerOfTwo(s[j][c] * scale_log2 - shift);
          sum[half] += s[j][c];
        }
      }
    }
#pragma unroll
    for (int j = 0; j < kKeys / 16; ++j) {
      const uint32_t p[4] = {ToBf16Pair(s[2 * j][0], s[2 * j][1]), ToBf16Pair(s[2 * j][2], s[2 * j][3]),
                             ToBf16Pair(s[2 * j + 1][0], s[2 * j + 1][1]),
                             ToBf16Pair(s[2 * j + 1][2], s[2 * j + 1][3])};
#pragma unroll
      for (int i = 0; i < kDim / 16; ++i) {
        uint32_t b[4];
        LoadMatricesTransposed(b, values + (j * 16 + lane % 16) * kStride + i * 16 + lane / 16 * 8);
        MultiplyAdd(o[2 * i], p, b[0], b[1]);
        MultiplyAdd(o[2 * i + 1], p, b[2], b[3]);
      }
    }
    __syncthreads();
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    sum[half] += __shfl_xor_sync(~0u, sum[half], 1);
    sum[half] += __shfl_xor_sync(~0u, sum[half], 2);
    const int row = first + warp * 16 + lane / 4 + half * 8;
    if (row >= rows) continue;
    const float factor = 1.0f / sum[half];
    uint16_t* to = out + (int64_t{row} * heads + head) * dim;
#pragma unroll
    for (int i = 0; i < kDim / 8; ++i) {
      const int channel = i * 8 + lane % 4 * 2;
      if (channel >= dim) continue;
      *reinterpret_cast<uint32_t*>(to + channel) =
          ToBf16Pair(o[i][2 * half] * factor, o[i][2 * half + 1] * factor);
    }
  }
}

template <int kDim>
void LaunchFullAttention(const uint16_t* qkv, int64_t rows, int heads, int dim, float scale, uint16_t* out,
                         cudaStream_t stream) {
  const auto kernel = FullAttentionKernel<kDim>;
  constexpr int kBytes = sizeof(AttentionShared<kDim>);
  CUDA_OK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
  const dim3 grid(static_cast<unsigned>((rows + kQueryRows - 1) / kQueryRows), static_cast<unsigned>(heads));
  kernel<<<grid, kWarps * 32, kBytes, stream>>>(qkv, static_cast<int>(rows), heads, dim, scale * 1.44269504f,
                                                out);
  CUDA_OK(cudaGetLastError());
}

}  // namespace

void NormalizePixels(const uint8_t* samples, const float* values, int64_t patches, int frames, int plane,
                     uint16_t* pixels, cudaStream_t stream) {
  const int64_t n = patches * 3 * plane;
  NormalizeKernel<<<Blocks(n), kThreads, 0, stream>>>(samples, values, n, frames, plane, pixels);
  CUDA_OK(cudaGetLastError());
}

void EmbedPatchPositions(const PatchPlace* places, const float* table, int64_t patches, int64_t hidden,
                         float* x, cudaStream_t stream) {
  EmbedKernel<<<static_cast<unsigned>(patches), kThreads, 0, stream>>>(places, table, hidden, x);
  CUDA_OK(cudaGetLastError());
}

void RotateGrid(const PatchPlace* places, const float* cos, const float* sin, int64_t patches, int heads,
                int dim, uint16_t* qkv, cudaStream_t stream) {
  RotateKernel<<<static_cast<unsigned>(patches), kThreads, 0, stream>>>(places, cos, sin, heads, dim, qkv);
  CUDA_OK(cudaGetLastError());
}

void FullAttention(const uint16_t* qkv, int64_t rows, int heads, int dim, float scale, uint16_t* out,
                   cudaStream_t stream) {
  if (dim % 8 != 0 || dim > 128)
    throw CudaError("vision attention has kernels for heads of 8, 16 ... 128 channels");
  if (dim <= 64) return LaunchFullAttention<64>(qkv, rows, heads, dim, scale, out, stream);
  if (dim <= 80) return LaunchFullAttention<80>(qkv, rows, heads, dim, scale, out, stream);
  LaunchFullAttention<128>(qkv, rows, heads, dim, scale, out, stream);
}

}  // namespace triaxial::cuda
