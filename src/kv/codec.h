// The scalar codec: the specification of what every backend stores, bit for bit (docs/kv-format.md). Slow on
// purpose.
//
// All arithmetic is F32, each operation rounded to nearest even by itself (no fused multiply-add), with
// subnormals kept. One group of values x is quantized to `bits` (2 or 4) like this:
//   x'      = x clamped to [-65504, 65504]; NaN becomes 0, -0 becomes +0
//   lo, hi  = min(x'), max(x')
//   trim    = (hi - lo) * ((1 - clip) * 0.5);  lo = lo + trim;  hi = hi - trim
//   scale   = fp16((hi - lo) / (2^bits - 1));  minimum = fp16(lo)
//   inverse = (scale == 0 ? 0 : 1 / scale) * gain       (from here on with the FP16 values)
//   origin  = minimum + scale * ((2^bits - 1) * 0.5 * (1 - 1 / gain))
//   code    = rint(min(max((x' - origin) * inverse, 0), 2^bits - 1)), ties to even
// and decoded to minimum + scale * code, where the product is exact. To 8 bits:
//   scale   = fp16(max |x'| / 448);  minimum = +0;  inverse as above
//   code    = e4m3(x' * inverse), ties to even, what is too large becomes +-448 (base/float8.h)
// decoded to scale * code. Metadata is thus always finite and scale never negative, whatever the input. BF16
// sides keep what they are given, NaN and infinity included.
#ifndef TRIAXIAL_KV_CODEC_H_
#define TRIAXIAL_KV_CODEC_H_

#include <cstdint>

#include "kv/format.h"

namespace triaxial {

// How 2-bit sides of the rotated codec choose their levels. Part of the checkpoint's KV calibration.
struct ClipRatios {
  // Fractions of the min-max range that the levels span (centred), in [kMinClip, 1]; values outside saturate.
  float k2 = 1.0f;
  float v2 = 1.0f;
  // Values are multiplied by it, about the range's centre, before they are rounded to a level, in
  // [1, kMaxGain]. Few levels, narrow enough to err little, store less than what is there (an outer level
  // stands for all beyond it); the gain makes up for it.
  float k2_gain = 1.0f;
  float v2_gain = 1.0f;
  bool operator==(const ClipRatios&) const = default;
};
inline constexpr float kMinClip = 0.5f;
inline constexpr float kMaxGain = 2.0f;

constexpr bool IsValid(const ClipRatios& c) {
  return c.k2 >= kMinClip && c.k2 <= 1.0f && c.v2 >= kMinClip && c.v2 <= 1.0f && c.k2_gain >= 1.0f &&
         c.k2_gain <= kMaxGain && c.v2_gain >= 1.0f && c.v2_gain <= kMaxGain;
}

// What applies to a side: 4-bit sides and the paper codec keep the whole range.
struct SideClip {
  float ratio = 1.0f;
  float gain = 1.0f;
};
constexpr SideClip ClipOf(const KvGeometry& g, const ClipRatios& clip, Side side, int bits) {
  if (g.codec != Codec::kRotated || bits != 2) return {};
  return side == Side::kK ? SideClip{clip.k2, clip.k2_gain} : SideClip{clip.v2, clip.v2_gain};
}

// Quantizes one head of one block. `k` and `v` are F32, `tokens` (1 to 64) rows of head_dim values, each row
// `row_stride` floats after the one before, already rotated if the codec is kRotated. `out` has HeadBytes(g,
// f, capacity) bytes. Codes and metadata of tokens past `tokens` are zero; groups along tokens hold the
// existing tokens only. `capacity` is a BF16 block's.
void EncodeBlockScalar(const KvGeometry& g, Format f, const ClipRatios& clip, const float* k, const float* v,
                       int64_t row_stride, int tokens, uint8_t* out, int capacity = kBlockTokens);

// The inverse: [tokens][head_dim] F32 of one side.
void DecodeSideScalar(const KvGeometry& g, Format f, Side side, const uint8_t* block_head, int tokens,
                      float* out, int capacity = kBlockTokens);

// In-place orthonormal Walsh-Hadamard transform of one head (its own inverse): x <- H x / sqrt(head_dim).
// Butterflies (a, b) -> (a + b, a - b) run from distance 1 up, in F32, then each value is multiplied by the
// F32 nearest to 1 / sqrt(head_dim), so that every backend gets the same bits.
void HadamardScalar(float* x, int head_dim);

}  // namespace triaxial

#endif  // TRIAXIAL_KV_CODEC_H_
