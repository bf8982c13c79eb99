// Prefill attention: many query rows over cached blocks of any format, then causally over the rows of the
// step.
//
// Two thread blocks that share data (a cluster) own 256 queries (rows and heads of a group) of a KV head, 128
// each, and walk over tiles of 64 tokens. The first expands the keys of every tile, the other the values, to
// FP16 in the order of tensor cores (prefill_tiles.cuh), and copies them to the other's shared memory: what
// is stored is expanded once for 256 queries, on chip. In a thread block, two warpgroups take turns in that;
// each brings its blocks by bulk copies, as they are stored, some tiles ahead. Two others, 64 queries each,
// multiply (wgmma) and keep maximum, sum and output in registers; the scores of a tile are computed while the
// values of the one before are multiplied. The rows of the step are BF16 in memory anyway; a kernel ahead
// makes tiles of them there (MakeRowTiles).
#include <algorithm>

#include "ops/cuda/device.h"
#include "ops/cuda/prefill_attention_sm90.h"
#include "ops/cuda/prefill_tiles.cuh"
#include "ops/cuda/wgmma.cuh"

namespace triaxial::cuda {
namespace {

constexpr int kTileTokens64 = 64;
constexpr int kExpanders = 2;            // warpgroups
constexpr int kStages = 2 * kExpanders;  // a multiple: a stage is one warpgroup's
constexpr int kRawStages = 3;            // of each warpgroup
constexpr int kThreads = (2 + kExpanders) * 128;
constexpr int kPair = 2;  // thread blocks of a cluster: the first expands the K side, the second V
// Hardware barriers: two by which consumers take turns, one of each warpgroup that expands.
constexpr int kTurn = 1, kExpanded = 3;

__device__ __forceinline__ constexpr int BlockOf(Side side) { return side == Side::kK ? 0 : 1; }

template <int kDim>
struct SharedLayout {
  static constexpr int kTileBytes = kTileTokens64 * kDim * 2;
  static constexpr int kTiles = 0;  // of keys, then of values
  static constexpr int kRaw = kTiles + 2 * kStages * kTileBytes;
  static constexpr int kRaws = kExpanders * kRawStages;
  // Barriers, 8 bytes each. Only the tiles that a thread block expands itself are freed by arrivals here.
  static constexpr int kFull = kRaw + kRaws * kTileBytes;  // of keys, then of values
  static constexpr int kFree = kFull + 2 * kStages * 8;
  static constexpr int kRawFull = kFree + kStages * 8;
  static constexpr int kRawBlocks = kRawFull + kRaws * 8;  // the word of PrefillBlock after unit_row
  static constexpr int kBytes = kRawBlocks + kRaws * 4;

  __device__ static uint32_t Tile(Side side, int stage) {
    return static_cast<uint32_t>(kTiles + (BlockOf(side) * kStages + stage) * kTileBytes);
  }
  __device__ static uint32_t Full(Side side, int stage) {
    return static_cast<uint32_t>(kFull + (BlockOf(side) * kStages + stage) * 8);
  }
};

// A stage of a ring and the parity of its barriers.
template <int kCount>
struct Ring {
  __device__ __forceinline__ explicit Ring(int first = 0) : stage(first) {}
  __device__ __forceinline__ void Advance(int by = 1) {
    stage += by;
    if (stage >= kCount) stage -= kCount, parity ^= 1;
  }
  int stage;
  uint32_t parity = 0;
};

__device__ __forceinline__ PrefillItem LoadItem(const PrefillParams& p, int index) {
  const auto* words = reinterpret_cast<const int4*>(p.items + index);
  const int4 a = words[0], b = words[1];
  return {.row_begin = a.x,
          .rows = a.y,
          .first = a.z,
          .kv_head = a.w,
          .table = b.x,
          .blocks = b.y,
          .row_tile = b.z};
}
// Tiles that the queries of an item see: its blocks, then those with rows of the step up to its last one.
__device__ __forceinline__ int TilesOf(const PrefillItem& item, int group) {
  const int last_row = min(item.rows - 1, (item.first + kPrefillItemQueries - 1) / group);
  return item.blocks + last_row / kTileTokens64 + 1;
}
__device__ __forceinline__ int FirstItem() { return static_cast<int>(blockIdx.x) / kPair; }
__device__ __forceinline__ int ItemStep() { return static_cast<int>(gridDim.x) / kPair; }

template <int kDim>
__device__ __forceinline__ uint8_t* RowTile(const PrefillParams& p, int tile, int kv_head) {
  return p.row_tiles + (int64_t{tile} * p.num_kv_heads + kv_head) * (2 * SharedLayout<kDim>::kTileBytes);
}

// One thread block for each tile of rows and KV head. One warpgroup makes the keys, one the values.
template <int kDim>
__global__ void __launch_bounds__(2 * kExpandThreads) MakeRowTiles(const __grid_constant__ PrefillParams p) {
  constexpr uint32_t kRowBytes = kDim * 2, kTileBytes = SharedLayout<kDim>::kTileBytes;
  extern __shared__ __align__(1024) uint8_t shared[];
  __shared__ __align__(8) uint64_t barrier_storage;
  const uint32_t tiles = SharedAddress(shared), raw = tiles + 2 * kTileBytes;
  const uint32_t barrier = SharedAddress(&barrier_storage);
  const int thread = static_cast<int>(threadIdx.x), row = thread % kTileTokens64;
  const int kv_head = static_cast<int>(blockIdx.y);
  if (thread == 0) {
    BarrierInit(barrier, 1);
    FenceBarrierInit();
    FenceProxyAsync();
  }
  __syncthreads();
  const PrefillBlock what = p.table[p.row_table + static_cast<int>(blockIdx.x)];
  if (thread == 0) BarrierExpect(barrier, 2 * what.tokens * kRowBytes);
  if (thread < 2 * kTileTokens64 && row < what.tokens) {
    const uint16_t* from = (thread < kTileTokens64 ? p.layer.k : p.layer.v) +
                           (int64_t{what.unit_row} + row) * p.layer.kv_stride + kv_head * kDim;
    BulkLoad(raw + static_cast<uint32_t>(thread) * kRowBytes, from, kRowBytes, barrier);
  }
  BarrierWait(barrier, 0);
  if (thread < kExpandThreads) {
    RowsToKeys<kDim>(raw, what.tokens, tiles, thread);
  } else {
    RowsToValues<kDim>(raw + kTileBytes, what.tokens, tiles + kTileBytes, thread - kExpandThreads);
  }
  FenceProxyAsync();
  __syncthreads();
  if (thread == 0) {
    BulkStore(RowTile<kDim>(p, static_cast<int>(blockIdx.x), kv_head), tiles, 2 * kTileBytes);
    WaitForBulkStores();
  }
}

// A warpgroup that fills every second tile of one side, for both thread blocks.
template <int kDim, Side kSide>
class Expander {
 public:
  __device__ __forceinline__ Expander(const PrefillParams& p, uint32_t shared, int group, int warpgroup)
      : p_(p),
        base_(shared),
        other_(SharedOfBlock(shared, 1 - BlockOf(kSide))),
        group_(group),
        warpgroup_(warpgroup),
        thread_(static_cast<int>(threadIdx.x) % kExpandThreads),
        place_(kSide, thread_) {}

  __device__ __forceinline__ void Run() {
    if (thread_ == 0) {
      BeginAhead(FirstItem());
      ahead_tile_ = warpgroup_;
      FindBlock();
#pragma unroll 1
      for (int i = 0; i < kRawStages; ++i) Bring(i);
    }
    __syncwarp();
    Ring<kStages> ring(warpgroup_);
    Ring<kRawStages> raw_ring;
    int tile = warpgroup_;
    for (int index = FirstItem(); index < p_.item_count; index += ItemStep()) {
      const PrefillItem item = LoadItem(p_, index);
      const int tiles = TilesOf(item, group_);
#pragma unroll 1
      for (; tile < tiles; tile += kExpanders, ring.Advance(kExpanders)) {
        if (tile < item.blocks) {
          ExpandBlock(ring, raw_ring);
        } else {
          CopyRows(item, tile, ring);
        }
        __syncwarp();
      }
      tile -= tiles;
    }
  }

 private:
  using L = SharedLayout<kDim>;

  __device__ __forceinline__ void ExpandBlock(const Ring<kStages>& ring, Ring<kRawStages>& raw_ring) {
    const int stage = warpgroup_ * kRawStages + raw_ring.stage;
    const uint32_t raw = base_ + L::kRaw + stage * L::kTileBytes, to = base_ + L::Tile(kSide, ring.stage);
    BarrierWait(base_ + L::kRawFull + stage * 8, raw_ring.parity);
    BarrierWait(base_ + L::kFree + ring.stage * 8, ring.parity ^ 1);
    const uint32_t what = LoadShared4(base_ + L::kRawBlocks + stage * 4);
    const uint32_t token_tiles = what >> 12 & 0xf;  // capacity / 16
    const uint32_t bits = kSide == Side::kK ? what >> 16 & 0xff : what >> 24;
    ExpandSide<kDim, kSide>(p_.codec, static_cast<int>(bits), raw, static_cast<int>(token_tiles), to, place_);
    FenceProxyAsync();
    NamedBarrierSync<kExpandThreads>(kExpanded + warpgroup_);
    if (thread_ == 0) {
      BarrierArrive(base_ + L::Full(kSide, ring.stage));
      CopyToBlock(other_ + L::Tile(kSide, ring.stage), to, L::kTileBytes,
                  other_ + L::Full(kSide, ring.stage));
      Bring(raw_ring.stage);
    }
    raw_ring.Advance();
  }
  __device__ __forceinline__ void CopyRows(const PrefillItem& item, int tile, const Ring<kStages>& ring) {
    BarrierWait(base_ + L::kFree + ring.stage * 8, ring.parity ^ 1);  // all must see every phase
    if (thread_ != 0) return;
    const uint32_t full = base_ + L::Full(kSide, ring.stage);
    const uint8_t* from = RowTile<kDim>(p_, item.row_tile + tile - item.blocks, item.kv_head);
    BarrierExpect(full, L::kTileBytes);
    BulkLoadToBlocks(base_ + L::Tile(kSide, ring.stage), from + BlockOf(kSide) * L::kTileBytes, L::kTileBytes,
                     full, (1 << kPair) - 1);
  }

  // One thread looks ahead: the next blocks of this warpgroup's tiles.
  __device__ __forceinline__ void BeginAhead(int index) {
    ahead_index_ = index;
    if (index >= p_.item_count) return;
    ahead_ = LoadItem(p_, index);
    ahead_tiles_ = TilesOf(ahead_, group_);
  }
  // From ahead_tile_ on, which may lie in a later item.
  __device__ __forceinline__ void FindBlock() {
    while (ahead_index_ < p_.item_count) {
      if (ahead_tile_ < ahead_.blocks) {
        ahead_block_ = __ldg(reinterpret_cast<const uint2*>(p_.table) + ahead_.table + ahead_tile_);
        return;
      }
      if (ahead_tile_ < ahead_tiles_) {
        ahead_tile_ += kExpanders;
      } else {
        ahead_tile_ -= ahead_tiles_;
        BeginAhead(ahead_index_ + ItemStep());
      }
    }
  }
  __device__ __forceinline__ void Bring(int raw_stage) {
    if (ahead_index_ >= p_.item_count) return;
    const int stage = warpgroup_ * kRawStages + raw_stage;
    const uint32_t full = base_ + L::kRawFull + stage * 8, what = ahead_block_.y;
    const int capacity = static_cast<int>(what >> 8 & 0xff);
    const int k = SideSize(p_.codec, kDim, static_cast<int>(what >> 16 & 0xff), capacity);
    const int v = SideSize(p_.codec, kDim, static_cast<int>(what >> 24), capacity);
    const uint8_t* from = p_.layer.arena +
                          static_cast<int64_t>(ahead_block_.x) * (p_.num_kv_heads * kUnitBytes) +
                          ahead_.kv_head * (k + v) + (kSide == Side::kK ? 0 : k);
    const auto bytes = static_cast<uint32_t>(kSide == Side::kK ? k : v);
    StoreShared4(base_ + L::kRawBlocks + stage * 4, what);
    BarrierExpect(full, bytes);
    BulkLoad(base_ + L::kRaw + stage * L::kTileBytes, from, bytes, full);
    ahead_tile_ += kExpanders;
    FindBlock();
  }

  const PrefillParams& p_;
  const uint32_t base_, other_;
  const int group_, warpgroup_, thread_;
  const ExpandPlace place_;
  PrefillItem ahead_ = {};
  int ahead_index_ = 0, ahead_tile_ = 0, ahead_tiles_ = 0;
  uint2 ahead_block_ = {};
};

// One thread's share of a tile of queries: rows g and g + 8 of its warp's 16, columns 8j + 2t and the next.
template <int kDim>
class Consumer {
 public:
  // `rank`: of the two thread blocks.
  __device__ __forceinline__ Consumer(const PrefillParams& p, uint32_t shared, int group, int warpgroup,
                                      int rank)
      : p_(p),
        base_(shared),
        free_{SharedOfBlock(shared + L::kFree, 0), SharedOfBlock(shared + L::kFree, 1)},
        group_(group),
        warpgroup_(warpgroup),
        rank_(rank) {}

  __device__ __forceinline__ void Run() {
    if (warpgroup_ == 1) NamedBarrierArrive<256>(kTurn);  // the first turn is the other's
    for (int index = FirstItem(); index < p_.item_count; index += ItemStep()) {
      const PrefillItem item = LoadItem(p_, index);
      Begin(item);
      const int tiles = TilesOf(item, group_);
      uint32_t even[4][4], odd[4][4];
      WaitFor(Side::kK, keys_);
      MultiplyKeys();
      const bool mask = NeedsMask(item, 0);
      WgmmaWait<0>();
      Pin(scores_);
      Free(Side::kK, keys_);
      Softmax(item, 0, mask, even);
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
    first_ = item.first + (rank_ * 8 + static_cast<int>(threadIdx.x) / 32) * 16 + g;
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
    const bool mask = NeedsMask(item, tile);
    WaitFor(Side::kK, keys_);
    NamedBarrierSync<256>(kTurn + warpgroup_);
    MultiplyKeys();
    WaitFor(Side::kV, values_);
    MultiplyValues(now);
    NamedBarrierArrive<256>(kTurn + 1 - warpgroup_);
    WgmmaWait<1>();
    Pin(scores_);
    Free(Side::kK, keys_);
    Softmax(item, tile, mask, next);
    WgmmaWait<0>();
    Pin(out_);
    Pin(now);
    Free(Side::kV, values_);
    if (raised_) Scale();
  }
  __device__ __forceinline__ void MultiplyLast(uint32_t (&weights)[4][4]) {
    WaitFor(Side::kV, values_);
    MultiplyValues(weights);
    WgmmaWait<0>();
    Pin(out_);
    Pin(weights);
    Free(Side::kV, values_);
  }
  __device__ __forceinline__ void MultiplyKeys() {
    const uint64_t keys = WgmmaDescriptor(base_ + L::Tile(Side::kK, keys_.stage));
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
    const uint64_t values = WgmmaDescriptor(base_ + L::Tile(Side::kV, values_.stage));
    Pin(out_);
    WgmmaFence();
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      Wgmma(out_, weights[s][0], weights[s][1], weights[s][2], weights[s][3], values + s * 2, 1);
    }
    WgmmaCommit();
  }
  // A tile that the other thread block copies here is announced anew as soon as it has come: long before that
  // block can know that the stage is free.
  __device__ __forceinline__ void WaitFor(Side side, const Ring<kStages>& ring) {
    const uint32_t full = base_ + L::Full(side, ring.stage);
    BarrierWait(full, ring.parity);
    if (threadIdx.x == 0 && BlockOf(side) != rank_) BarrierExpect(full, L::kTileBytes);
  }
  __device__ __forceinline__ void Free(Side side, Ring<kStages>& ring) {
    __syncwarp();
    if (threadIdx.x % 32 == 0) BarrierArriveAtBlock(free_[BlockOf(side)] + ring.stage * 8);
    ring.Advance();
  }
  // Whether some tokens of a tile are none or too late for some query. To be asked tile by tile.
  __device__ __forceinline__ bool NeedsMask(const PrefillItem& item, int tile) {
    if (tile % 32 == 0) {
      const int mine = tile + (threadIdx.x & 31);
      tokens_ = mine < item.blocks ? p_.table[item.table + mine].tokens : 0;
      masked_ = __ballot_sync(~0u, tokens_ < kTileTokens64);
    }
    return (masked_ >> tile % 32 & 1) != 0;
  }

  // Scores to weights 2^(score - maximum). Whether the maximum is still good enough shows in their sum, so
  // that it is searched only when it is not; then factor_ is what the output is to be multiplied by.
  __device__ __forceinline__ void Softmax(const PrefillItem& item, int tile, bool mask,
                                          uint32_t (&weights)[4][4]) {
    if (mask) Mask(tile - item.blocks, __shfl_sync(~0u, tokens_, tile % 32));
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
  const uint32_t base_, free_[kPair];
  const int group_, warpgroup_, rank_;
  Ring<kStages> keys_, values_;
  uint32_t queries_[kSteps][4];
  float scores_[32] = {};
  float out_[kDim / 2];
  float max_[2], sum_[2], factor_[2];
  int first_, row_[2];
  // Of 32 tiles: the tokens of one in each lane, and a bit for each.
  int tokens_ = 0;
  uint32_t masked_ = 0;
  bool raised_ = false;
};

template <int kDim>
__global__ void __cluster_dims__(kPair, 1, 1) __launch_bounds__(kThreads, 1)
    PrefillKernel(const __grid_constant__ PrefillParams p) {
  using L = SharedLayout<kDim>;
  extern __shared__ __align__(1024) uint8_t shared[];
  const uint32_t base = SharedAddress(shared);
  const int group = p.num_heads / p.num_kv_heads, rank = BlockOfCluster();
  if (threadIdx.x == 0) {
    for (int i = 0; i < kStages; ++i) {
      BarrierInit(base + L::Full(Side::kK, i), 1);
      BarrierInit(base + L::Full(Side::kV, i), 1);
      BarrierInit(base + L::kFree + i * 8, kPair * 8);  // warps of all consumers
    }
    for (int i = 0; i < L::kRaws; ++i) BarrierInit(base + L::kRawFull + i * 8, 1);
    FenceBarrierInit();
    FenceProxyAsync();
    const Side of_other = rank == BlockOf(Side::kK) ? Side::kV : Side::kK;
    for (int i = 0; i < kStages; ++i) BarrierExpect(base + L::Full(of_other, i), L::kTileBytes);
  }
  ClusterSync();
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32, 0);
  if (warp < 8) {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 200;");
    Consumer<kDim>(p, base, group, warp / 4, rank).Run();
  } else {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 56;");
    if (rank == BlockOf(Side::kK)) {
      Expander<kDim, Side::kK>(p, base, group, warp / 4 - 2).Run();
    } else {
      Expander<kDim, Side::kV>(p, base, group, warp / 4 - 2).Run();
    }
  }
  ClusterSync();  // nobody leaves while the other may still write or arrive here
}

template <int kDim>
void Launch(const PrefillParams& params, int blocks, cudaStream_t stream) {
  constexpr int kBytes = SharedLayout<kDim>::kBytes, kRowBytes = 4 * SharedLayout<kDim>::kTileBytes;
  static const bool configured = [] {
    CUDA_OK(cudaFuncSetAttribute(PrefillKernel<kDim>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
    CUDA_OK(cudaFuncSetAttribute(MakeRowTiles<kDim>, cudaFuncAttributeMaxDynamicSharedMemorySize, kRowBytes));
    return true;
  }();
  static_cast<void>(configured);
  const dim3 row_tiles(static_cast<unsigned>(params.row_tile_count),
                       static_cast<unsigned>(params.num_kv_heads));
  MakeRowTiles<kDim><<<row_tiles, 2 * kExpandThreads, kRowBytes, stream>>>(params);
  CUDA_OK(cudaGetLastError());
  const int pairs = std::min(blocks / kPair, params.item_count);
  PrefillKernel<kDim><<<static_cast<unsigned>(pairs * kPair), kThreads, kBytes, stream>>>(params);
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
