// Prefill attention: many query rows over cached blocks of any format, then causally over the rows of the
// step.
//
// All of that is brought into the form of tensor cores once for all queries of a KV head, as tiles of 64
// tokens in global memory (ExpandTiles), and then read by every thread block. A thread block owns 128 queries
// (rows and heads of a group) of a KV head. One warp brings tiles into shared memory by bulk copies. Two
// warpgroups, 64 queries each, multiply (wgmma) and keep maximum, sum and output in registers; the scores of
// a tile are computed while the values of the one before are multiplied.
#include <algorithm>

#include "ops/cuda/device.h"
#include "ops/cuda/prefill_attention_sm90.h"
#include "ops/cuda/prefill_tiles.cuh"
#include "ops/cuda/wgmma.cuh"

namespace triaxial::cuda {
namespace {

constexpr int kTileTokens64 = 64, kStages = 6;
constexpr int kThreads = 3 * 128;
constexpr int kTurn = 1;  // the first of two hardware barriers, by which consumers take turns

template <int kDim>
struct SharedLayout {
  static constexpr int kTileBytes = kTileTokens64 * kDim * 2;
  static constexpr int kKeys = 0;
  static constexpr int kValues = kKeys + kStages * kTileBytes;
  // Barriers, 8 bytes each.
  static constexpr int kKeysFull = kValues + kStages * kTileBytes;
  static constexpr int kKeysFree = kKeysFull + kStages * 8;
  static constexpr int kValuesFull = kKeysFree + kStages * 8;
  static constexpr int kValuesFree = kValuesFull + kStages * 8;
  static constexpr int kTokens = kValuesFree + kStages * 8;  // valid tokens of a tile
  static constexpr int kBytes = kTokens + kStages * 4;
};

// A stage of a ring and the parity of its barriers.
template <int kCount>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void Advance() {
    if (++stage == kCount) stage = 0, parity ^= 1;
  }
};

__device__ __forceinline__ PrefillItem LoadItem(const PrefillItem* items, int index) {
  const auto* words = reinterpret_cast<const int4*>(items + index);
  const int4 a = words[0], b = words[1];
  return {
      .row_begin = a.x, .rows = a.y, .first = a.z, .kv_head = a.w, .table = b.x, .blocks = b.y, .tile = b.z};
}
// Tiles that the queries of an item see: its blocks, then those with rows of the step up to its last one.
__device__ __forceinline__ int TilesOf(const PrefillItem& item, int group) {
  const int last_row = min(item.rows - 1, (item.first + kPrefillTileQueries - 1) / group);
  return item.blocks + last_row / kTileTokens64 + 1;
}

// The unit that a tile of a pass belongs to.
__device__ __forceinline__ PrefillItem UnitOf(const PrefillParams& p, int tile) {
  int low = 0;
  for (int high = p.unit_count; high - low > 1;) {
    const int middle = (low + high) / 2;
    (p.units[middle].tile <= tile ? low : high) = middle;
  }
  return LoadItem(p.units, low);
}

// One thread block for each tile: a block of the cache or 64 rows of the step. One warpgroup expands the
// keys, one the values.
template <int kDim>
__global__ void __launch_bounds__(2 * kExpandThreads) ExpandTiles(const __grid_constant__ PrefillParams p) {
  constexpr int kTileBytes = SharedLayout<kDim>::kTileBytes;
  extern __shared__ __align__(1024) uint8_t shared[];
  __shared__ __align__(8) uint64_t barrier_storage;
  const uint32_t tiles = SharedAddress(shared), raw = tiles + 2 * kTileBytes;
  const uint32_t barrier = SharedAddress(&barrier_storage);
  const PrefillItem unit = UnitOf(p, static_cast<int>(blockIdx.x));
  const int tile = static_cast<int>(blockIdx.x) - unit.tile, thread = static_cast<int>(threadIdx.x);
  const int first_row = (tile - unit.blocks) * kTileTokens64;
  if (thread == 0) {
    BarrierInit(barrier, 1);
    FenceBarrierInit();
    FenceProxyAsync();
  }
  __syncthreads();
  const bool keys = thread < kExpandThreads;
  const uint32_t to = tiles + (keys ? 0 : kTileBytes);
  if (first_row < 0) {
    const PrefillBlock block = p.table[unit.table + tile];
    const int k = SideSize(p.codec, kDim, block.k_bits, block.capacity);
    const int v = SideSize(p.codec, kDim, block.v_bits, block.capacity);
    if (thread == 0) {
      const uint8_t* from = p.layer.arena +
                            static_cast<int64_t>(block.unit_row) * (p.num_kv_heads * kUnitBytes) +
                            unit.kv_head * (k + v);
      BarrierExpect(barrier, static_cast<uint32_t>(k + v));
      BulkLoad(raw, from, static_cast<uint32_t>(k + v), barrier);
    }
    BarrierWait(barrier, 0);
    if (keys) {
      ExpandKeysOf<kDim>(p.codec, block.k_bits, raw, block.capacity / 16, to, thread);
    } else {
      ExpandValuesOf<kDim>(p.codec, block.v_bits, raw + static_cast<uint32_t>(k), block.capacity / 16, to,
                           thread - kExpandThreads);
    }
  } else {
    constexpr uint32_t kRowBytes = kDim * 2;
    const int rows = min(unit.rows - first_row, kTileTokens64), row = thread % kTileTokens64;
    if (thread == 0) BarrierExpect(barrier, 2 * static_cast<uint32_t>(rows) * kRowBytes);
    if (thread < 2 * kTileTokens64 && row < rows) {
      const uint16_t* from = (thread < kTileTokens64 ? p.layer.k : p.layer.v) +
                             (unit.row_begin + first_row + row) * p.layer.kv_stride + unit.kv_head * kDim;
      BulkLoad(raw + static_cast<uint32_t>(thread) * kRowBytes, from, kRowBytes, barrier);
    }
    BarrierWait(barrier, 0);
    if (keys) {
      RowsToKeys<kDim>(raw, rows, to, thread);
    } else {
      RowsToValues<kDim>(raw + kTileBytes, rows, to, thread - kExpandThreads);
    }
  }
  FenceProxyAsync();
  __syncthreads();
  if (thread == 0) {
    BulkStore(p.tiles + int64_t{blockIdx.x} * (2 * kTileBytes), tiles, 2 * kTileBytes);
    WaitForBulkStores();
  }
}

// The warp that brings tiles.
template <int kDim>
__device__ __forceinline__ void LoadTiles(const PrefillParams& p, uint32_t base, int group) {
  using L = SharedLayout<kDim>;
  const int lane = threadIdx.x & 31;
  Ring<kStages> ring;
  for (int index = static_cast<int>(blockIdx.x); index < p.item_count; index += static_cast<int>(gridDim.x)) {
    const PrefillItem item = LoadItem(p.items, index);
    const uint8_t* from = p.tiles + int64_t{item.tile} * (2 * L::kTileBytes);
    const int tiles = TilesOf(item, group);
    int tokens = 0;  // of block `lane` of 32
#pragma unroll 1
    for (int tile = 0; tile < tiles; ++tile, from += 2 * L::kTileBytes) {
      if (tile % 32 == 0 && tile + lane < item.blocks) tokens = p.table[item.table + tile + lane].tokens;
      int valid = __shfl_sync(~0u, tokens, tile % 32);
      if (tile >= item.blocks) valid = kTileTokens64;
      if (lane == 0) {
        const uint32_t bars = base + ring.stage * 8, to = base + ring.stage * L::kTileBytes;
        BarrierWait(bars + L::kKeysFree, ring.parity ^ 1);
        StoreShared4(base + L::kTokens + ring.stage * 4, static_cast<uint32_t>(valid));
        BarrierExpect(bars + L::kKeysFull, L::kTileBytes);
        BulkLoad(to + L::kKeys, from, L::kTileBytes, bars + L::kKeysFull);
        BarrierWait(bars + L::kValuesFree, ring.parity ^ 1);
        BarrierExpect(bars + L::kValuesFull, L::kTileBytes);
        BulkLoad(to + L::kValues, from + L::kTileBytes, L::kTileBytes, bars + L::kValuesFull);
      }
      __syncwarp();
      ring.Advance();
    }
  }
}

// One thread's share of a tile of queries: rows g and g + 8 of its warp's 16, columns 8j + 2t and the next.
template <int kDim>
class Consumer {
 public:
  __device__ __forceinline__ Consumer(const PrefillParams& p, uint32_t shared, int group, int warpgroup)
      : p_(p), base_(shared), group_(group), warpgroup_(warpgroup) {}

  __device__ __forceinline__ void Run() {
    if (warpgroup_ == 1) NamedBarrierArrive<256>(kTurn);  // the first turn is the other's
    for (int index = static_cast<int>(blockIdx.x); index < p_.item_count;
         index += static_cast<int>(gridDim.x)) {
      const PrefillItem item = LoadItem(p_.items, index);
      Begin(item);
      const int tiles = TilesOf(item, group_);
      uint32_t even[4][4], odd[4][4];
      BarrierWait(base_ + L::kKeysFull + keys_.stage * 8, keys_.parity);
      MultiplyKeys();
      const int tokens = Tokens();
      WgmmaWait<0>();
      Pin(scores_);
      Free(L::kKeysFree, keys_.stage);
      keys_.Advance();
      Softmax(item, 0, tokens, even);
      for (int tile = 1;;) {
        if (tile == tiles) {
          MultiplyLast(even);
          break;
        }
        Step(item, tile, even, odd);
        if (++tile == tiles) {
          MultiplyLast(odd);
          break;
        }
        Step(item, tile, odd, even);
        ++tile;
      }
      Finish(item);
    }
    if (warpgroup_ == 0) NamedBarrierSync<256>(kTurn);  // for the arrival that is left
  }

 private:
  using L = SharedLayout<kDim>;
  static constexpr int kSteps = kDim / 16;
  // The maximum is raised when a lane's sum of weights would pass this: far below FP16's range, which a
  // weight has.
  static constexpr float kMostSum = 4096.0f;

  __device__ __forceinline__ void Begin(const PrefillItem& item) {
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    first_ = item.first + static_cast<int>(threadIdx.x) / 32 * 16 + g;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int query = Query(item, h);
      row_[h] = query / group_;
      const uint16_t* q = p_.layer.q + (item.row_begin + row_[h]) * p_.layer.q_stride +
                          (item.kv_head * group_ + query % group_) * kDim;
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int channel = ElementOf(s * 16 + half * 8 + 2 * t);
          queries_[s][half * 2 + h] = Bf16ToF16(*reinterpret_cast<const uint32_t*>(q + channel));
        }
      }
      max_[h] = -INFINITY;
      sum_[h] = 0;
    }
#pragma unroll
    for (int i = 0; i < kDim / 2; ++i) out_[i] = 0;
  }
  // Past the last query, the last one again.
  __device__ __forceinline__ int Query(const PrefillItem& item, int h) const {
    return min(first_ + 8 * h, item.rows * group_ - 1);
  }

  // The scores of a tile and, meanwhile, the values of the one before times `now`; weights of the tile to
  // `next`. The warpgroups take turns in giving tensor cores work, so that one's exponentials are computed
  // while the other's products are.
  __device__ __forceinline__ void Step(const PrefillItem& item, int tile, uint32_t (&now)[4][4],
                                       uint32_t (&next)[4][4]) {
    BarrierWait(base_ + L::kKeysFull + keys_.stage * 8, keys_.parity);
    BarrierWait(base_ + L::kValuesFull + values_.stage * 8, values_.parity);
    NamedBarrierSync<256>(kTurn + warpgroup_);
    MultiplyKeys();
    MultiplyValues(now);
    NamedBarrierArrive<256>(kTurn + 1 - warpgroup_);
    const int tokens = Tokens();
    WgmmaWait<1>();
    Pin(scores_);
    Free(L::kKeysFree, keys_.stage);
    keys_.Advance();
    Softmax(item, tile, tokens, next);
    WgmmaWait<0>();
    Pin(out_);
    Pin(now);
    Free(L::kValuesFree, values_.stage);
    values_.Advance();
    if (raised_) Scale();
  }
  __device__ __forceinline__ void MultiplyLast(uint32_t (&weights)[4][4]) {
    BarrierWait(base_ + L::kValuesFull + values_.stage * 8, values_.parity);
    MultiplyValues(weights);
    WgmmaWait<0>();
    Pin(out_);
    Pin(weights);
    Free(L::kValuesFree, values_.stage);
    values_.Advance();
  }
  __device__ __forceinline__ void MultiplyKeys() {
    const uint64_t keys = WgmmaDescriptor(base_ + L::kKeys + keys_.stage * L::kTileBytes);
    Pin(scores_);
    WgmmaFence();
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      Wgmma(scores_, queries_[s][0], queries_[s][1], queries_[s][2], queries_[s][3],
            keys + s / 4 * (8192 / 16) + s % 4 * 2, s != 0);
    }
    WgmmaCommit();
  }
  __device__ __forceinline__ void MultiplyValues(const uint32_t (&weights)[4][4]) {
    const uint64_t values = WgmmaDescriptor(base_ + L::kValues + values_.stage * L::kTileBytes);
    Pin(out_);
    WgmmaFence();
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      Wgmma(out_, weights[s][0], weights[s][1], weights[s][2], weights[s][3], values + s * 2, 1);
    }
    WgmmaCommit();
  }
  __device__ __forceinline__ void Free(int barriers, int stage) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) BarrierArrive(base_ + barriers + stage * 8);
  }
  // Valid tokens of the tile of keys. One lane reads, because one lane says that the stage is free.
  __device__ __forceinline__ int Tokens() const {
    int tokens = 0;
    if (threadIdx.x % 32 == 0) tokens = static_cast<int>(LoadShared4(base_ + L::kTokens + keys_.stage * 4));
    return __shfl_sync(~0u, tokens, 0);
  }

  // Scores to weights 2^(score - maximum). Whether the maximum is still good enough shows in their sum, so
  // that it is searched only when it is not; then factor_ is what the output is to be multiplied by.
  __device__ __forceinline__ void Softmax(const PrefillItem& item, int tile, int tokens,
                                          uint32_t (&weights)[4][4]) {
    const int row_tile = tile - item.blocks;
    if (tokens < kTileTokens64 || row_tile >= 0) Mask(row_tile, tokens);
    float sum[2] = {Weigh(0, max_[0], weights), Weigh(1, max_[1], weights)};
    raised_ = __any_sync(~0u, !(sum[0] < kMostSum && sum[1] < kMostSum));
    if (raised_) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float next = fmaxf(max_[h], Largest(h));
        factor_[h] = next == -INFINITY || max_[h] == -INFINITY ? 0.0f : Exp2(max_[h] - next);
        max_[h] = next;
        sum_[h] *= factor_[h];
        sum[h] = Weigh(h, next == -INFINITY ? 0.0f : next, weights);
      }
    }
    sum_[0] += sum[0], sum_[1] += sum[1];
  }
  __device__ __forceinline__ void Mask(int row_tile, int tokens) {
    const int t = threadIdx.x & 3;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int limit = row_tile >= 0 ? row_[h] - row_tile * kTileTokens64 : tokens - 1;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          if (ElementOf(j * 8 + 2 * t + c) > limit) scores_[j * 4 + h * 2 + c] = -INFINITY;
        }
      }
    }
  }
  // Of row h: the largest score, base 2.
  __device__ __forceinline__ float Largest(int h) const {
    float x = scores_[h * 2];
#pragma unroll
    for (int j = 0; j < 8; ++j) x = fmaxf(x, fmaxf(scores_[j * 4 + h * 2], scores_[j * 4 + h * 2 + 1]));
    x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
    return fmaxf(x, __shfl_xor_sync(~0u, x, 2)) * p_.scale_log2;
  }
  // The weights of row h; this lane's sum of them.
  __device__ __forceinline__ float Weigh(int h, float max, uint32_t (&weights)[4][4]) const {
    float sum = 0;
#pragma unroll
    for (int j = 0; j < 8; ++j) {
      const float a = Exp2(fmaf(scores_[j * 4 + h * 2], p_.scale_log2, -max));
      const float b = Exp2(fmaf(scores_[j * 4 + h * 2 + 1], p_.scale_log2, -max));
      weights[j / 2][j % 2 * 2 + h] = PackF16(a, b);
      sum += a, sum += b;
    }
    return sum;
  }
  __device__ __forceinline__ void Scale() {
#pragma unroll
    for (int j = 0; j < kDim / 8; ++j) {
#pragma unroll
      for (int c = 0; c < 4; ++c) out_[j * 4 + c] *= factor_[c / 2];
    }
  }

  __device__ __forceinline__ void Finish(const PrefillItem& item) {
    const int t = threadIdx.x & 3;
    if (p_.codec == Codec::kRotated) RotateBack();
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float sum = sum_[h];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      float factor = 1.0f / sum;
      if (p_.codec == Codec::kRotated) factor *= kDim == 128 ? 0x1.6a09e6p-4f : 0.125f;
      const int query = Query(item, h);
      if (query != first_ + 8 * h) continue;
      uint16_t* out =
          p_.layer.out +
          (int64_t{item.row_begin + row_[h]} * p_.num_heads + item.kv_head * group_ + query % group_) * kDim +
          2 * t;
#pragma unroll
      for (int j = 0; j < kDim / 8; ++j) {
        *reinterpret_cast<uint32_t*>(out + j * 8) =
            PackBf16(out_[j * 4 + h * 2] * factor, out_[j * 4 + h * 2 + 1] * factor);
      }
    }
  }
  // The Walsh-Hadamard transform over channels 8j + 2t + c, without its factor.
  __device__ __forceinline__ void RotateBack() {
    const auto butterfly = [&](int i, int k) {
      const float a = out_[i], b = out_[k];
      out_[i] = a + b, out_[k] = a - b;
    };
#pragma unroll
    for (int i = 0; i < kDim / 2; i += 2) butterfly(i, i + 1);
#pragma unroll
    for (int d = 1; d < kDim / 8; d *= 2) {
#pragma unroll
      for (int j = 0; j < kDim / 8; ++j) {
        if ((j & d) != 0) continue;
#pragma unroll
        for (int c = 0; c < 4; ++c) butterfly(j * 4 + c, (j + d) * 4 + c);
      }
    }
#pragma unroll
    for (int d = 1; d < 4; d *= 2) {
      const float sign = (threadIdx.x & d) != 0 ? -1.0f : 1.0f;
#pragma unroll
      for (int i = 0; i < kDim / 2; ++i) out_[i] = fmaf(sign, out_[i], __shfl_xor_sync(~0u, out_[i], d));
    }
  }

  const PrefillParams& p_;
  const uint32_t base_;
  const int group_, warpgroup_;
  Ring<kStages> keys_, values_;
  uint32_t queries_[kSteps][4];
  float scores_[32] = {};
  float out_[kDim / 2];
  float max_[2], sum_[2], factor_[2];
  int first_, row_[2];
  bool raised_ = false;
};

template <int kDim>
__global__ void __launch_bounds__(kThreads, 1) PrefillKernel(const __grid_constant__ PrefillParams p) {
  using L = SharedLayout<kDim>;
  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t base = SharedAddress(shared);
  const int group = p.num_heads / p.num_kv_heads;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      BarrierInit(base + L::kKeysFull + i * 8, 1);
      BarrierInit(base + L::kValuesFull + i * 8, 1);
      BarrierInit(base + L::kKeysFree + i * 8, 8);  // warps of both consumers
      BarrierInit(base + L::kValuesFree + i * 8, 8);
    }
    FenceBarrierInit();
    FenceProxyAsync();
  }
  __syncthreads();
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32, 0);
  if (warp < 8) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 232;");
    Consumer<kDim>(p, base, group, warp / 4).Run();
  } else {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");
    if (warp == 8) LoadTiles<kDim>(p, base, group);
  }
}

template <int kDim>
void Launch(const PrefillParams& params, const PrefillPass& pass, int blocks, cudaStream_t stream) {
  constexpr int kBytes = SharedLayout<kDim>::kBytes, kExpandBytes = 2 * PrefillTileBytes(kDim);
  static const bool configured = [] {
    CUDA_OK(cudaFuncSetAttribute(PrefillKernel<kDim>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
    CUDA_OK(
        cudaFuncSetAttribute(ExpandTiles<kDim>, cudaFuncAttributeMaxDynamicSharedMemorySize, kExpandBytes));
    return true;
  }();
  static_cast<void>(configured);
  ExpandTiles<kDim><<<static_cast<unsigned>(pass.tiles), 2 * kExpandThreads, kExpandBytes, stream>>>(params);
  CUDA_OK(cudaGetLastError());
  PrefillKernel<kDim>
      <<<static_cast<unsigned>(std::min(blocks, pass.items)), kThreads, kBytes, stream>>>(params);
  CUDA_OK(cudaGetLastError());
}

}  // namespace

void LaunchPrefillSm90(const PrefillParams& params, int head_dim, const PrefillPass& pass, int blocks,
                       cudaStream_t stream) {
  if (head_dim == 128) {
    Launch<128>(params, pass, blocks, stream);
  } else {
    Launch<64>(params, pass, blocks, stream);
  }
}

}  // namespace triaxial::cuda
