#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <algorithm>
#include <type_traits>

#include "base/check.h"
#include "ops/cuda/device.h"
#include "ops/cuda/element_at.h"
#include "ops/cuda/kv_store.h"
#include "ops/cuda/launch.cuh"
#include "ops/cuda/numbers.cuh"

// The codec is specified bit for bit: every product and sum that reaches a code or its metadata is one
// rounding.
namespace triaxial::cuda {
namespace {

constexpr int kThreads = 256;
constexpr float kLargestFp16 = 65504.0f;

__host__ __device__ int HeadSize(Codec codec, int head_dim, Format f, int capacity) {
  return SideSize(codec, head_dim, Bits(f, Side::kK), capacity) +
         SideSize(codec, head_dim, Bits(f, Side::kV), capacity);
}

struct Cache {
  uint8_t* data;
  int64_t layer_bytes;
  int64_t row_bytes;
  int heads;
  Codec codec;
  ClipRatios clip;

  __device__ uint8_t* SideOf(int layer, uint32_t unit_row, int head_dim, int head, Format f, int capacity,
                             Side side) const {
    uint8_t* at = data + layer * layer_bytes + unit_row * row_bytes +
                  int64_t{head} * HeadSize(codec, head_dim, f, capacity);
    return side == Side::kK ? at : at + SideSize(codec, head_dim, Bits(f, Side::kK), capacity);
  }
  __device__ SideClip ClipOf(Side side, int bits) const {
    if (codec != Codec::kRotated || bits != 2) return {1.0f, 1.0f};
    return side == Side::kK ? SideClip{clip.k2, clip.k2_gain} : SideClip{clip.v2, clip.v2_gain};
  }
};

// One side of a block as F32. Rows are padded so that the lanes of a fragment, eight rows by four pairs of
// columns, fall into different banks.
template <int kDim>
struct Tile {
  static constexpr int kStride = kDim + 4;
  static constexpr int kGroups = 2 * kDim;  // the most that a codec has
  float value[kBlockTokens * kStride];
  float scale[kGroups];  // the inverse of the scale while encoding
  float minimum[kGroups];
  __device__ float& at(int token, int channel) { return value[token * kStride + channel]; }
};

// The group that a token and channel belong to, as PlaceOfMeta (kv/format.h); one a token if FP8.
template <int kDim>
__device__ int GroupOf(Codec codec, Side side, int bits, int token, int channel) {
  if (codec == Codec::kRotated || bits == 8) return token;
  if (side == Side::kK && bits == 2) return token / kPaperGroup * kDim + channel;
  return channel / kPaperGroup * kBlockTokens + token;
}
// Any element of a group.
template <int kDim>
__device__ ElementPlace MemberOf(Codec codec, Side side, int bits, int group) {
  if (codec == Codec::kRotated || bits == 8) return {group, 0};
  if (side == Side::kK && bits == 2) return {group / kDim * kPaperGroup, group % kDim};
  return {group % kBlockTokens, group / kBlockTokens * kPaperGroup};
}

// NaN counts as 0, infinities as the largest FP16, -0 as +0.
__device__ float Sanitize(float x) {
  if (isnan(x)) return 0.0f;
  return __fadd_rn(fminf(fmaxf(x, -kLargestFp16), kLargestFp16), 0.0f);
}

__device__ float HalfAt(const uint8_t* p) { return __half2float(*reinterpret_cast<const __half*>(p)); }

// Reads `tokens` tokens of a side; the rest of the tile is left alone. Ends before the tile is complete:
// synchronize.
template <int kDim>
__device__ void ReadSide(Codec codec, Side side, int bits, int capacity, int tokens, const uint8_t* in,
                         Tile<kDim>* tile) {
  if (bits != 16) {
    const int groups = codec == Codec::kRotated || bits == 8 ? kBlockTokens : 2 * kDim;
    for (int i = static_cast<int>(threadIdx.x); i < groups; i += kThreads) {
      const ElementPlace e = MemberOf<kDim>(codec, side, bits, i);
      const MetaPlace meta = PlaceOfScale(codec, kDim, bits, side, e.token, e.channel);
      tile->scale[i] = HalfAt(in + meta.scale);
      tile->minimum[i] = HalfAt(in + meta.minimum);
    }
    __syncthreads();
  }
  for (int chunk = static_cast<int>(threadIdx.x); chunk < ChunksOf(kDim, bits, capacity); chunk += kThreads) {
    const uint4 words = *reinterpret_cast<const uint4*>(in + ChunkOffset(kDim, bits, chunk));
    const uint32_t word_of[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      for (int item = 0; item < 32 / bits; ++item) {
        const ElementPlace e = ElementAt(kDim, bits, side, chunk, w, item);
        if (e.token >= tokens) continue;
        const uint32_t code = word_of[w] >> (item * bits) & (0xffffffffu >> (32 - bits));
        if (bits == 16) {
          tile->at(e.token, e.channel) = FromBf16(static_cast<uint16_t>(code));
          continue;
        }
        const int group = GroupOf<kDim>(codec, side, bits, e.token, e.channel);
        if (bits == 8) {
          const __half_raw half = __nv_cvt_fp8_to_halfraw(static_cast<__nv_fp8_storage_t>(code), __NV_E4M3);
          tile->at(e.token, e.channel) = __fmul_rn(tile->scale[group], __half2float(__half(half)));
        } else {
          tile->at(e.token, e.channel) =
              __fadd_rn(tile->minimum[group], __fmul_rn(tile->scale[group], static_cast<float>(code)));
        }
      }
    }
  }
}

struct Fit {
  __half scale;
  __half minimum;
};

__device__ Fit FitGroup(float lo, float hi, int bits, float clip) {
  const float trim = __fmul_rn(__fsub_rn(hi, lo), __fmul_rn(__fsub_rn(1.0f, clip), 0.5f));
  lo = __fadd_rn(lo, trim);
  hi = __fsub_rn(hi, trim);
  return {__float2half_rn(__fdiv_rn(__fsub_rn(hi, lo), static_cast<float>((1 << bits) - 1))),
          __float2half_rn(lo)};
}
__device__ Fit FitFp8(float lo, float hi) {
  return {__float2half_rn(__fdiv_rn(fmaxf(hi, -lo), 448.0f)), __float2half_rn(0.0f)};
}

// Scales and minima of a complete side, into its metadata and, as what codes are made with, into the tile.
template <int kDim>
__device__ void FitSide(Codec codec, Side side, int bits, const SideClip& clip, Tile<kDim>* tile,
                        uint8_t* out) {
  const float offset = __fmul_rn(__fmul_rn(static_cast<float>((1 << bits) - 1), 0.5f),
                                 __fsub_rn(1.0f, __fdiv_rn(1.0f, clip.gain)));
  const auto put = [&](int group, float lo, float hi) {
    const Fit fit = bits == 8 ? FitFp8(lo, hi) : FitGroup(lo, hi, bits, clip.ratio);
    const ElementPlace e = MemberOf<kDim>(codec, side, bits, group);
    const MetaPlace meta = PlaceOfScale(codec, kDim, bits, side, e.token, e.channel);
    *reinterpret_cast<__half*>(out + meta.scale) = fit.scale;
    *reinterpret_cast<__half*>(out + meta.minimum) = fit.minimum;
    const float scale = __half2float(fit.scale);
    tile->scale[group] = __fmul_rn(scale == 0.0f ? 0.0f : __fdiv_rn(1.0f, scale), clip.gain);
    tile->minimum[group] = __fadd_rn(__half2float(fit.minimum), __fmul_rn(scale, offset));
  };
  if (codec == Codec::kRotated || bits == 8) {
    const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
    for (int token = warp; token < kBlockTokens; token += kThreads / 32) {
      float lo = Sanitize(tile->at(token, lane)), hi = lo;
#pragma unroll
      for (int c = lane + 32; c < kDim; c += 32) {
        const float x = Sanitize(tile->at(token, c));
        lo = fminf(lo, x);
        hi = fmaxf(hi, x);
      }
#pragma unroll
      for (int distance = 16; distance > 0; distance /= 2) {
        lo = fminf(lo, __shfl_xor_sync(~0u, lo, distance));
        hi = fmaxf(hi, __shfl_xor_sync(~0u, hi, distance));
      }
      if (lane == 0) put(token, lo, hi);
    }
    return;
  }
  const bool along_tokens = side == Side::kK && bits == 2;
  for (int group = static_cast<int>(threadIdx.x); group < 2 * kDim; group += kThreads) {
    const ElementPlace e = MemberOf<kDim>(codec, side, bits, group);
    float lo = Sanitize(tile->at(e.token, e.channel)), hi = lo;
    for (int i = 1; i < kPaperGroup; ++i) {
      const float x =
          Sanitize(along_tokens ? tile->at(e.token + i, e.channel) : tile->at(e.token, e.channel + i));
      lo = fminf(lo, x);
      hi = fmaxf(hi, x);
    }
    put(group, lo, hi);
  }
}

// Writes a side from a tile that is complete and synchronized: 64 tokens, or, at 16 bits, the first `tokens`
// and zeros up to the capacity.
template <int kDim>
__device__ void WriteSide(Codec codec, Side side, int bits, int capacity, int tokens, const SideClip& clip,
                          Tile<kDim>* tile, uint8_t* out) {
  if (bits != 16) {
    FitSide(codec, side, bits, clip, tile, out);
    __syncthreads();
  }
  const float levels = static_cast<float>((1 << bits) - 1);
  for (int chunk = static_cast<int>(threadIdx.x); chunk < ChunksOf(kDim, bits, capacity); chunk += kThreads) {
    uint32_t words[4] = {};
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      for (int item = 0; item < 32 / bits; ++item) {
        const ElementPlace e = ElementAt(kDim, bits, side, chunk, w, item);
        if (e.token >= tokens) continue;
        const float x = tile->at(e.token, e.channel);
        uint32_t code;
        if (bits == 16) {
          code = ToBf16(x);
        } else {
          const int group = GroupOf<kDim>(codec, side, bits, e.token, e.channel);
          if (bits == 8) {
            code =
                __nv_cvt_float_to_fp8(__fmul_rn(Sanitize(x), tile->scale[group]), __NV_SATFINITE, __NV_E4M3);
          } else {
            const float steps = __fmul_rn(__fsub_rn(Sanitize(x), tile->minimum[group]), tile->scale[group]);
            code = static_cast<uint32_t>(rintf(fminf(fmaxf(steps, 0.0f), levels)));
          }
        }
        words[w] |= code << (item * bits);
      }
    }
    *reinterpret_cast<uint4*>(out + ChunkOffset(kDim, bits, chunk)) = {words[0], words[1], words[2],
                                                                       words[3]};
  }
}

// A step's rows into tokens [from, from + rows) of the tile.
template <int kDim>
__device__ void ReadRows(const uint16_t* rows, int64_t stride, int from, int count, Tile<kDim>* tile) {
  for (int i = static_cast<int>(threadIdx.x); i < count * kDim / 2; i += kThreads) {
    const int row = i / (kDim / 2), channel = i % (kDim / 2) * 2;
    const float2 x = FromBf16Pair(*reinterpret_cast<const uint32_t*>(rows + row * stride + channel));
    tile->at(from + row, channel) = x.x;
    tile->at(from + row, channel + 1) = x.y;
  }
}

template <int kDim>
__device__ uint16_t* Bf16At(uint8_t* side_bytes, Side side, int token, int channel) {
  return reinterpret_cast<uint16_t*>(side_bytes + PlaceOfElement(kDim, 16, side, token, channel).byte);
}

template <int kDim>
__device__ void RunStore(const Cache& cache, const KvStore& store, int layer, int head, Side side,
                         const uint16_t* rows, int64_t row_stride, Tile<kDim>* tile) {
  uint8_t* out = cache.SideOf(layer, store.unit_row, kDim, head, store.format, store.capacity, side);
  const bool in_place = store.format == Format::kBf16 && store.unit_row == store.tail_row;
  const uint16_t* first = rows + store.row_begin * row_stride + head * kDim;
  if (in_place && store.from_tail > 0) {
    for (int i = static_cast<int>(threadIdx.x); i < store.rows * kDim; i += kThreads) {
      const int row = i / kDim, channel = i % kDim;
      *Bf16At<kDim>(out, side, store.from_tail + row, channel) = first[row * row_stride + channel];
    }
    return;
  }
  if (store.from_tail > 0) {
    const uint8_t* tail =
        cache.SideOf(layer, store.tail_row, kDim, head, Format::kBf16, store.tail_capacity, side);
    ReadSide(cache.codec, side, 16, store.tail_capacity, store.from_tail, tail, tile);
  }
  if (store.row_begin >= 0) {
    ReadRows(first, row_stride, store.from_tail, store.rows, tile);
  } else {
    for (int i = static_cast<int>(threadIdx.x); i < store.rows * kDim; i += kThreads) {
      const int token = store.from_tail + i / kDim, channel = i % kDim;
      tile->at(token, channel) = FromBf16(*Bf16At<kDim>(out, side, token, channel));
    }
  }
  __syncthreads();
  const int bits = Bits(store.format, side);
  WriteSide(cache.codec, side, bits, store.capacity, store.from_tail + store.rows, cache.ClipOf(side, bits),
            tile, out);
}

template <int kDim>
__global__ void __launch_bounds__(kThreads)
    StoreKernel(Cache cache, int layers, const uint16_t* k, const uint16_t* v, int64_t row_stride,
                const KvStore* stores, const int32_t* groups) {
  __shared__ Tile<kDim> tile;
  const int64_t tasks = int64_t{groups[0]} * layers * cache.heads * 2;
  for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    const Side side = task % 2 == 0 ? Side::kK : Side::kV;
    const int head = static_cast<int>(task / 2 % cache.heads);
    const int layer = static_cast<int>(task / 2 / cache.heads % layers);
    const int group = static_cast<int>(task / 2 / cache.heads / layers);
    for (int i = groups[1 + group]; i < groups[2 + group]; ++i) {
      RunStore(cache, stores[i], layer, head, side, side == Side::kK ? k : v, row_stride, &tile);
      __syncthreads();
    }
  }
}

// Bytes of a side to or from a tile, as they are.
__device__ void CopyBytes(const void* from, int bytes, void* to) {
  for (int i = static_cast<int>(threadIdx.x); i < bytes / 16; i += kThreads) {
    static_cast<uint4*>(to)[i] = static_cast<const uint4*>(from)[i];
  }
}

// Both sides of a head are read before either is written: in place, they may change places. A side whose bits
// stay is copied: encoded again, a clipped range would be clipped again.
template <int kDim>
__device__ void ConvertHead(const Cache& cache, const KvConvert& convert, int layer, int head,
                            Tile<kDim>* tiles) {
  const auto bytes_if_kept = [&](Side side) {
    const int bits = Bits(convert.from, side);
    return bits == Bits(convert.to, side) ? SideSize(cache.codec, kDim, bits, kBlockTokens) : 0;
  };
  for (const Side side : {Side::kK, Side::kV}) {
    const uint8_t* in = cache.SideOf(layer, convert.from_row, kDim, head, convert.from, kBlockTokens, side);
    Tile<kDim>* tile = &tiles[static_cast<int>(side)];
    if (const int bytes = bytes_if_kept(side); bytes > 0) {
      CopyBytes(in, bytes, tile);
    } else {
      ReadSide(cache.codec, side, Bits(convert.from, side), kBlockTokens, kBlockTokens, in, tile);
    }
  }
  __syncthreads();
  for (const Side side : {Side::kK, Side::kV}) {
    uint8_t* out = cache.SideOf(layer, convert.to_row, kDim, head, convert.to, kBlockTokens, side);
    Tile<kDim>* tile = &tiles[static_cast<int>(side)];
    if (const int bytes = bytes_if_kept(side); bytes > 0) {
      CopyBytes(tile, bytes, out);
      continue;
    }
    const int bits = Bits(convert.to, side);
    WriteSide(cache.codec, side, bits, kBlockTokens, kBlockTokens, cache.ClipOf(side, bits), tile, out);
  }
  __syncthreads();
}

// A block per head of a conversion and layer. In place, a head lands on those before it, so one block does
// them all in their order.
template <int kDim>
__global__ void __launch_bounds__(kThreads)
    ConvertKernel(Cache cache, int layers, const KvConvert* converts, const int32_t* count) {
  extern __shared__ __align__(16) uint8_t shared[];
  auto* tiles = reinterpret_cast<Tile<kDim>*>(shared);
  const int64_t tasks = int64_t{*count} * layers * cache.heads;
  for (int64_t task = blockIdx.x; task < tasks; task += gridDim.x) {
    const int head = static_cast<int>(task % cache.heads);
    const int layer = static_cast<int>(task / cache.heads % layers);
    const KvConvert convert = converts[task / cache.heads / layers];
    if (convert.from_row != convert.to_row) {
      ConvertHead(cache, convert, layer, head, tiles);
    } else if (head == 0) {
      for (int h = 0; h < cache.heads; ++h) ConvertHead(cache, convert, layer, h, tiles);
    }
  }
}

// A warp per head of a row; a lane holds kPer channels that follow each other.
template <int kDim>
__global__ void __launch_bounds__(kThreads) FinishQkvKernel(FinishQkvArgs args, Cache cache) {
  constexpr int kPer = kDim / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int kv_heads = args.geometry.num_kv_heads;
  const int heads = args.num_heads + 2 * kv_heads;
  const int64_t vector = int64_t{blockIdx.x} * (kThreads / 32) + threadIdx.x / 32;
  const bool exists = vector < args.rows * heads;
  const int64_t row = exists ? vector / heads : 0;
  const int head = static_cast<int>(vector % heads);
  const bool is_query = head < args.num_heads;
  const bool is_value = head >= args.num_heads + kv_heads;

  // What does not depend on the product is read while that still runs.
  float weight[kPer] = {}, cos[kPer] = {}, sin[kPer] = {};
  if (!is_value) {
    const float* norm = (is_query ? args.q_norm : args.k_norm) + lane * kPer;
#pragma unroll
    for (int i = 0; i < kPer; ++i) weight[i] = norm[i];
  }
  WaitForEarlier();
  if (!exists) return;
  float x[kPer];
  const float* in = args.qkv + vector * kDim + lane * kPer;
#pragma unroll
  for (int i = 0; i < kPer; ++i) x[i] = in[i];
  RowPlace place;
  if (!is_query && args.places != nullptr) place = args.places[row];
  if (!is_value) {
    const int64_t angle = row * (kDim / 2) + lane % 16 * kPer;
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      cos[i] = args.cos[angle + i];
      sin[i] = args.sin[angle + i];
    }
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kPer; ++i) sum += x[i] * x[i];
    const float factor = 1.0f / sqrtf(WarpSum(sum) / kDim + args.eps);
#pragma unroll
    for (int i = 0; i < kPer; ++i) x[i] = x[i] * factor * weight[i];
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      const float partner = __shfl_xor_sync(~0u, x[i], 16);
      const float turned = partner * sin[i];
      x[i] = x[i] * cos[i] + (lane < 16 ? -turned : turned);
    }
  }
  if (args.geometry.codec == Codec::kRotated) {
#pragma unroll
    for (int distance = 1; distance < kPer; distance *= 2) {
#pragma unroll
      for (int i = 0; i < kPer; ++i) {
        if (i & distance) continue;
        const float a = x[i], b = x[i + distance];
        x[i] = a + b;
        x[i + distance] = a - b;
      }
    }
#pragma unroll
    for (int distance = 1; distance < 32; distance *= 2) {
#pragma unroll
      for (int i = 0; i < kPer; ++i) {
        const float partner = __shfl_xor_sync(~0u, x[i], distance);
        x[i] = (lane & distance) != 0 ? partner - x[i] : x[i] + partner;
      }
    }
    constexpr float kNorm = kDim == 128 ? 0.08838834764831845f : 0.125f;
#pragma unroll
    for (int i = 0; i < kPer; ++i) x[i] = __fmul_rn(x[i], kNorm);
  }
  LetNextBegin();  // attention would take bandwidth from the reads above, not from the writes below
  uint16_t rounded[kPer];
#pragma unroll
  for (int i = 0; i < kPer; ++i) rounded[i] = ToBf16(x[i]);
  auto* out = reinterpret_cast<uint32_t*>(args.out + vector * kDim + lane * kPer);
#pragma unroll
  for (int i = 0; i < kPer / 2; ++i) {
    out[i] = static_cast<uint32_t>(rounded[2 * i]) | static_cast<uint32_t>(rounded[2 * i + 1]) << 16;
  }

  if (place.unit_row == RowPlace::kNone) return;
  const Side side = is_value ? Side::kV : Side::kK;
  const int kv_head = head - args.num_heads - (is_value ? kv_heads : 0);
  uint8_t* tail = cache.SideOf(0, place.unit_row, kDim, kv_head, Format::kBf16, place.capacity, side);
  if (place.token == 0) {
    for (int chunk = lane; chunk < ChunksOf(kDim, 16, place.capacity); chunk += 32) {
      reinterpret_cast<uint4*>(tail)[chunk] = {0, 0, 0, 0};
    }
    __syncwarp();
  }
#pragma unroll
  for (int i = 0; i < kPer; ++i) *Bf16At<kDim>(tail, side, place.token, lane * kPer + i) = rounded[i];
}

Cache CacheOf(const KvGeometry& g, const ClipRatios& clip, const CacheRegion& region) {
  CHECK(g.head_dim == 64 || g.head_dim == 128);
  return {region.data, region.layer_bytes, UnitRowBytes(g), g.num_kv_heads, g.codec, clip};
}

// Enough blocks for all tasks, or to fill the device several times over.
unsigned GridOf(int64_t tasks) { return static_cast<unsigned>(std::clamp<int64_t>(tasks, 1, 132 * 4)); }

}  // namespace

void FinishQkv(const FinishQkvArgs& args, cudaStream_t stream) {
  const Cache cache = CacheOf(args.geometry, {}, {args.arena_layer, 0, 1});
  const int64_t vectors = args.rows * (args.num_heads + 2 * args.geometry.num_kv_heads);
  const auto blocks = static_cast<unsigned>((vectors + kThreads / 32 - 1) / (kThreads / 32));
  LaunchEarly(args.geometry.head_dim == 128 ? FinishQkvKernel<128> : FinishQkvKernel<64>, blocks, kThreads,
              stream, args, cache);
}

void StoreKv(const KvGeometry& g, const ClipRatios& clip, const CacheRegion& region, const uint16_t* k,
             const uint16_t* v, int64_t kv_stride, const KvStore* stores, const int32_t* groups,
             int max_groups, cudaStream_t stream) {
  if (max_groups == 0) return;
  const Cache cache = CacheOf(g, clip, region);
  const unsigned grid = GridOf(int64_t{max_groups} * region.layers * g.num_kv_heads * 2);
  const auto kernel = g.head_dim == 128 ? StoreKernel<128> : StoreKernel<64>;
  kernel<<<grid, kThreads, 0, stream>>>(cache, region.layers, k, v, kv_stride, stores, groups);
  CUDA_OK(cudaGetLastError());
}

void ConvertKv(const KvGeometry& g, const ClipRatios& clip, const CacheRegion& region,
               const KvConvert* converts, const int32_t* count, int max_converts, cudaStream_t stream) {
  if (max_converts == 0) return;
  const Cache cache = CacheOf(g, clip, region);
  const unsigned grid = GridOf(int64_t{max_converts} * region.layers * g.num_kv_heads);
  const auto kernel = g.head_dim == 128 ? ConvertKernel<128> : ConvertKernel<64>;
  const int bytes = 2 * static_cast<int>(g.head_dim == 128 ? sizeof(Tile<128>) : sizeof(Tile<64>));
  CUDA_OK(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
  kernel<<<grid, kThreads, bytes, stream>>>(cache, region.layers, converts, count);
  CUDA_OK(cudaGetLastError());
}

}  // namespace triaxial::cuda
