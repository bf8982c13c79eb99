// The codec with SIMD chosen at run time: bit-identical to the scalar one (kv/codec.h) on every instruction
// set. A NaN stays a NaN, but which one is not specified.
#ifndef TRIAXIAL_OPS_KV_CODEC_H_
#define TRIAXIAL_OPS_KV_CODEC_H_

#include <cstdint>

#include "kv/codec.h"

namespace triaxial {

// In-place orthonormal Hadamard transform of `count` vectors of head_dim floats; equals HadamardScalar bit
// for bit. Parallel when there are many.
void Hadamard(float* x, int64_t count, int head_dim);

// EncodeBlockScalar for one head of one block, bit for bit, and one side of it.
void EncodeBlock(const KvGeometry& g, Format f, const ClipRatios& clip, const float* k, const float* v,
                 int64_t row_stride, int tokens, uint8_t* out, int capacity = kBlockTokens);
void EncodeSide(const KvGeometry& g, Format f, Side side, const ClipRatios& clip, const float* x,
                int64_t row_stride, int tokens, uint8_t* block_head, int capacity = kBlockTokens);

// DecodeSideScalar, bit for bit.
void DecodeSide(const KvGeometry& g, Format f, Side side, const uint8_t* block_head, int tokens, float* out,
                int capacity = kBlockTokens);

// out[i] = the BF16 nearest to x[i]; n is a multiple of 16. x may be out.
void RoundToBf16(const float* x, int64_t n, float* out);

}  // namespace triaxial

#endif  // TRIAXIAL_OPS_KV_CODEC_H_
