// Prefill attention: many query rows over cached blocks of any format, then causally over the rows of the
// step.
//
// A thread block owns 128 queries (rows and heads of a group) of a KV head and walks over tiles of 64 tokens,
// in three steps that follow each other through shared memory. Bulk copies bring blocks as they are stored.
// Two warpgroups expand them to FP16 tiles (prefill_tiles.cuh), one the keys, one the values, once for all
// 128 queries. Two others, 64 queries each, multiply (wgmma) and keep maximum, sum and output in registers;
// the scores of a tile are computed while the values of the one before are multiplied.
#include "ops/cuda/device.h"
#include "ops/cuda/prefill_attention_sm90.h"
#include "ops/cuda/prefill_tiles.cuh"
#include "ops/cuda/wgmma.cuh"

namespace triaxial::cuda {
namespace {

constexpr int kTileTokens64 = 64, kStages = 3, kRawStages = 4;
constexpr int kThreads = 4 * 128;

template <int kDim>
struct SharedLayout {
  static constexpr int kTileBytes = kTileTokens64 * kDim * 2;
  static constexpr int kRawBytes = kBlockTokens * kDim * 4;  // a BF16 block, the largest
  static constexpr int kKeys = 0;
  static constexpr int kValues = kKeys + kStages * kTileBytes;
  static constexpr int kRaw = kValues + kStages * kTileBytes;
  static constexpr int kBarriers = kRaw + kRawStages * kRawBytes;
  // 8 bytes each: raw full, raw free; keys full, keys free; values full, values free. Then what the stages
  // hold.
  static constexpr int kRawFull = kBarriers;
  static constexpr int kRawFree = kRawFull + kRawStages * 8;
  static constexpr int kKeysFull = kRawFree + kRawStages * 8;
  static constexpr int kKeysFree = kKeysFull + kStages * 8;
  static constexpr int kValuesFull = kKeysFree + kStages * 8;
  static constexpr int kValuesFree = kValuesFull + kStages * 8;
  static constexpr int kRawBlocks = kValuesFree + kStages * 8;  // the word of PrefillBlock after unit_row
  static constexpr int kTokens = kRawBlocks + kRawStages * 4;   // valid tokens of a tile
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

__device__ __forceinline__ int TilesOfRows(int last_row) { return last_row / kTileTokens64 + 1; }
__device__ __forceinline__ int LastRow(const PrefillItem& item, int group) {
  return min(item.rows - 1, (item.first + kPrefillTileQueries - 1) / group);
}
__device__ __forceinline__ PrefillItem LoadItem(const PrefillParams& p, int index) {
  const auto* words = reinterpret_cast<const int4*>(p.items + index);
  const int4 a = words[0], b = words[1];
  return {.row_begin = a.x, .rows = a.y, .first = a.z, .kv_head = a.w, .table = b.x, .blocks = b.y};
}

// A walk over the tiles of all items of this thread block: of each, its blocks, then tiles of rows of the
// step.
class Walk {
 public:
  __device__ __forceinline__ Walk(const PrefillParams& p, int group)
      : p_(p), group_(group), index_(static_cast<int>(blockIdx.x)) {
    Begin();
  }
  __device__ __forceinline__ bool done() const { return item_.rows == 0; }
  __device__ __forceinline__ const PrefillItem& item() const { return item_; }
  __device__ __forceinline__ int tile() const { return tile_; }
  // Of a tile of rows: the first of them, counted from the sequence's first.
  __device__ __forceinline__ bool is_block() const { return tile_ < item_.blocks; }
  __device__ __forceinline__ int first_row() const { return (tile_ - item_.blocks) * kTileTokens64; }
  __device__ __forceinline__ void Advance() {
    if (++tile_ < tiles_) return;
    index_ += static_cast<int>(gridDim.x);
    Begin();
  }

 private:
  __device__ __forceinline__ void Begin() {
    item_ = LoadItem(p_, index_);
    tile_ = 0;
    tiles_ = item_.rows == 0 ? 0 : item_.blocks + TilesOfRows(LastRow(item_, group_));
  }

  const PrefillParams& p_;
  const int group_;
  int index_, tile_, tiles_;
  PrefillItem item_;
};

// One copy of a head of a block, `what` of which (tokens, capacity, bits of keys, of values) is put beside
// it. Not inlined: it is done by one thread, and its registers would be taken from all.
template <int kDim>
__device__ __noinline__ void IssueBlock(const PrefillParams& p, int kv_head, uint32_t unit_row, uint32_t what,
                                        uint32_t to, uint32_t barrier, uint32_t what_to) {
  const int capacity = static_cast<int>(what >> 8 & 0xff);
  const int bytes = SideSize(p.codec, kDim, static_cast<int>(what >> 16 & 0xff), capacity) +
                    SideSize(p.codec, kDim, static_cast<int>(what >> 24), capacity);
  const uint8_t* from = p.layer.arena +
                        static_cast<uint64_t>(unit_row) * static_cast<uint32_t>(p.num_kv_heads * kUnitBytes) +
                        static_cast<uint32_t>(kv_head * bytes);
  StoreShared4(what_to, what);
  BarrierExpect(barrier, static_cast<uint32_t>(bytes));
  BulkLoad(to, from, static_cast<uint32_t>(bytes), barrier);
}

// A warpgroup that fills the tiles of keys, or those of values, of all items of this thread block. What they
// are made of is brought into shared memory as it lies in global memory, two tiles ahead, by the keys'
// warpgroup, whose warps take turns: bringing a block costs one warp as much as expanding half a tile.
template <int kDim, Side kSide>
class Producer {
 public:
  __device__ __forceinline__ Producer(const PrefillParams& p, uint32_t shared, int group)
      : p_(p), base_(shared), group_(group), ahead_(p, group) {
    // Kept in a register: read again wherever it is needed, it costs some twenty cycles each time.
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread_));
    thread_ %= kExpandThreads;
  }

  __device__ __forceinline__ void Run() {
    if constexpr (kKeys) {
      for (int i = 0; i < 2; ++i) BringNext();
    }
    Ring<kStages> ring;
    Ring<kRawStages> raw_ring;
    for (Walk walk(p_, group_); !walk.done(); walk.Advance()) {
      if constexpr (kKeys) BringNext();
      const uint32_t tile = base_ + (kKeys ? L::kKeys : L::kValues) + ring.stage * L::kTileBytes;
      BarrierWait(base_ + L::kRawFull + raw_ring.stage * 8, raw_ring.parity);
      BarrierWait(base_ + (kKeys ? L::kKeysFree : L::kValuesFree) + ring.stage * 8, ring.parity ^ 1);
      // Rows are spread over the threads otherwise than blocks; what another thread wrote to this stage is
      // over, because the stage is free, but racecheck does not follow one lane that speaks for its warp.
      if (!walk.is_block()) {
        asm volatile("bar.sync %0, %1;" ::"n"(kKeys ? 1 : 2), "n"(kExpandThreads) : "memory");
      }
      const int tokens = Fill(walk, raw_ring.stage, tile);
      if (kKeys && thread_ == 0) {
        StoreShared4(base_ + L::kTokens + ring.stage * 4, static_cast<uint32_t>(tokens));
      }
      FenceProxyAsync();
      Arrive(kKeys ? L::kKeysFull : L::kValuesFull, ring.stage);
      BarrierArrive(base_ + L::kRawFree + raw_ring.stage * 8);  // every thread has read some of it
      ring.Advance();
      raw_ring.Advance();
    }
  }

 private:
  using L = SharedLayout<kDim>;
  static constexpr bool kKeys = kSide == Side::kK;

  // Brings the next tile's block or rows.
  __device__ __forceinline__ void BringNext() {
    if (ahead_.done()) return;
    const uint32_t full = base_ + L::kRawFull + ahead_ring_.stage * 8;
    const uint32_t free = base_ + L::kRawFree + ahead_ring_.stage * 8;
    const uint32_t to = base_ + L::kRaw + ahead_ring_.stage * L::kRawBytes;
    if (ahead_.is_block()) {
      BringBlock(to, full, free);
    } else {
      BarrierWait(free, ahead_ring_.parity ^ 1);
      BringRow(to, full);
    }
    ahead_ring_.Advance();
    ahead_.Advance();
  }
  __device__ __forceinline__ void BringBlock(uint32_t to, uint32_t full, uint32_t free) {
    const int lane = thread_ & 31, of = ahead_.tile() % 32;
    const PrefillItem& item = ahead_.item();
    if (of == 0 && ahead_.tile() + lane < item.blocks) {
      block_ = __ldg(reinterpret_cast<const uint2*>(p_.table) + item.table + ahead_.tile() + lane);
    }
    if (of % 4 != thread_ / 32) return;
    const uint32_t unit_row = __shfl_sync(~0u, block_.x, of), what = __shfl_sync(~0u, block_.y, of);
    BarrierWait(free, ahead_ring_.parity ^ 1);
    if (lane == 0) {
      IssueBlock<kDim>(p_, item.kv_head, unit_row, what, to, full,
                       base_ + L::kRawBlocks + ahead_ring_.stage * 4);
    }
    __syncwarp();  // else the lanes would go on apart
  }
  // Each thread brings one: a key or a value.
  __device__ __forceinline__ void BringRow(uint32_t to, uint32_t full) {
    constexpr uint32_t kRowBytes = kDim * 2;
    const PrefillItem& item = ahead_.item();
    const int row = thread_ % kTileTokens64, rows = min(item.rows - ahead_.first_row(), kTileTokens64);
    if (thread_ == 0) BarrierExpect(full, 2 * static_cast<uint32_t>(rows) * kRowBytes);
    if (row < rows) {
      const uint16_t* from = (thread_ < kTileTokens64 ? p_.layer.k : p_.layer.v) +
                             (item.row_begin + ahead_.first_row() + row) * p_.layer.kv_stride +
                             item.kv_head * kDim;
      BulkLoad(to + static_cast<uint32_t>(thread_) * kRowBytes, from, kRowBytes, full);
    }
    __syncwarp();
  }

  // Returns how many tokens of the tile are valid.
  __device__ __forceinline__ int Fill(const Walk& walk, int raw_stage, uint32_t tile) {
    const uint32_t raw = base_ + L::kRaw + raw_stage * L::kRawBytes;
    if (!walk.is_block()) {
      if constexpr (kKeys) {
        RowsToKeys<kDim>(raw, tile);
      } else {
        RowsToValues<kDim>(raw + kTileTokens64 * kDim * 2,
                           min(walk.item().rows - walk.first_row(), kTileTokens64), tile);
      }
      return kTileTokens64;
    }
    const uint32_t what = LoadShared4(base_ + L::kRawBlocks + raw_stage * 4);
    const int capacity = static_cast<int>(what >> 8 & 0xff), k_bits = static_cast<int>(what >> 16 & 0xff);
    if constexpr (kKeys) {
      ExpandKeysOf<kDim>(p_.codec, k_bits, raw, capacity / 16, tile, thread_);
    } else {
      ExpandValuesOf<kDim>(p_.codec, static_cast<int>(what >> 24),
                           raw + SideSize(p_.codec, kDim, k_bits, capacity), capacity / 16, tile, thread_);
    }
    return static_cast<int>(what & 0xff);
  }
  // What this warp has written counts once the other warps have said so, too.
  __device__ __forceinline__ void Arrive(int barriers, int stage) {
    __syncwarp();
    if (thread_ % 32 == 0) BarrierArrive(base_ + barriers + stage * 8);
  }

  const PrefillParams& p_;
  const uint32_t base_;
  const int group_;
  int thread_;  // in the warpgroup
  Walk ahead_;
  Ring<kRawStages> ahead_ring_;
  uint2 block_ = {};  // each lane knows one of the next 32
};

// One thread's share of a tile of queries: rows g and g + 8 of its warp's 16, columns 8j + 2t and the next.
template <int kDim>
class Consumer {
 public:
  __device__ __forceinline__ Consumer(const PrefillParams& p, uint32_t shared, int group)
      : p_(p), base_(shared), group_(group) {}

  __device__ __forceinline__ void Run() {
    for (int index = static_cast<int>(blockIdx.x);; index += static_cast<int>(gridDim.x)) {
      const PrefillItem item = LoadItem(p_, index);
      if (item.rows == 0) return;
      Begin(item);
      const int tiles = item.blocks + TilesOfRows(LastRow(item, group_));
      // Scores of the first tile.
      Ring<kStages> keys = ring_, values = ring_;
      MultiplyKeys(keys.stage, keys.parity);
      WgmmaWait<0>();
      Pin(scores_);
      Softmax(item, 0, keys.stage);
      Free(L::kKeysFree, keys.stage);
      Scale();
      keys.Advance();
      for (int tile = 1; tile < tiles; ++tile) {
        PackWeights();
        MultiplyKeys(keys.stage, keys.parity);
        MultiplyValues(values.stage, values.parity);
        WgmmaWait<1>();
        Pin(scores_);
        Softmax(item, tile, keys.stage);
        Free(L::kKeysFree, keys.stage);
        WgmmaWait<0>();
        Pin(out_);
        Free(L::kValuesFree, values.stage);
        Scale();
        keys.Advance();
        values.Advance();
      }
      PackWeights();
      MultiplyValues(values.stage, values.parity);
      WgmmaWait<0>();
      Pin(out_);
      Free(L::kValuesFree, values.stage);
      values.Advance();
      ring_ = values;
      Finish(item);
    }
  }

 private:
  using L = SharedLayout<kDim>;
  static constexpr int kSteps = kDim / 16;
  static constexpr float kRaise = 8.0f;  // the maximum is raised when weights would pass 2^8

  __device__ __forceinline__ void Begin(const PrefillItem& item) {
    const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
    const int first = item.first + static_cast<int>(threadIdx.x) / 32 * 16 + g;
    const int queries = item.rows * group_;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int query = first + 8 * h;
      valid_[h] = query < queries;
      const int of = min(query, queries - 1);
      row_[h] = of / group_;
      head_[h] = item.kv_head * group_ + of % group_;
      const uint16_t* q = p_.layer.q + (item.row_begin + row_[h]) * p_.layer.q_stride + head_[h] * kDim;
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

  __device__ __forceinline__ void MultiplyKeys(int stage, uint32_t parity) {
    BarrierWait(base_ + L::kKeysFull + stage * 8, parity);
    const uint64_t keys = WgmmaDescriptor(base_ + L::kKeys + stage * L::kTileBytes);
    Pin(scores_);
    WgmmaFence();
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      Wgmma(scores_, queries_[s][0], queries_[s][1], queries_[s][2], queries_[s][3],
            keys + s / 4 * (8192 / 16) + s % 4 * 2, s != 0);
    }
    WgmmaCommit();
  }
  __device__ __forceinline__ void MultiplyValues(int stage, uint32_t parity) {
    BarrierWait(base_ + L::kValuesFull + stage * 8, parity);
    const uint64_t values = WgmmaDescriptor(base_ + L::kValues + stage * L::kTileBytes);
    Pin(out_);
    WgmmaFence();
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      Wgmma(out_, weights_[s][0], weights_[s][1], weights_[s][2], weights_[s][3], values + s * 2, 1);
    }
    WgmmaCommit();
  }
  __device__ __forceinline__ void Free(int barriers, int stage) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) BarrierArrive(base_ + barriers + stage * 8);
  }

  // Scores to weights 2^(score - maximum), packed into next_; factor_ is what the output is to be multiplied
  // by.
  __device__ __forceinline__ void Softmax(const PrefillItem& item, int tile, int stage) {
    const int t = threadIdx.x & 3;
    // One lane reads, because one lane says that the stage is free.
    int tokens = 0;
    if (threadIdx.x % 32 == 0) tokens = static_cast<int>(LoadShared4(base_ + L::kTokens + stage * 4));
    tokens = __shfl_sync(~0u, tokens, 0);
    const int row_tile = tile - item.blocks;
    if (tokens < kTileTokens64 || row_tile >= 0) {
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
    float most[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float x = scores_[h * 2];
#pragma unroll
      for (int j = 0; j < 8; ++j) {
#pragma unroll
        for (int c = 0; c < 2; ++c) x = fmaxf(x, scores_[j * 4 + h * 2 + c]);
      }
      x = fmaxf(x, __shfl_xor_sync(~0u, x, 1));
      most[h] = fmaxf(x, __shfl_xor_sync(~0u, x, 2)) * p_.scale_log2;
      factor_[h] = 1;
    }
    raised_ = __any_sync(~0u, most[0] > max_[0] + kRaise || most[1] > max_[1] + kRaise);
    if (raised_) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const float next = fmaxf(max_[h], most[h]);
        factor_[h] = max_[h] == -INFINITY ? 0.0f : Exp2(max_[h] - next);
        sum_[h] *= factor_[h];
        max_[h] = next;
      }
    }
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float max = max_[h] == -INFINITY ? 0.0f : max_[h];
      float sum = 0;
#pragma unroll
      for (int j = 0; j < 8; ++j) {
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          float& x = scores_[j * 4 + h * 2 + c];
          x = Exp2(fmaf(x, p_.scale_log2, -max));
          sum += x;
        }
      }
      sum_[h] += sum;
    }
  }
  __device__ __forceinline__ void Scale() {
    if (!raised_) return;
#pragma unroll
    for (int j = 0; j < kDim / 8; ++j) {
#pragma unroll
      for (int c = 0; c < 4; ++c) out_[j * 4 + c] *= factor_[c / 2];
    }
  }
  // Not while products that read weights_ are in flight.
  __device__ __forceinline__ void PackWeights() {
#pragma unroll
    for (int j = 0; j < 8; ++j) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        weights_[j / 2][j % 2 * 2 + h] = PackF16(scores_[j * 4 + h * 2], scores_[j * 4 + h * 2 + 1]);
      }
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
      if (!valid_[h]) continue;
      uint16_t* out =
          p_.layer.out + (int64_t{item.row_begin + row_[h]} * p_.num_heads + head_[h]) * kDim + 2 * t;
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
  const int group_;
  Ring<kStages> ring_;
  uint32_t queries_[kSteps][4];
  uint32_t weights_[4][4];
  float scores_[32] = {};
  float out_[kDim / 2];
  float max_[2], sum_[2], factor_[2];
  int row_[2], head_[2];
  bool valid_[2], raised_ = false;
};

template <int kDim>
__global__ void __launch_bounds__(kThreads, 1) PrefillKernel(const __grid_constant__ PrefillParams p) {
  using L = SharedLayout<kDim>;
  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t base = SharedAddress(shared);
  const int group = p.num_heads / p.num_kv_heads;
  if (threadIdx.x == 0) {
    for (int i = 0; i < kRawStages; ++i) {
      BarrierInit(base + L::kRawFull + i * 8, 1);
      BarrierInit(base + L::kRawFree + i * 8, 2 * kExpandThreads);
    }
    for (int i = 0; i < kStages; ++i) {
      BarrierInit(base + L::kKeysFull + i * 8, 4);
      BarrierInit(base + L::kValuesFull + i * 8, 4);
      BarrierInit(base + L::kKeysFree + i * 8, 8);  // warps of both consumers
      BarrierInit(base + L::kValuesFree + i * 8, 8);
    }
    FenceBarrierInit();
    FenceProxyAsync();
  }
  __syncthreads();
  const int warpgroup = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 128, 0);
  if (warpgroup < 2) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 176;");
    Consumer<kDim>(p, base, group).Run();
  } else {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 80;");
    if (warpgroup == 2) {
      Producer<kDim, Side::kK>(p, base, group).Run();
    } else {
      Producer<kDim, Side::kV>(p, base, group).Run();
    }
  }
}

template <int kDim>
void Launch(const PrefillParams& params, int blocks, cudaStream_t stream) {
  constexpr int kBytes = SharedLayout<kDim>::kBytes;
  static const bool configured = [] {
    CUDA_OK(cudaFuncSetAttribute(PrefillKernel<kDim>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
    return true;
  }();
  static_cast<void>(configured);
  PrefillKernel<kDim><<<static_cast<unsigned>(blocks), kThreads, kBytes, stream>>>(params);
  CUDA_OK(cudaGetLastError());
}

}  // namespace

void LaunchPrefillSm90(const PrefillParams& params, int head_dim, int blocks, cudaStream_t stream) {
  if (head_dim == 128) {
    Launch<128>(params, blocks, stream);
  } else {
    Launch<64>(params, blocks, stream);
  }
}

}  // namespace triaxial::cuda
