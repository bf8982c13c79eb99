// Order of codes and metadata within a side of a block, layout "cuda-1"; sizes, sides and heads are those of
// kv/format.h (head h of a block of n units at h * n * kUnitBytes, K side, then V side). For host and device,
// all constexpr.
//
// Codes lie in the order in which tensor cores read them: as the A operand of mma.m16n8k16, 16 x 16 tiles,
// where K has rows = tokens, columns = channels and V rows = channels, columns = tokens. Lane l = 4 * (row %
// 8) + column % 8 / 2 of a warp owns four 32-bit words of a tile, word row / 8 + 2 * (column / 8), each with
// columns 2j and 2j + 1 in its lower and upper half. A half has 16 bits, which is 16 / bits elements, so it
// holds as many tiles: a lane reads 16 bytes and has its part of all of them. Tiles are numbered token / 16 *
// (head_dim / 16)
// + channel / 16.
//   2 and 4 bits: tile number f is field f % (16 / bits) of each half, at bit bits * that.
//   8 bits (FP8): tile 2j in the lower half of a word, 2j + 1 in the upper one, columns in its lower and
//   upper byte. 16 bits: one tile.
// So that a part of a side is one copy, an FP8 side is two halves of 32 tokens, each its codes, then its
// metadata.
//
// Metadata (kRotated at 2 and 4 bits; FP8 of both codecs): 128 bytes for every 32 tokens. K: scale and
// minimum side by side, token by token. V: 32 scales, then 32 minima. Both in the order in which a lane reads
// the tokens of its rows or columns in one access. kPaper at 2 and 4 bits: as in layout "cpu-1", all scales,
// then all minima, numbered by PlaceOfMeta (kv/format.h).
#ifndef TRIAXIAL_OPS_CUDA_LAYOUT_H_
#define TRIAXIAL_OPS_CUDA_LAYOUT_H_

#include "kv/format.h"

#ifdef __CUDACC__
#define TRIAXIAL_HOST_DEVICE __host__ __device__
#else
#define TRIAXIAL_HOST_DEVICE
#endif

namespace triaxial::cuda {

inline constexpr char kLayoutName[] = "cuda-1";
inline constexpr int kTileTokens = 16;
inline constexpr int kFp8HalfTokens = 32;  // tokens of a half of an FP8 side

// Bytes of a side of one head of a block. `capacity` (16, 32, 48 or 64 tokens) counts at 16 bits only; others
// have room for 64.
TRIAXIAL_HOST_DEVICE constexpr int SideSize(Codec codec, int head_dim, int bits,
                                            int capacity = kBlockTokens) {
  if (bits == 16) return capacity * head_dim * 2;
  const int groups =
      codec == Codec::kRotated || bits == 8 ? kBlockTokens : kBlockTokens * head_dim / kPaperGroup;
  return kBlockTokens * head_dim * bits / 8 + groups * 4;
}

// Where the code (bits 2, 4, 8) or the value (bits 16) of a token and channel lies in its side.
struct BitPlace {
  int byte;
  int shift;  // of the lowest bit in that byte; 0 at 8 and 16 bits
};
TRIAXIAL_HOST_DEVICE constexpr BitPlace PlaceOfElement(int head_dim, int bits, Side side, int token,
                                                       int channel) {
  const int row = (side == Side::kK ? token : channel) % 16;
  const int column = (side == Side::kK ? channel : token) % 16;
  const int lane = row % 8 * 4 + column % 8 / 2;
  const int word = row / 8 + column / 8 * 2;
  const int tiles_per_load = 16 / bits;
  int tile = token / kTileTokens * (head_dim / 16) + channel / 16;
  int base = 0;
  if (bits == 8) {
    base = token / kFp8HalfTokens * (kFp8HalfTokens * (head_dim + 4));
    tile = token % kFp8HalfTokens / kTileTokens * (head_dim / 16) + channel / 16;
  }
  const int field = tile % tiles_per_load;
  const int at = base + tile / tiles_per_load * 512 + lane * 16 + word * 4;
  if (bits == 8) return {at + field * 2 + column % 2, 0};
  const int bit = bits * field;
  return {at + column % 2 * 2 + bit / 8, bit % 8};
}

// Byte offsets in a side of the FP16 scale and minimum that a token and channel (which counts for kPaper
// alone) use.
struct MetaPlace {
  int scale;
  int minimum;
};
TRIAXIAL_HOST_DEVICE constexpr MetaPlace PlaceOfScale(Codec codec, int head_dim, int bits, Side side,
                                                      int token, int channel) {
  if (codec == Codec::kPaper && bits != 8) {
    const int groups = kBlockTokens * head_dim / kPaperGroup;
    const bool along_tokens = side == Side::kK && bits == 2;
    const int group = along_tokens ? token / kPaperGroup * head_dim + channel
                                   : channel / kPaperGroup * kBlockTokens + token;
    const int base = kBlockTokens * head_dim * bits / 8 + group * 2;
    return {base, base + groups * 2};
  }
  const int pair = token / 32, tile = token / kTileTokens % 2, row = token % kTileTokens;
  const int base = bits == 8 ? pair * (kFp8HalfTokens * (head_dim + 4)) + kFp8HalfTokens * head_dim
                             : kBlockTokens * head_dim * bits / 8 + pair * 128;
  if (side == Side::kK) {
    const int scale = base + row % 8 * 16 + tile * 8 + row / 8 * 4;
    return {scale, scale + 2};
  }
  const int scale = base + row % 8 / 2 * 16 + tile * 8 + row / 8 * 4 + row % 2 * 2;
  const int minimum = base + 64 + row % 8 / 2 * 16 + row / 8 * 8 + tile * 4 + row % 2 * 2;
  return {scale, minimum};
}

}  // namespace triaxial::cuda

#endif  // TRIAXIAL_OPS_CUDA_LAYOUT_H_
