// Tiles of 64 tokens of one KV head as FP16 in shared memory, in the order in which wgmma reads B
// (wgmma.cuh): keys as 64 rows (tokens) of head_dim elements, values as head_dim rows (channels) of 64
// elements (tokens). They come from blocks of the cache, expanded on the way, or from the rows of the step.
//
// The order of channels within a row of keys is free, if the queries have the same, and so is the order of
// tokens, if keys and values have the same. Both are such that what a lane expands lies side by side, and
// what eight lanes store at a time in different banks: position t * 16 + i * 4 + h * 2 + c within four tiles
// holds element i * 16 + h * 8 + t * 2 + c (tile i, column h * 8 + t * 2 + c of it: layout.h).
#ifndef TRIAXIAL_OPS_CUDA_PREFILL_TILES_CUH_
#define TRIAXIAL_OPS_CUDA_PREFILL_TILES_CUH_

#include "ops/cuda/layout.h"
#include "ops/cuda/ptx.cuh"

namespace triaxial::cuda {

inline constexpr int kExpandThreads = 128;  // the warpgroup that fills the tiles

__device__ __forceinline__ constexpr int PositionOf(int element) {
  return element / 64 * 64 + element % 8 / 2 * 16 + element / 16 % 4 * 4 + element / 8 % 2 * 2 + element % 2;
}
__device__ __forceinline__ constexpr int ElementOf(int position) {
  return position / 64 * 64 + position / 4 % 4 * 16 + position / 2 % 2 * 8 + position / 16 % 4 * 2 +
         position % 2;
}

// Byte offsets of 16-byte piece `piece` of a row. Rows of keys longer than 128 bytes are cut into parts of 64
// rows.
__device__ __forceinline__ uint32_t KeyOffset(int row, int piece) {
  return static_cast<uint32_t>(piece / 8 * 8192 + row * 128 + ((piece ^ row) & 7) * 16);
}
__device__ __forceinline__ uint32_t ValueOffset(int row, int piece) {
  return static_cast<uint32_t>(row * 128 + ((piece ^ row) & 7) * 16);
}

// Codes of one word as FP16 pairs: field I of both halves, exact. The codes are put into the mantissa of
// 1024, twice in `f16_1024`, which is then taken away.
template <int kBits, int I>
__device__ __forceinline__ uint32_t CodesToF16(uint32_t word, uint32_t f16_1024) {
  constexpr int kInByte = I % (8 / kBits);
  constexpr uint32_t kMask = ((1u << kBits) - 1) << (kBits * kInByte) | ((1u << kBits) - 1)
                                                                            << (kBits * kInByte + 16);
  const uint32_t source = I >= 8 / kBits ? word >> 8 : word;
  const uint32_t biased = (source & kMask) | f16_1024;
  constexpr float kUnit = 1.0f / (1 << (kBits * kInByte));
  const __half2 unit = __floats2half2_rn(kUnit, kUnit),
                bias = __floats2half2_rn(-1024 * kUnit, -1024 * kUnit);
  const __half2 codes = __hfma2(*reinterpret_cast<const __half2*>(&biased), unit, bias);
  return *reinterpret_cast<const uint32_t*>(&codes);
}
__device__ __forceinline__ uint32_t FmaF16(uint32_t a, uint32_t b, uint32_t c) {
  const __half2 r = __hfma2(*reinterpret_cast<__half2*>(&a), *reinterpret_cast<__half2*>(&b),
                            *reinterpret_cast<__half2*>(&c));
  return *reinterpret_cast<const uint32_t*>(&r);
}
// BF16 values beyond FP16's range become its ends, as they do in every quantized format.
__device__ __forceinline__ uint32_t Bf16ToF16(uint32_t pair) {
  const float2 x = UnpackBf16(pair);
  return PackF16Saturating(x.x, x.y);
}
// Field I of a word, times the scale, plus the minimum.
template <int kBits, int I>
__device__ __forceinline__ uint32_t Expand(uint32_t word, uint32_t scale, uint32_t minimum,
                                           uint32_t f16_1024) {
  if constexpr (kBits == 16) {
    return Bf16ToF16(word);
  } else if constexpr (kBits == 8) {
    return MulF16(F16FromE4m3(static_cast<uint16_t>(I == 0 ? word & 0xffff : word >> 16)), scale);
  } else {
    return FmaF16(CodesToF16<kBits, I>(word, f16_1024), scale, minimum);
  }
}

// What a thread of the warpgroup has to do with a tile, whatever the format: warp w expands the keys of token
// tile w; or the values of token tiles 2 (w % 2) and the next, of the channels in half w / 2 of each channel
// tile.
struct ExpandPlace {
  __device__ __forceinline__ ExpandPlace(Side side, int thread) : thread(thread) {
    const int warp = thread / 32, lane = thread % 32, g = lane >> 2, t = lane & 3;
    token_tile = side == Side::kK ? warp : warp % 2 * 2;
    half = warp / 2;
    codes = static_cast<uint32_t>(lane * 16);
    meta = static_cast<uint32_t>(side == Side::kK ? g * 16 + warp % 2 * 8 : t * 16);
    out = side == Side::kK ? KeyOffset(PositionOf(warp * 16 + g), t * 2)
                           : ValueOffset(half * 8 + g, t * 2 + warp % 2);
    // A constant that the assembler does not know to be one: only a register leaves room for the mask in the
    // instruction that takes codes apart.
    f16_1024 = 0x64006400u + threadIdx.y;
  }

  int thread, token_tile, half;
  uint32_t codes, meta;  // byte offsets of a lane's share of a load, of the metadata of two token tiles
  uint32_t out;          // and of the first 16 bytes in the tile
  uint32_t f16_1024;
};

// A side of a block in shared memory, in the order of layout.h.
template <int kDim, int kBits>
struct RawSide {
  static constexpr int kSteps = kDim / 16;
  static constexpr int kFields = 16 / kBits;
  static constexpr int kShare =
      kFields < kSteps ? kFields : kSteps;  // fields of a load that are of one token tile

  // 16 bytes for channel tile `step` of token tile `tile`, as field step % kShare. BF16 blocks have `tiles`
  // token tiles; the others read as zero.
  __device__ static __forceinline__ uint4 Load(uint32_t raw, int tiles, int tile, int step,
                                               const ExpandPlace& place) {
    if (kBits == 16 && tile >= tiles) return {};
    int fragment = tile * kSteps + step;
    if constexpr (kBits == 8) raw += tile / 2 * (32 * (kDim + 4)), fragment = tile % 2 * kSteps + step;
    uint4 w = LoadShared16(raw + fragment / kFields * 512 + place.codes);
    if (kShare < kFields && tile % 2 != 0) w = {w.x >> 8, w.y >> 8, w.z >> 8, w.w >> 8};
    return w;
  }
  // The metadata of a pair of token tiles.
  __device__ static __forceinline__ uint32_t Meta(uint32_t raw, int pair) {
    if constexpr (kBits == 8) return raw + pair * (32 * (kDim + 4)) + 32 * kDim;
    return raw + kBlockTokens * kDim * kBits / 8 + pair * 128;
  }
};

template <int kDim, int kBits, int kStep = 0>
__device__ __forceinline__ void ExpandKeySteps(uint32_t raw, int tiles, uint32_t out,
                                               const uint32_t (&scale)[2], const uint32_t (&minimum)[2],
                                               const ExpandPlace& place, uint4 w) {
  using R = RawSide<kDim, kBits>;
  if constexpr (kStep < R::kSteps) {
    constexpr int kFirst = kStep % R::kShare, kSecond = (kStep + 1) % R::kShare;
    if (kFirst == 0) w = R::Load(raw, tiles, place.token_tile, kStep, place);
    const uint4 v = kSecond == 0 ? R::Load(raw, tiles, place.token_tile, kStep + 1, place) : w;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const auto expand_first = [&](uint32_t word) {
        return Expand<kBits, kFirst>(word, scale[h], minimum[h], place.f16_1024);
      };
      const auto expand_second = [&](uint32_t word) {
        return Expand<kBits, kSecond>(word, scale[h], minimum[h], place.f16_1024);
      };
      // Eight tokens on are two rows on, which have bit 1 set; the second half of a part of 64 channels is
      // the piece beside the first.
      StoreShared16((out ^ static_cast<uint32_t>(h * 32 + kStep / 2 % 2 * 16)) +
                        static_cast<uint32_t>(h * 256 + kStep / 4 * 8192),
                    {expand_first(h ? w.y : w.x), expand_first(h ? w.w : w.z), expand_second(h ? v.y : v.x),
                     expand_second(h ? v.w : v.z)});
    }
    ExpandKeySteps<kDim, kBits, kStep + 2>(raw, tiles, out, scale, minimum, place, w);
  }
}
template <int kDim, int kBits>
__device__ __forceinline__ void ExpandKeys(uint32_t raw, int tiles, uint32_t keys, const ExpandPlace& place) {
  uint32_t scale[2] = {}, minimum[2] = {};
  if constexpr (kBits != 16) {
    // (scale, minimum) of tokens g and g + 8.
    const uint32_t at = RawSide<kDim, kBits>::Meta(raw, place.token_tile / 2) + place.meta;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const uint32_t both = LoadShared4(at + h * 4);
      scale[h] = __byte_perm(both, 0, 0x1010), minimum[h] = __byte_perm(both, 0, 0x3232);
    }
  }
  ExpandKeySteps<kDim, kBits>(raw, tiles, keys + place.out, scale, minimum, place, {});
}

template <int kDim, int kBits, int kStep = 0>
__device__ __forceinline__ void ExpandValueSteps(uint32_t raw, int tiles, uint32_t out, const uint4& scale,
                                                 const uint4& minimum, const ExpandPlace& place, uint4 a,
                                                 uint4 b) {
  using R = RawSide<kDim, kBits>;
  if constexpr (kStep < R::kSteps) {
    constexpr int kField = kStep % R::kShare;
    if (kField == 0) {
      a = R::Load(raw, tiles, place.token_tile, kStep, place);
      b = R::Load(raw, tiles, place.token_tile + 1, kStep, place);
    }
    const bool half = place.half != 0;
    // Metadata in the order (tile, h), minima in the order (h, tile).
    StoreShared16(out + kStep * 2048,
                  {Expand<kBits, kField>(half ? a.y : a.x, scale.x, minimum.x, place.f16_1024),
                   Expand<kBits, kField>(half ? a.w : a.z, scale.y, minimum.z, place.f16_1024),
                   Expand<kBits, kField>(half ? b.y : b.x, scale.z, minimum.y, place.f16_1024),
                   Expand<kBits, kField>(half ? b.w : b.z, scale.w, minimum.w, place.f16_1024)});
    ExpandValueSteps<kDim, kBits, kStep + 1>(raw, tiles, out, scale, minimum, place, a, b);
  }
}
template <int kDim, int kBits>
__device__ __forceinline__ void ExpandValues(uint32_t raw, int tiles, uint32_t values,
                                             const ExpandPlace& place) {
  uint4 scale = {}, minimum = {};
  if constexpr (kBits != 16) {
    const uint32_t at = RawSide<kDim, kBits>::Meta(raw, place.token_tile / 2) + place.meta;
    scale = LoadShared16(at), minimum = LoadShared16(at + 64);
  }
  ExpandValueSteps<kDim, kBits>(raw, tiles, values + place.out, scale, minimum, place, {}, {});
}

// The blocks of kPaper, element by element.
template <int kDim>
__device__ __noinline__ void ExpandPaper(uint32_t shared, int bits, Side side, uint32_t tile, int thread) {
  const auto* raw = static_cast<const uint8_t*>(__cvta_shared_to_generic(shared));
  for (int item = thread; item < 64 * kDim / 8; item += kExpandThreads) {
    uint32_t words[4];
    const int row = side == Side::kK ? item % 64 : item % kDim,
              piece = side == Side::kK ? item / 64 : item / kDim;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float x[2];
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const int element = ElementOf(piece * 8 + i * 2 + c);
        const int token = side == Side::kK ? ElementOf(row) : element,
                  channel = side == Side::kK ? element : row;
        const BitPlace place = PlaceOfElement(kDim, bits, side, token, channel);
        const MetaPlace meta = PlaceOfScale(Codec::kPaper, kDim, bits, side, token, channel);
        const float code = static_cast<float>(raw[place.byte] >> place.shift & ((1 << bits) - 1));
        x[c] = fmaf(code, __half2float(*reinterpret_cast<const __half*>(raw + meta.scale)),
                    __half2float(*reinterpret_cast<const __half*>(raw + meta.minimum)));
        x[c] = fminf(fmaxf(x[c], -65504.0f), 65504.0f);
      }
      words[i] = PackF16(x[0], x[1]);
    }
    StoreShared16(tile + (side == Side::kK ? KeyOffset(row, piece) : ValueOffset(row, piece)),
                  {words[0], words[1], words[2], words[3]});
  }
}

// Up to 64 rows of the step, BF16, one after the other in shared memory. Those past `count` were not brought
// and are zero.
template <int kDim>
__device__ __forceinline__ void RowsToKeys(uint32_t rows, int count, uint32_t keys, int thread) {
#pragma unroll 4
  for (int item = thread; item < 64 * kDim / 8; item += kExpandThreads) {
    const int channel = item % (kDim / 8) * 8, token = item / (kDim / 8);
    uint4 w = {};
    if (token < count) w = LoadShared16(rows + (token * kDim + channel) * 2);
    const int row = PositionOf(token);
    const uint32_t pairs[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
    for (int t = 0; t < 4; ++t) {
      const int position = PositionOf(channel + 2 * t);
      StoreShared4(keys + KeyOffset(row, position / 8) + position % 8 * 2, Bf16ToF16(pairs[t]));
    }
  }
}
template <int kDim>
__device__ __forceinline__ void RowsToValues(uint32_t rows, int count, uint32_t values, int thread) {
#pragma unroll 2
  for (int item = thread; item < 32 * kDim / 8; item += kExpandThreads) {
    // A warp has 8 pairs of tokens and 4 pieces of 8 channels, for the sake of the banks.
    const int token = (item / 4 % 8 + item / kDim * 8) * 2;
    const int channel = (item % 4 + item / 32 % (kDim / 32) * 4) * 8;
    uint4 a = {}, b = {};
    if (token < count) a = LoadShared16(rows + (token * kDim + channel) * 2);
    if (token + 1 < count) b = LoadShared16(rows + ((token + 1) * kDim + channel) * 2);
    const uint32_t first[4] = {a.x, a.y, a.z, a.w}, second[4] = {b.x, b.y, b.z, b.w};
    const int position = PositionOf(token);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const uint32_t both = __byte_perm(first[i / 2], second[i / 2], i % 2 == 0 ? 0x5410 : 0x7632);
      StoreShared4(values + ValueOffset(channel + i, position / 8) + position % 8 * 2, Bf16ToF16(both));
    }
  }
}

// One side of a block, whatever its format; `tiles`: its capacity in tiles of 16 tokens.
template <int kDim, Side kSide, int kBits>
__device__ __forceinline__ void ExpandSide(uint32_t raw, int tiles, uint32_t to, const ExpandPlace& place) {
  if constexpr (kSide == Side::kK) {
    ExpandKeys<kDim, kBits>(raw, tiles, to, place);
  } else {
    ExpandValues<kDim, kBits>(raw, tiles, to, place);
  }
}
template <int kDim, Side kSide>
__device__ __forceinline__ void ExpandSide(Codec codec, int bits, uint32_t raw, int tiles, uint32_t to,
                                           const ExpandPlace& place) {
  if (bits < 8 && codec == Codec::kPaper) {
    ExpandPaper<kDim>(raw, bits, kSide, to, place.thread);
  } else if (bits == 2) {
    ExpandSide<kDim, kSide, 2>(raw, tiles, to, place);
  } else if (bits == 4) {
    ExpandSide<kDim, kSide, 4>(raw, tiles, to, place);
  } else if (bits == 8) {
    ExpandSide<kDim, kSide, 8>(raw, tiles, to, place);
  } else {
    ExpandSide<kDim, kSide, 16>(raw, tiles, to, place);
  }
}

}  // namespace triaxial::cuda

#endif  // TRIAXIAL_OPS_CUDA_PREFILL_TILES_CUH_
