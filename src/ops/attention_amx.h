// Fused attention of many query rows on the matrix unit of CPUs with AMX. Queries, keys, values and softmax
// weights are BF16; products are summed, and the softmax is made, in F32. BF16 blocks are multiplied as they
// lie in the cache: their order is that of the unit's right side. Other blocks and the step's own rows are
// expanded to that order, one side of 64 tokens at a time, for all queries of the item: codes that have one
// scale and minimum a token (kRotated, FP8) as they are, which is exact, with scales and minima applied to
// scores and weights; what others stand for takes two BF16 numbers, and so two products.
#ifndef TRIAXIAL_OPS_ATTENTION_AMX_H_
#define TRIAXIAL_OPS_ATTENTION_AMX_H_

#include <cstdint>

#include "ops/attention_item.h"

namespace triaxial {

// Query vectors of an item: what an expanded side is used for.
inline constexpr int kAmxQueries = 256;

// Of one side of a block whose codes are multiplied as they are, for each token. RoundedFactors: what a
// softmax weight is multiplied by before it is rounded, and what it counts then.
struct TokenFactors {
  alignas(64) float scale[kBlockTokens];
  alignas(64) float offset[kBlockTokens];
};
struct RoundedFactors {
  alignas(64) float scale[kBlockTokens];
  alignas(64) float weight[kBlockTokens];
  alignas(64) float offset[kBlockTokens];
};

// Everything a thread needs for one item. A query tile is 16 query vectors.
struct AmxWorkspace {
  static constexpr int kTile = 16;  // rows of a tile, and 32-bit words of each
  static constexpr int kQueryTiles = kAmxQueries / kTile;
  alignas(64) uint16_t q[kQueryTiles][kMaxHeadDim / 32][kTile][32];
  alignas(64) float out[kQueryTiles][kMaxHeadDim / kTile][kTile][kTile];  // sum of weight * value
  alignas(64) float sum[kQueryTiles][kTile][kTile];                       // of weights, lane by lane
  alignas(64) float offset[kQueryTiles][kTile][kTile];  // of weight * the value's offset, likewise
  float top[kQueryTiles][kTile];                        // weights are 2^(score - top)
  float query_sum[kQueryTiles][kTile];                  // of its channels
  alignas(64) float scores[kTile][kBlockTokens];        // of one query tile
  alignas(64) uint16_t weights[kBlockTokens / 32][kTile][32];
  TokenFactors key_factors;  // of unpacked codes
  RoundedFactors value_factors;
  // The right sides of products, and behind them what rounding took from those of expanded blocks.
  alignas(64) uint32_t keys[2][kMaxHeadDim / 2 * kBlockTokens];    // [channel pair][token]
  alignas(64) uint32_t values[2][kBlockTokens / 2 * kMaxHeadDim];  // [token pair][channel]
  alignas(64) float side[kBlockTokens * kMaxHeadDim];              // one, expanded to F32
};

// Whether this CPU has AMX for BF16 and the system lets this process use it.
bool CpuHasAmx();

// Runs one item of at most kAmxQueries; leaves what RunAttentionItem does.
void RunAmxItem(const AttentionArgs& args, const AttentionItem& item, AmxWorkspace& workspace,
                float* partials);

}  // namespace triaxial

#endif  // TRIAXIAL_OPS_ATTENTION_AMX_H_
