// The scalar codec: the specification of what every backend stores, bit for bit (docs/kv-format.md). Slow on
// purpose.
#ifndef TRIAXIAL_KV_CODEC_H_
#define TRIAXIAL_KV_CODEC_H_

#include <cstdint>

#include "kv/format.h"

namespace triaxial {

// Fractions of the min-max range that 2-bit sides of the rotated codec keep (centred); values outside
// saturate. The 4-bit sides and the paper codec keep the whole range. Part of the checkpoint's KV
// calibration.
struct ClipRatios {
  float k2 = 1.0f;
  float v2 = 1.0f;
  bool operator==(const ClipRatios&) const = default;
};

// Quantizes one head of one block. `k` and `v` are [tokens][head_dim] row-major F32, already rotated if the
// codec is kRotated; tokens in [1, 64]. Codes and metadata of tokens past `tokens` are zero. `out` has
// HeadBytes(g, f) bytes. For one group with values x: lo = min, hi = max (clipped about their centre), scale
// = fp16((hi - lo) / (2^bits - 1)), minimum = fp16(lo), code = clamp(rint((x - minimum) / scale)) with the
// FP16 values, ties to even; a zero scale codes 0.
void EncodeBlockScalar(const KvGeometry& g, Format f, const ClipRatios& clip, const float* k, const float* v,
                       int64_t row_stride, int tokens, uint8_t* out);

// The inverse: [tokens][head_dim] F32 of one side. Value = minimum + scale * code, in F32.
void DecodeSideScalar(const KvGeometry& g, Format f, Side side, const uint8_t* block_head, int tokens,
                      float* out);

// In-place orthonormal Walsh-Hadamard transform of one head (its own inverse): x <- H x / sqrt(head_dim).
// Butterflies run from distance 1 up, in F32, scaled at the end, so that every backend gets the same bits.
void HadamardScalar(float* x, int head_dim);

}  // namespace triaxial

#endif  // TRIAXIAL_KV_CODEC_H_
