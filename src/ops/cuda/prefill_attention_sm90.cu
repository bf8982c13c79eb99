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
// Named barriers: by those of kReadKeys (and kReadValues) a warpgroup says that it has read a raw stage, by
// those of kTurn consumers take turns.
constexpr int kReadKeys = 1, kReadValues = kReadKeys + kRawStages, kTurn = kReadValues + kRawStages,
              kRowsOfKeys = kTurn + 2, kRowsOfValues = kRowsOfKeys + 1;

template <int kDim>
struct SharedLayout {
  static constexpr int kTileBytes = kTileTokens64 * kDim * 2;
  static constexpr int kRawBytes = kTileBytes;  // a side of a BF16 block, the largest
  static constexpr int kKeys = 0;
  static constexpr int kValues = kKeys + kStages * kTileBytes;
  static constexpr int kRawKeys = kValues + kStages * kTileBytes;
  static constexpr int kRawValues = kRawKeys + kRawStages * kRawBytes;
  // Barriers, 8 bytes each. Then what the stages hold.
  static constexpr int kRawKeysFull = kRawValues + kRawStages * kRawBytes;
  static constexpr int kRawValuesFull = kRawKeysFull + kRawStages * 8;
  static constexpr int kKeysFull = kRawValuesFull + kRawStages * 8;
  static constexpr int kKeysFree = kKeysFull + kStages * 8;
  static constexpr int kValuesFull = kKeysFree + kStages * 8;
  static constexpr int kValuesFree = kValuesFull + kStages * 8;
  static constexpr int kRawKeysBlocks = kValuesFree + kStages * 8;  // the word of PrefillBlock after unit_row
  static constexpr int kRawValuesBlocks = kRawKeysBlocks + kRawStages * 4;
  static constexpr int kTokens = kRawValuesBlocks + kRawStages * 4;  // valid tokens of a tile
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

// A warpgroup that fills the tiles of keys, or those of values, of all items of this thread block. What they
// are made of is brought into shared memory as it lies in global memory, three tiles ahead; warps take turns,
// because bringing a block costs one warp as much as expanding half a tile.
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
#pragma unroll 1
    for (int i = 0; i < kRawStages - 1; ++i) Bring(i);
    Ring<kStages> ring;
    int number = 0;
#pragma unroll 1
    for (Walk walk(p_, group_); !walk.done(); walk.Advance(), ++number) {
      Bring(number + kRawStages - 1);
      const uint32_t raw_stage = static_cast<uint32_t>(number) % kRawStages;
      BarrierWait(base_ + kRawFull + raw_stage * 8, static_cast<uint32_t>(number) / kRawStages & 1);
      BarrierWait(base_ + (kKeys ? L::kKeysFree : L::kValuesFree) + ring.stage * 8, ring.parity ^ 1);
      // Rows are spread over the threads otherwise than blocks; what another thread wrote to this stage is
      // over, because the stage is free, but racecheck does not follow one lane that speaks for its warp.
      if (!walk.is_block()) NamedBarrierSync<kExpandThreads>(kKeys ? kRowsOfKeys : kRowsOfValues);
      const int tokens = Fill(walk, raw_stage, ring.stage);
      if (kKeys && thread_ == 0) {
        StoreShared4(base_ + L::kTokens + ring.stage * 4, static_cast<uint32_t>(tokens));
      }
      FenceProxyAsync();
      // What this warp has written counts once the other warps have said so, too.
      __syncwarp();
      if (thread_ % 32 == 0) {
        BarrierArrive(base_ + (kKeys ? L::kKeysFull : L::kValuesFull) + ring.stage * 8);
      }
      ring.Advance();
    }
  }

 private:
  using L = SharedLayout<kDim>;
  static constexpr bool kKeys = kSide == Side::kK;
  static constexpr int kRaw = kKeys ? L::kRawKeys : L::kRawValues;
  static constexpr int kRawFull = kKeys ? L::kRawKeysFull : L::kRawValuesFull;
  static constexpr int kRawBlocks = kKeys ? L::kRawKeysBlocks : L::kRawValuesBlocks;

  // Brings the block or rows of tile `number`, the next.
  __device__ __forceinline__ void Bring(int number) {
    if (ahead_.done()) return;
    const int stage = static_cast<int>(static_cast<uint32_t>(number) % kRawStages);
    const int barrier = (kKeys ? kReadKeys : kReadValues) + stage;
    const bool used = number >= kRawStages;
    if (ahead_.is_block()) {
      const int lane = thread_ & 31, of = ahead_.tile() % 32;
      const PrefillItem& item = ahead_.item();
      if (of == 0 && ahead_.tile() + lane < item.blocks) {
        block_ = __ldg(reinterpret_cast<const uint2*>(p_.table) + item.table + ahead_.tile() + lane);
      }
      if (stage == static_cast<int>(static_cast<uint32_t>(thread_) / 32)) {
        if (used) NamedBarrierSync<kExpandThreads>(barrier);
        const uint32_t unit_row = __shfl_sync(~0u, block_.x, of), what = __shfl_sync(~0u, block_.y, of);
        if (lane == 0) BringBlock(item.kv_head, unit_row, what, stage);
        __syncwarp();  // else the lanes would go on apart
      } else if (used) {
        NamedBarrierArrive<kExpandThreads>(barrier);
      }
    } else {
      if (used) NamedBarrierSync<kExpandThreads>(barrier);
      BringRow(stage);
    }
    ahead_.Advance();
  }
  // One copy of a side of a head of a block, `what` of which (tokens, capacity, bits of keys, of values) is
  // put beside it.
  __device__ __forceinline__ void BringBlock(int kv_head, uint32_t unit_row, uint32_t what, int stage) {
    const int capacity = static_cast<int>(what >> 8 & 0xff);
    const int k = SideSize(p_.codec, kDim, static_cast<int>(what >> 16 & 0xff), capacity);
    const int v = SideSize(p_.codec, kDim, static_cast<int>(what >> 24), capacity);
    const uint8_t* from =
        p_.layer.arena + static_cast<uint64_t>(unit_row) * static_cast<uint32_t>(p_.num_kv_heads * kUnitBytes) +
        static_cast<uint32_t>(kv_head * (k + v) + (kKeys ? 0 : k));
    const auto bytes = static_cast<uint32_t>(kKeys ? k : v);
    StoreShared4(base_ + kRawBlocks + stage * 4, what);
    BarrierExpect(base_ + kRawFull + stage * 8, bytes);
    BulkLoad(base_ + kRaw + stage * L::kRawBytes, from, bytes, base_ + kRawFull + stage * 8);
  }
  __device__ __forceinline__ void BringRow(int stage) {
    constexpr uint32_t kRowBytes = kDim * 2;
    const PrefillItem& item = ahead_.item();
    const uint32_t full = base_ + kRawFull + stage * 8;
    const int rows = min(item.rows - ahead_.first_row(), kTileTokens64);
    if (thread_ == 0) BarrierExpect(full, static_cast<uint32_t>(rows) * kRowBytes);
    if (thread_ < rows) {
      const uint16_t* from = (kKeys ? p_.layer.k : p_.layer.v) +
                             (item.row_begin + ahead_.first_row() + thread_) * p_.layer.kv_stride +
                             item.kv_head * kDim;
      BulkLoad(base_ + kRaw + stage * L::kRawBytes + static_cast<uint32_t>(thread_) * kRowBytes, from,
               kRowBytes, full);
    }
    __syncwarp();
  }

  // Returns how many tokens of the tile are valid.
  __device__ __forceinline__ int Fill(const Walk& walk, uint32_t raw_stage, int stage) {
    // Opaque, lest addresses of all formats be computed once and kept in registers that are not there.
    int thread = thread_;
    asm volatile("" : "+r"(thread));
    const uint32_t raw = base_ + kRaw + raw_stage * L::kRawBytes;
    const uint32_t tile = base_ + (kKeys ? L::kKeys : L::kValues) + stage * L::kTileBytes;
    if (!walk.is_block()) {
      if constexpr (kKeys) {
        RowsToKeys<kDim>(raw, tile, thread);
      } else {
        RowsToValues<kDim>(raw, min(walk.item().rows - walk.first_row(), kTileTokens64), tile, thread);
      }
      return kTileTokens64;
    }
    const uint32_t what = LoadShared4(base_ + kRawBlocks + raw_stage * 4);
    const int tiles = static_cast<int>(what >> 12 & 0xf);  // capacity / 16
    if constexpr (kKeys) {
      ExpandKeysOf<kDim>(p_.codec, static_cast<int>(what >> 16 & 0xff), raw, tiles, tile, thread);
    } else {
      ExpandValuesOf<kDim>(p_.codec, static_cast<int>(what >> 24), raw, tiles, tile, thread);
    }
    return static_cast<int>(what & 0xff);
  }

  const PrefillParams& p_;
  const uint32_t base_;
  const int group_;
  int thread_;  // in the warpgroup
  Walk ahead_;
  uint2 block_ = {};  // each lane knows one of the next 32
};

// One thread's share of a tile of queries: rows g and g + 8 of its warp's 16, columns 8j + 2t and the next.
template <int kDim>
class Consumer {
 public:
  __device__ __forceinline__ Consumer(const PrefillParams& p, uint32_t shared, int group, int warpgroup)
      : p_(p), base_(shared), group_(group), warpgroup_(warpgroup) {}

  __device__ __forceinline__ void Run() {
    for (int index = static_cast<int>(blockIdx.x);; index += static_cast<int>(gridDim.x)) {
      const PrefillItem item = LoadItem(p_, index);
      if (item.rows == 0) return;
      Begin(item);
      const int tiles = item.blocks + TilesOfRows(LastRow(item, group_));
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
        Step(item, tile, tile + 1 == tiles, even, odd);
        if (++tile == tiles) {
          MultiplyLast(odd);
          break;
        }
        Step(item, tile, tile + 1 == tiles, odd, even);
        ++tile;
      }
      Finish(item);
    }
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
  __device__ __forceinline__ void Step(const PrefillItem& item, int tile, bool last, uint32_t (&now)[4][4],
                                       uint32_t (&next)[4][4]) {
    BarrierWait(base_ + L::kKeysFull + keys_.stage * 8, keys_.parity);
    BarrierWait(base_ + L::kValuesFull + values_.stage * 8, values_.parity);
#ifndef NO_TURNS
    if (warpgroup_ != 0 || tile != 1) NamedBarrierSync<256>(kTurn + warpgroup_);
#endif
    MultiplyKeys();
    MultiplyValues(now);
#ifndef NO_TURNS
    if (warpgroup_ == 0 || !last) NamedBarrierArrive<256>(kTurn + 1 - warpgroup_);
#endif
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
      uint16_t* out = p_.layer.out +
                      (int64_t{item.row_begin + row_[h]} * p_.num_heads + item.kv_head * group_ +
                       query % group_) * kDim + 2 * t;
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
    for (int i = 0; i < kRawStages; ++i) {
      BarrierInit(base + L::kRawKeysFull + i * 8, 1);
      BarrierInit(base + L::kRawValuesFull + i * 8, 1);
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
    asm volatile("setmaxnreg.inc.sync.aligned.u32 192;");
    Consumer<kDim>(p, base, group, warpgroup).Run();
  } else {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 64;");
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
