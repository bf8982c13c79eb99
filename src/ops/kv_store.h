// The write path of the cache on the CPU: a step's stores and conversions, quantized by ops/kv_codec.h.
#ifndef TRIAXIAL_OPS_KV_STORE_H_
#define TRIAXIAL_OPS_KV_STORE_H_

#include <cstdint>
#include <span>

#include "kv/view.h"
#include "ops/kv_codec.h"

namespace triaxial {

// Runs a step's stores for one layer over all heads, in parallel over heads and tails, in order among stores
// of the same tail_row (see KvStore). k, v: [rows][num_kv_heads][head_dim] F32 as attention got them;
// `row_begin` of a store indexes them. Every value is rounded to BF16 before it is quantized, so a block's
// bytes do not depend on how its tokens were spread over steps (some waited in the tail, some did not). A
// store that opens a tail (from_tail 0) zeroes the places of the tokens to come.
void StoreKv(const KvGeometry& g, const ClipRatios& clip, uint8_t* arena_layer, const float* k,
             const float* v, std::span<const KvStore> stores);
// Runs conversions for one layer, in parallel. A conversion is in place and into fewer bits, or overlaps
// nothing; different conversions do not overlap. A side whose bits stay is copied: encoded
// again, a clipped range would be clipped again.
void ConvertKv(const KvGeometry& g, const ClipRatios& clip, uint8_t* arena_layer,
               std::span<const KvConvert> converts);

}  // namespace triaxial

#endif  // TRIAXIAL_OPS_KV_STORE_H_
