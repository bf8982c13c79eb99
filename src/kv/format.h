// Storage formats of a KV block, their sizes, and the order of codes in memory. docs/kv-format.md has the
// pictures.
//
// A block is a run of 64 consecutive positions of one sequence. It takes one run of units in the arena, the
// same rows in every layer; a unit row is kUnitBytes for each KV head. Within a layer, head h of a block of n
// units per head lies at h * n * kUnitBytes: the K side, then the V side; a side is its codes, then its
// metadata.
#ifndef TRIAXIAL_KV_FORMAT_H_
#define TRIAXIAL_KV_FORMAT_H_

#include <cstdint>
#include <optional>
#include <string_view>

namespace triaxial {

inline constexpr int kBlockTokens = 64;
// Divides the sides of every format, so that no format pays for padding: capacity in bytes is exact for all
// of them.
inline constexpr int kUnitBytes = 256;
inline constexpr int kPaperGroup = 32;
// A BF16 block that may still grow has room for a multiple of so many tokens.
inline constexpr int kTailStep = 16;

// Ordered from fewest to most bits.
enum class Format : uint8_t { kK2V2, kK4V2, kK4V4, kFp8, kBf16 };
inline constexpr int kFormats = 5;
std::string_view Name(Format format);  // "k2v2", "k4v2", "k4v4", "fp8", "bf16"
std::optional<Format> ParseFormat(std::string_view name);

// How sides of 2 and 4 bits are quantized. One codec serves a whole cache.
enum class Codec : uint8_t {
  kRotated,  // per token: one FP16 scale and minimum over all channels of a head; K and V are
             // Hadamard-rotated (KERNELS: SAW-INT4)
  kPaper,    // TriAxialKV / KIVI: groups of 32; per token along channels, but 2-bit keys per channel along
             // tokens; no rotation
};
std::string_view Name(Codec codec);  // "rotated", "paper"
std::optional<Codec> ParseCodec(std::string_view name);

enum class Side : uint8_t { kK, kV };

// Bits per element of one side: 2, 4, 8 or 16.
constexpr int Bits(Format format, Side side) {
  switch (format) {
    case Format::kK2V2:
      return 2;
    case Format::kK4V2:
      return side == Side::kK ? 4 : 2;
    case Format::kK4V4:
      return 4;
    case Format::kFp8:
      return 8;
    case Format::kBf16:
      return 16;
  }
  return 16;
}

struct KvGeometry {
  int num_layers = 0;
  int num_kv_heads = 0;
  int head_dim = 0;  // 64 or 128
  Codec codec = Codec::kRotated;
  bool operator==(const KvGeometry&) const = default;
};

// Bytes of codes and of metadata of one side of one block and head. Metadata is `groups` FP16 scales, then as
// many FP16 minima: kRotated [token]; kPaper [channel group][token], or [token group][channel] for 2-bit
// keys. At 8 bits (E4M3) it is [token] for both, and minima are zero.
constexpr int CodeBytes(const KvGeometry& g, int bits) { return kBlockTokens * g.head_dim * bits / 8; }
constexpr int MetaGroups(const KvGeometry& g, int bits) {
  if (bits == 16) return 0;
  if (g.codec == Codec::kRotated || bits == 8) return kBlockTokens;
  return kBlockTokens * g.head_dim / kPaperGroup;
}
// In all sizes, `capacity` (16, 32, 48 or 64 tokens) is that of a BF16 block; others have room for 64
// whatever it says.
constexpr int SideBytes(const KvGeometry& g, int bits, int capacity = kBlockTokens) {
  if (bits == 16) return CodeBytes(g, bits) / kBlockTokens * capacity;
  return CodeBytes(g, bits) + MetaGroups(g, bits) * 4;
}

// Tokens that a block has room for.
constexpr int RoomOf(Format f, int capacity) { return f == Format::kBf16 ? capacity : kBlockTokens; }

// Where a side begins within its block head.
constexpr int SideOffset(const KvGeometry& g, Format f, Side side, int capacity = kBlockTokens) {
  return side == Side::kK ? 0 : SideBytes(g, Bits(f, Side::kK), capacity);
}

// Bytes of one head of a block in one layer; a multiple of kUnitBytes.
constexpr int HeadBytes(const KvGeometry& g, Format f, int capacity = kBlockTokens) {
  return SideBytes(g, Bits(f, Side::kK), capacity) + SideBytes(g, Bits(f, Side::kV), capacity);
}
constexpr int UnitsOf(const KvGeometry& g, Format f, int capacity = kBlockTokens) {
  return HeadBytes(g, f, capacity) / kUnitBytes;
}
// Bytes of a block over all heads and layers, metadata included.
constexpr int64_t BlockBytes(const KvGeometry& g, Format f, int capacity = kBlockTokens) {
  return int64_t{HeadBytes(g, f, capacity)} * g.num_kv_heads * g.num_layers;
}
constexpr int64_t UnitRowBytes(const KvGeometry& g) { return int64_t{kUnitBytes} * g.num_kv_heads; }
// Bits per element over both sides, metadata included: 2.25, 3.25... for kRotated at head_dim 128.
constexpr double EffectiveBits(const KvGeometry& g, Format f) {
  return 8.0 * HeadBytes(g, f) / (2.0 * kBlockTokens * g.head_dim);
}

// Order of codes (layout "cpu", version 1). A side is a matrix of `depth` x `lanes`, where depth is what
// attention sums over: K has lanes = token, depth = channel; V has lanes = channel, depth = token. A 32-bit
// little-endian word holds, for one lane position, four consecutive depths in its four bytes; a byte holds 8
// / bits lanes that lie 16 apart. So one 64-byte load feeds 16 lanes of a dot product over four depths
// (vpdpbusd), after a shift and a mask.
struct CodePlace {
  int byte;   // offset within the side's codes
  int shift;  // of the lowest bit in that byte
};
constexpr CodePlace PlaceOfCode(int depth, int lane, int lanes, int bits) {
  const int lanes_per_word_row = 16 * (8 / bits);
  const int word = (depth / 4 * (lanes / lanes_per_word_row) + lane / lanes_per_word_row) * 16 + lane % 16;
  return {word * 4 + depth % 4, bits * (lane % lanes_per_word_row / 16)};
}
// Index of a BF16 element within its side: pairs of consecutive depths, lane by lane. K has as many lanes as
// the block has room for tokens.
constexpr int PlaceOfBf16(int depth, int lane, int lanes) {
  return (depth / 2 * lanes + lane) * 2 + depth % 2;
}

// Index of an element's group among the scales (and among the minima) of its side.
constexpr int PlaceOfMeta(const KvGeometry& g, Side side, int bits, int token, int channel) {
  if (g.codec == Codec::kRotated || bits == 8) return token;
  if (side == Side::kK && bits == 2) return token / kPaperGroup * g.head_dim + channel;
  return channel / kPaperGroup * kBlockTokens + token;
}

static_assert(UnitsOf({1, 1, 128, Codec::kRotated}, Format::kK2V2) == 18);

}  // namespace triaxial

#endif  // TRIAXIAL_KV_FORMAT_H_
