// Decode attention: one query row a sequence over its cached blocks, up to 8 query heads of a KV head at a
// time.
//
// Thread blocks of 8 warps, two on a multiprocessor, take items (attention_plan.h) from a queue. Within an
// item every warp works alone on every eighth piece: it keeps three stages of shared memory filled by bulk
// copies, multiplies (decode_tiles.cuh), and holds its own maximum, sum and output. The warps merge at the
// end of the item; splits of a sequence merge through a workspace, done by whichever finishes last.
#include <cfloat>

#include "ops/cuda/decode_attention_sm90.h"
#include "ops/cuda/decode_tiles.cuh"
#include "ops/cuda/device.h"

namespace triaxial::cuda {
namespace {

constexpr int kWarps = kDecodeWarps, kThreads = kWarps * 32, kStages = 3;

// Shared memory: queries, constants, the row's own token, the queue's next item, then the stages; after the
// stages of an item, in their place, what the warps merge.
template <int kDim>
struct SharedLayout {
  static constexpr int kStageBytes = Piece<kDim, 2>::kBytes * 2;  // K and V of k2v2, or a side of the others
  static_assert(Piece<kDim, 4>::kBytes <= kStageBytes && Piece<kDim, 8>::kBytes <= kStageBytes &&
                Piece<kDim, 16>::kBytes <= kStageBytes);
  static constexpr int kQueries = 0;
  static constexpr int kConstants = kQueries + kDim * 16;  // 64 bytes of zeros, 64 bytes of FP16 ones
  static constexpr int kOwnValue = kConstants + 128;       // BF16
  static constexpr int kOwnLogits = kOwnValue + kDim * 2;  // base 2, of each head
  static constexpr int kNext = kOwnLogits + kItemHeads * 4;
  static constexpr int kStageMemory = (kNext + 8 + 127) / 128 * 128;
  static constexpr int kBarriers =
      kStageMemory + kWarps * kStages * kStageBytes;  // 16 bytes: mbarrier, token count
  static constexpr int kBytes = kBarriers + kWarps * kStages * 16;
  static constexpr int kRow = kDim + 4;  // floats of a merged head
  static constexpr int kMergeOut = kStageMemory;
  static constexpr int kMergeSums =
      kMergeOut + kWarps * kItemHeads * kRow * 4;  // (maximum, sum) by warp and head
  static_assert(kMergeSums + kWarps * kItemHeads * 8 <= kBarriers);
};

// 64 bits: address (54), in whose last four bits, which are zero, is the PieceFormat; capacity / 16 - 1 of
// BF16 (2); tokens (8).
struct PieceAddress {
  static constexpr int kCapacityBit = 54, kTokensBit = 56;
  static constexpr uint64_t kFormatMask = 15, kAddressMask = (uint64_t{1} << kCapacityBit) - 1 - kFormatMask;
};
enum PieceFormat : uint32_t { kPiece2 = 0, kPiece42, kPiece4, kPiece8, kPiece16 };

// What an item says of its pieces. Read again where it is needed: kept, it would take registers from the
// products.
struct ItemPieces {
  int kv_head, table, end2, end42, end4, end8, end16, split;
};
__device__ __forceinline__ int4 LoadAgain(const int4* p) {
  int4 v;
  asm volatile("ld.global.nc.v4.s32 {%0,%1,%2,%3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(p));
  return v;
}
__device__ __forceinline__ ItemPieces LoadPieces(const int4* words) {
  const int4 a = LoadAgain(words), b = LoadAgain(words + 1), c = LoadAgain(words + 2);
  return {static_cast<int16_t>(a.y), b.x, b.y, b.z, b.w, c.x, c.y, c.z};
}

// Butterflies over a head that lies in the lanes of a warp, kPer channels each (lane * kPer + i): its
// Walsh-Hadamard transform without the factor.
template <int kPer>
__device__ __forceinline__ void HadamardOfWarp(float (&x)[kPer]) {
#pragma unroll
  for (int d = 1; d < kPer; d *= 2) {
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      if ((i & d) != 0) continue;
      const float a = x[i], b = x[i + d];
      x[i] = a + b, x[i + d] = a - b;
    }
  }
#pragma unroll
  for (int d = 1; d < 32; d *= 2) {
    const float sign = (threadIdx.x & d) != 0 ? -1.0f : 1.0f;
#pragma unroll
    for (int i = 0; i < kPer; ++i) x[i] = fmaf(sign, x[i], __shfl_xor_sync(~0u, x[i], d));
  }
}

template <int kPer>
struct Lanes {  // kPer consecutive floats of a head
  float v[kPer];
  __device__ __forceinline__ void Load(const float* p) {
    if constexpr (kPer == 4) {
      const float4 x = *reinterpret_cast<const float4*>(p);
      v[0] = x.x, v[1] = x.y, v[2] = x.z, v[3] = x.w;
    } else {
      const float2 x = *reinterpret_cast<const float2*>(p);
      v[0] = x.x, v[1] = x.y;
    }
  }
  __device__ __forceinline__ void LoadBf16(const uint16_t* p) {
#pragma unroll
    for (int i = 0; i < kPer; i += 2) {
      const float2 x = UnpackBf16(*reinterpret_cast<const uint32_t*>(p + i));
      v[i] = x.x, v[i + 1] = x.y;
    }
  }
  __device__ __forceinline__ void Add(float factor, const Lanes& x) {
#pragma unroll
    for (int i = 0; i < kPer; ++i) v[i] = fmaf(factor, x.v[i], v[i]);
  }
  // Rotated back and rounded, times `factor`.
  __device__ __forceinline__ void StoreOutput(float factor, uint16_t* p) {
    HadamardOfWarp(v);
    factor *= kPer == 4 ? 0x1.6a09e6p-4f : 0.125f;  // 1 / sqrt(head_dim)
#pragma unroll
    for (int i = 0; i < kPer; i += 2) {
      *reinterpret_cast<uint32_t*>(p + i) = PackBf16(v[i] * factor, v[i + 1] * factor);
    }
  }
};

// The like in FP16: what a split leaves for the one that merges.
template <int kPer>
struct Partial {
  uint32_t words[kPer / 2] = {};
  __device__ __forceinline__ Partial() {}
  __device__ __forceinline__ Partial(const Lanes<kPer>& x, float factor) {
#pragma unroll
    for (int i = 0; i < kPer; i += 2) {
      words[i / 2] = PackF16Saturating(x.v[i] * factor, x.v[i + 1] * factor);
    }
  }
  __device__ __forceinline__ void Load(const uint32_t* p) {  // past L1: another thread block wrote it
    if constexpr (kPer == 4) {
      const uint2 x = __ldcg(reinterpret_cast<const uint2*>(p));
      words[0] = x.x, words[1] = x.y;
    } else {
      words[0] = __ldcg(p);
    }
  }
  __device__ __forceinline__ void Store(uint32_t* p) const {
    if constexpr (kPer == 4) {
      __stcg(reinterpret_cast<uint2*>(p), make_uint2(words[0], words[1]));
    } else {
      __stcg(p, words[0]);
    }
  }
  __device__ __forceinline__ Lanes<kPer> Floats() const {
    Lanes<kPer> x;
#pragma unroll
    for (int i = 0; i < kPer; i += 2) {
      const float2 pair = UnpackF16(words[i / 2]);
      x.v[i] = pair.x, x.v[i + 1] = pair.y;
    }
    return x;
  }
};

// Whose heads an item is about.
struct ItemHeads {
  int row, kv_head, first_head, heads;
  __device__ __forceinline__ explicit ItemHeads(const int4& words)
      : row(words.x), kv_head(static_cast<int16_t>(words.y)), first_head(words.y >> 16), heads(words.z) {}
};
// The same, and what is to be known when its pieces are done: read again then.
struct ItemEnd : ItemHeads {
  int items, split, splits, slot, counter;
  __device__ __forceinline__ ItemEnd(const int4& a, const int4& c, const int4& d)
      : ItemHeads(a), items(a.w), split(c.z), splits(c.w), slot(d.x), counter(d.y) {}
};

// Starts to copy the queries of the item's heads, as B fragments of two steps side by side; missing heads
// become zero.
template <int kDim>
__device__ __forceinline__ void QueriesToShared(const DecodeParams& p, const ItemHeads& item,
                                                uint32_t shared) {
  const uint16_t* q = p.layer.q + item.row * p.layer.q_stride + item.first_head * kDim;
#pragma unroll
  for (int i = 0; i < kDim * 4 / kThreads; ++i) {
    const int x = static_cast<int>(threadIdx.x) + i * kThreads;
    const int word = x & 3, lane = x >> 2 & 31, pair = x >> 7;
    const int channel = (2 * pair + (word >> 1)) * 16 + (word & 1) * 8 + (lane & 3) * 2, head = lane >> 2;
    const bool there = head < item.heads;
    CopyAsync4(shared + static_cast<uint32_t>(x) * 4, there ? q + head * kDim + channel : q, there ? 4 : 0);
  }
}

// Writes the accumulators of a warp where MergeWarps reads them.
template <int kDim>
__device__ __forceinline__ void StoreForMerge(const Accumulator<kDim>& acc, uint8_t* shared, int warp) {
  using L = SharedLayout<kDim>;
  const int lane = threadIdx.x & 31, g = lane >> 2, t = lane & 3;
  const float sum0 = __shfl_sync(~0u, acc.even[0], 16 + t), sum1 = __shfl_sync(~0u, acc.even[1], 16 + t);
  auto* sums = reinterpret_cast<float2*>(shared + L::kMergeSums) + warp * kItemHeads;
  if (g == 0) {
    sums[2 * t] = make_float2(acc.max[0], sum0);
    sums[2 * t + 1] = make_float2(acc.max[1], sum1);
  }
  float* out = reinterpret_cast<float*>(shared + L::kMergeOut) + (warp * kItemHeads + 2 * t) * L::kRow + g;
#pragma unroll
  for (int i = 0; i < kDim / 16; ++i) {
    out[i * 16] = acc.out[i][0], out[i * 16 + L::kRow] = acc.out[i][1];
    out[i * 16 + 8] = acc.out[i][2], out[i * 16 + 8 + L::kRow] = acc.out[i][3];
  }
}

// 2^(part - whole); a part that saw no token counts nothing.
__device__ __forceinline__ float Share(float part, float whole) {
  return part == -INFINITY ? 0.0f : Exp2(part - whole);
}

// The row's own key and value, which the cache does not have yet: its logit for each head (base 2), by a warp
// each, and the value. To be read when the warps merge.
template <int kDim>
__device__ __forceinline__ void OwnTokenToShared(const DecodeParams& p, const ItemHeads& item,
                                                 uint8_t* shared) {
  using L = SharedLayout<kDim>;
  constexpr int kPer = kDim / 32;
  const int head = threadIdx.x / 32, lane = threadIdx.x & 31, channel = lane * kPer;
  if (head >= item.heads) return;
  Lanes<kPer> q, k;
  q.LoadBf16(p.layer.q + item.row * p.layer.q_stride + (item.first_head + head) * kDim + channel);
  k.LoadBf16(p.layer.k + item.row * p.layer.kv_stride + item.kv_head * kDim + channel);
  if (head == 0) {
    const uint16_t* v = p.layer.v + item.row * p.layer.kv_stride + item.kv_head * kDim;
#pragma unroll
    for (int i = 0; i < kPer / 2; ++i) {
      reinterpret_cast<uint32_t*>(shared + L::kOwnValue)[lane + 32 * i] =
          reinterpret_cast<const uint32_t*>(v)[lane + 32 * i];
    }
  }
  float logit = 0;
#pragma unroll
  for (int i = 0; i < kPer; ++i) logit = fmaf(q.v[i], k.v[i], logit);
#pragma unroll
  for (int d = 16; d > 0; d /= 2) logit += __shfl_xor_sync(~0u, logit, d);
  if (lane == 0) reinterpret_cast<float*>(shared + L::kOwnLogits)[head] = logit * p.scale_log2;
}

// Merges the warps of an item, and the row's own token in split 0. A warp has one head.
template <int kDim>
__device__ __forceinline__ void MergeWarps(const DecodeParams& p, const ItemEnd& item, uint8_t* shared) {
  using L = SharedLayout<kDim>;
  constexpr int kPer = kDim / 32;
  const int lane = threadIdx.x & 31, channel = lane * kPer;
  static_assert(kWarps >= kItemHeads);
  if (const int head = threadIdx.x / 32; head < item.heads) {
    const auto* sums = reinterpret_cast<const float2*>(shared + L::kMergeSums) + head;
    const auto* outs = reinterpret_cast<const float*>(shared + L::kMergeOut) + head * L::kRow + channel;
    const int64_t at = int64_t{item.row} * p.num_heads + item.first_head + head;
    const bool own = item.split == 0;
    const float logit = own ? reinterpret_cast<const float*>(shared + L::kOwnLogits)[head] : -INFINITY;
    float max = logit;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) max = fmaxf(max, sums[w * kItemHeads].x);
    float sum = 0;
    Lanes<kPer> out = {};
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float2 part = sums[w * kItemHeads];
      // Sums and outputs of the warps carry 2^kMaxBias.
      const float share = Share(part.x, max) * (1.0f / 4);
      Lanes<kPer> x;
      x.Load(outs + w * kItemHeads * L::kRow);
      out.Add(share, x);
      sum = fmaf(share, part.y, sum);
    }
    if (own) {
      Lanes<kPer> value;
      value.LoadBf16(reinterpret_cast<const uint16_t*>(shared + L::kOwnValue) + channel);
      const float share = Share(logit, max);
      out.Add(share, value);
      sum += share;
    }
    if (item.splits == 1) {
      out.StoreOutput(1.0f / sum, p.layer.out + at * kDim + channel);
    } else {
      const int slot = item.slot + item.split;
      Partial<kPer>(out, sum > 0 ? 1.0f / sum : 0.0f)
          .Store(p.partial_out + ((int64_t{slot} * kItemHeads + head) * kDim + channel) / 2);
      if (lane == 0) __stcg(p.partial_sums + slot * kItemHeads + head, make_float2(max, sum));
    }
  }
}

// The last of a row's splits merges them all.
template <int kDim>
__device__ __forceinline__ void MergeSplits(const DecodeParams& p, const ItemEnd& item, uint8_t* shared) {
  using L = SharedLayout<kDim>;
  constexpr int kPer = kDim / 32;
  const int lane = threadIdx.x & 31, channel = lane * kPer;
  __syncthreads();
  auto* last = reinterpret_cast<int*>(shared + L::kNext + 4);
  if (threadIdx.x == 0) {
    // Releases what the whole block wrote, and acquires what those before it did.
    int* counter = p.counters + 1 + item.counter;
    *last = AtomicAddAcqRel(counter, 1) == item.splits - 1;
    if (*last) *counter = 0;
  }
  __syncthreads();
  if (!*last) return;
  if (const int head = threadIdx.x / 32; head < item.heads) {
    // The partial outputs come in batches, the first of them while the shares are computed.
    constexpr int kBatch = 18;
    Partial<kPer> batch[kBatch];
    const uint32_t* outs = p.partial_out + ((int64_t{item.slot} * kItemHeads + head) * kDim + channel) / 2;
    const auto load = [&](int first) {
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        batch[i] = {};  // else its registers would be taken for used throughout the item
        if (first + i < item.splits) batch[i].Load(outs + int64_t{first + i} * kItemHeads * kDim / 2);
      }
    };
    load(0);
    // Up to 64 splits: two a lane.
    const float2* sums = p.partial_sums + item.slot * kItemHeads + head;
    float2 part[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int split = lane + 32 * i;
      part[i] = split < item.splits ? __ldcg(sums + split * kItemHeads) : make_float2(-INFINITY, 0);
    }
    float max = fmaxf(part[0].x, part[1].x);
#pragma unroll
    for (int d = 16; d > 0; d /= 2) max = fmaxf(max, __shfl_xor_sync(~0u, max, d));
    const float share[2] = {Share(part[0].x, max) * part[0].y, Share(part[1].x, max) * part[1].y};
    float sum = share[0] + share[1];
#pragma unroll
    for (int d = 16; d > 0; d /= 2) sum += __shfl_xor_sync(~0u, sum, d);
    Lanes<kPer> out = {};
    for (int first = 0;;) {
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int split = first + i;
        if (split >= item.splits) break;
        out.Add(__shfl_sync(~0u, split < 32 ? share[0] : share[1], split & 31), batch[i].Floats());
      }
      first += kBatch;
      if (first >= item.splits) break;
      load(first);
    }
    const int64_t at = int64_t{item.row} * p.num_heads + item.first_head + head;
    out.StoreOutput(1.0f / sum, p.layer.out + at * kDim + channel);
  }
}

template <int kDim>
__global__ void __launch_bounds__(kThreads, kDecodeBlocksPerSm)
    DecodeKernel(const __grid_constant__ DecodeParams p) {
  using L = SharedLayout<kDim>;
  using Side2 = Piece<kDim, 2>;
  using Side4 = Piece<kDim, 4>;
  using Side8 = Piece<kDim, 8>;
  using Side16 = Piece<kDim, 16>;
  extern __shared__ __align__(128) uint8_t shared[];
  const uint32_t base = SharedAddress(shared);
  const int warp = __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32, 0);  // so it is known to be uniform
  int lane;  // kept: read again wherever it is needed, it costs some twenty cycles each time
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  const uint32_t stages = base + L::kStageMemory + warp * kStages * L::kStageBytes;
  const uint32_t barriers = base + L::kBarriers + warp * kStages * 16;
  const uint32_t constants = base + L::kConstants + (lane >> 2 == 4 ? 64 : 0) + (lane & 3) * 16;

  LaunchDependents();
  if (lane == 0) {
#pragma unroll
    for (int s = 0; s < kStages; ++s) BarrierInit(barriers + s * 16, 1);
    FenceBarrierInit();
    FenceProxyAsync();
  }
  if (threadIdx.x < 32)
    StoreShared4(base + L::kConstants + threadIdx.x * 4, threadIdx.x & 16 ? 0x3c003c00u : 0u);
  __syncwarp();

  int stage = 0;        // of the ring: the next to be read
  uint32_t parity = 0;  // of its barrier
  bool first_item = true;
#pragma unroll 1
  for (int index = static_cast<int>(blockIdx.x);;) {
    const auto* words = reinterpret_cast<const int4*>(p.items + index);
    const int4 a = words[0];
    const ItemPieces pieces = LoadPieces(words);
    if (a.z == 0) {
      if (first_item) WaitForPrevious();  // so that this kernel does not end before the previous one
      return;
    }

    // Pieces warp, warp + 8, ... are this warp's; ends of the formats among those.
    const auto mine = [&](int end) { return end > warp ? (end - warp + kWarps - 1) / kWarps : 0; };

    // Each lane knows where one of the next 32 pieces lies.
    uint64_t address = 0;
    int address_base = 0;
    const auto load_addresses = [&](int first, const ItemPieces& of) {
      const int k = first + lane, piece = warp + kWarps * k;
      address = 0;
      if (piece >= of.end16) return;
      int block = piece, part = 0;
      if (piece >= of.end8) {
        block = of.end4 + (of.end8 - of.end4) / 2 + (piece - of.end8) / 4, part = (piece - of.end8) % 4;
      } else if (piece >= of.end4) {
        block = of.end4 + (piece - of.end4) / 2, part = (piece - of.end4) % 2;
      }
      const uint2 ref = __ldg(reinterpret_cast<const uint2*>(p.table) + of.table +
                              block);  // unit_row; tokens, format, capacity
      int tokens = ref.y & 0xff;
      const int capacity = ref.y >> 16 & 0xff;
      int head_bytes = Side2::kBytes * 2, offset = 0;
      uint32_t format = kPiece2;
      if (piece >= of.end8) {
        format = kPiece16;
        head_bytes = capacity * kDim * 4, offset = part * Side16::kBytes;
        tokens = min(max(tokens - part * Side16::kTokens, 0), Side16::kTokens);
      } else if (piece >= of.end4) {
        format = kPiece8;
        head_bytes = Side8::kBytes * 4, offset = part * Side8::kBytes;
        tokens = min(max(tokens - part * Side8::kTokens, 0), Side8::kTokens);
      } else if (piece >= of.end42) {
        format = kPiece4;
        head_bytes = Side4::kBytes * 2;
      } else if (piece >= of.end2) {
        format = kPiece42;
        head_bytes = Side4::kBytes + Side2::kBytes;
      }
      address = reinterpret_cast<uint64_t>(p.layer.arena) +
                static_cast<uint64_t>(ref.x) * static_cast<uint32_t>(p.num_kv_heads * kUnitBytes) +
                static_cast<uint32_t>(of.kv_head * head_bytes + offset);
      address |= format | static_cast<uint64_t>((capacity - 1) / 16) << PieceAddress::kCapacityBit |
                 static_cast<uint64_t>(tokens) << PieceAddress::kTokensBit;
    };
    // Queries and what is written here may be of the previous kernel; blocks of the cache are older.
    const bool wait_for_previous = first_item && p.layer.overlap;
    first_item = false;
    if (!wait_for_previous) QueriesToShared<kDim>(p, ItemHeads(a), base + L::kQueries);
    load_addresses(0, pieces);
    const int my2 = mine(pieces.end2), my_end = mine(pieces.end16);

    // Fills a stage: stage number `number` of the item is a whole piece of k2v2, or one side of another.
    const auto issue = [&](int number, int slot) {
      const int after = number - my2, k = after < 0 ? number : my2 + (after >> 1);
      if (k >= my_end) return;
      if (k - address_base >= 32) {
        address_base = k;
        load_addresses(k, LoadPieces(words));
      }
      uint64_t from = __shfl_sync(~0u, address, k - address_base);
      if (lane != 0) return;
      const auto tokens = static_cast<uint32_t>(from >> PieceAddress::kTokensBit);
      const auto capacity = static_cast<uint32_t>(from >> PieceAddress::kCapacityBit & 3) * 16 + 16;
      const auto format = static_cast<uint32_t>(from & PieceAddress::kFormatMask);
      from &= PieceAddress::kAddressMask;
      uint32_t bytes = Side2::kBytes * 2;
      if (after >= 0) {
        const bool is_v = after & 1;
        uint32_t v_offset = Side4::kBytes;
        if (format == kPiece16) {
          bytes = Side16::kBytes, v_offset = capacity * (kDim * 2);
        } else if (format == kPiece8) {
          bytes = Side8::kBytes, v_offset = Side8::kBytes * 2;
        } else {
          bytes = is_v && format == kPiece42 ? Side2::kBytes : Side4::kBytes;
        }
        if (is_v) from += v_offset;
      }
      const uint32_t barrier = barriers + slot * 16;
      StoreShared4(barrier + 8, tokens);
      if (tokens == 0) {
        BarrierArrive(barrier);
      } else {
        BarrierExpect(barrier, bytes);
        BulkLoad(stages + slot * L::kStageBytes, reinterpret_cast<const void*>(from), bytes, barrier);
      }
    };
    int slot = stage;
#pragma unroll
    for (int s = 0; s < kStages; ++s) {
      issue(s, slot);
      slot = slot + 1 == kStages ? 0 : slot + 1;
    }

    if (wait_for_previous) {
      WaitForPrevious();
      QueriesToShared<kDim>(p, ItemHeads(a), base + L::kQueries);
    }
    if (pieces.split == 0) OwnTokenToShared<kDim>(p, ItemHeads(a), shared);
    WaitForAsyncCopies();
    __syncthreads();

    Accumulator<kDim> acc;
#pragma unroll
    for (int i = 0; i < kDim / 16; ++i) acc.out[i][0] = acc.out[i][1] = acc.out[i][2] = acc.out[i][3] = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) acc.even[i] = acc.odd[i] = 0;
    acc.max[0] = acc.max[1] = -INFINITY;
    Queries<kDim> q;
    int k = 0, issued = kStages;
    const auto wait = [&] {
      BarrierWait(barriers + stage * 16, parity);
      return stages + stage * L::kStageBytes;
    };
    const auto release = [&] {
      __syncwarp();
      issue(issued++, stage);
      if (++stage == kStages) stage = 0, parity ^= 1;
    };
    const auto tokens = [&] { return static_cast<int>(LoadShared4(barriers + stage * 16 + 8)); };
    // Pieces whose sides come in two stages.
    const auto work = [&]<class K, class V>(int end) {
#pragma unroll 1
      for (; k < end; ++k) {
        uint32_t scores[K::kScores][2];
        const uint32_t keys = wait();
        const int count = tokens();
        if (K::kCodes || count > 0) Scores<K>(keys, q, count, p.scale_log2, lane, acc, scores);
        release();
        const uint32_t values = wait();
        if (K::kCodes || count > 0) Values<V>(values, constants, lane, scores, acc);
        release();
        if constexpr (V::kCodes) SettleValues<V>(k, acc);
      }
    };
    if (my2 > 0) {
      LoadQueries<Side2>(base + L::kQueries, p.scale_log2, q);
#pragma unroll 1
      for (; k < my2; ++k) {
        uint32_t scores[Side2::kScores][2];
        const uint32_t piece = wait();
        Scores<Side2>(piece, q, tokens(), p.scale_log2, lane, acc, scores);
        Values<Side2>(piece + Side2::kBytes, constants, lane, scores, acc);
        release();
        SettleValues<Side2>(k, acc);
      }
    }
    const ItemPieces of = LoadPieces(words);
    const int my42 = mine(of.end42), my4 = mine(of.end4), my8 = mine(of.end8);
    if (my4 > k) LoadQueries<Side4>(base + L::kQueries, p.scale_log2, q);
    work.template operator()<Side4, Side2>(my42);
    if (k > 0) FinishValues<Side2>(acc);
    if (my4 > k) {
      BeginValues<Side4>(acc);
      work.template operator()<Side4, Side4>(my4);
      FinishValues<Side4>(acc);
    }
    if (my8 > k) {
      LoadQueries<Side8>(base + L::kQueries, p.scale_log2, q);
      BeginValues<Side8>(acc);
      work.template operator()<Side8, Side8>(my8);
      FinishValues<Side8>(acc);
    }
    if (my_end > k) {
      LoadQueries<Side16>(base + L::kQueries, p.scale_log2, q);
      work.template operator()<Side16, Side16>(my_end);
    }

    const ItemEnd item(LoadAgain(words), LoadAgain(words + 2), LoadAgain(words + 3));
    const bool queue = item.items > static_cast<int>(gridDim.x);
    int taken = 0;
    if (queue && threadIdx.x == 0) taken = atomicAdd(p.counters, 1);
    __syncthreads();  // nobody reads the stages any more
    StoreForMerge<kDim>(acc, shared, warp);
    __syncthreads();
    if (queue && threadIdx.x == 0) {
      if (taken == item.items - 1) *p.counters = 0;
      StoreShared4(base + L::kNext, static_cast<uint32_t>(taken) + gridDim.x);
    }
    MergeWarps<kDim>(p, item, shared);
    if (item.splits > 1) MergeSplits<kDim>(p, item, shared);
    if (!queue) return;
    FenceProxyAsync();  // the next copies go where the warps have merged
    __syncthreads();
    index = static_cast<int>(LoadShared4(base + L::kNext));
    if (index >= item.items) return;
  }
}

template <int kDim>
void Launch(const DecodeParams& params, int blocks, cudaStream_t stream) {
  constexpr int kBytes = SharedLayout<kDim>::kBytes;
  static const bool configured = [] {
    CUDA_OK(cudaFuncSetAttribute(DecodeKernel<kDim>, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes));
    return true;
  }();
  static_cast<void>(configured);
  cudaLaunchConfig_t config = {.gridDim = dim3(static_cast<unsigned>(blocks)),
                               .blockDim = dim3(kThreads),
                               .dynamicSmemBytes = kBytes,
                               .stream = stream};
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  if (params.layer.overlap) config.attrs = &attribute, config.numAttrs = 1;
  CUDA_OK(cudaLaunchKernelEx(&config, DecodeKernel<kDim>, params));
}

}  // namespace

void LaunchDecodeSm90(const DecodeParams& params, int head_dim, int blocks, cudaStream_t stream) {
  if (head_dim == 128) {
    Launch<128>(params, blocks, stream);
  } else {
    Launch<64>(params, blocks, stream);
  }
}

}  // namespace triaxial::cuda
