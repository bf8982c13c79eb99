// The write path of the cache on the CPU: bit-identical to the scalar codec (kv/codec.h), with SIMD chosen at
// run time.
#ifndef TRIAXIAL_OPS_KV_STORE_H_
#define TRIAXIAL_OPS_KV_STORE_H_

#include <cstdint>
#include <span>

#include "kv/codec.h"
#include "kv/view.h"

namespace triaxial {

// In-place orthonormal Hadamard transform of `count` vectors of head_dim floats; equals HadamardScalar bit
// for bit.
void Hadamard(float* x, int64_t count, int head_dim);

// EncodeBlockScalar for one head of one block, bit for bit.
void EncodeBlock(const KvGeometry& g, Format f, const ClipRatios& clip, const float* k, const float* v,
                 int64_t row_stride, int tokens, uint8_t* out);
// DecodeSideScalar, bit for bit.
void DecodeSide(const KvGeometry& g, Format f, Side side, const uint8_t* block_head, int tokens, float* out);

// Runs a step's stores for one layer over all heads, in parallel over sequences and heads but in order within
// each tail. k, v: [rows][num_kv_heads][head_dim] F32 as attention got them; `row_begin` of a store indexes
// them.
void StoreKv(const KvGeometry& g, const ClipRatios& clip, uint8_t* arena_layer, const float* k,
             const float* v, std::span<const KvStore> stores);
// Runs conversions for one layer. A conversion reads all heads of a block before it writes, so from and to
// may overlap.
void ConvertKv(const KvGeometry& g, const ClipRatios& clip, uint8_t* arena_layer,
               std::span<const KvConvert> converts);

}  // namespace triaxial

#endif  // TRIAXIAL_OPS_KV_STORE_H_
