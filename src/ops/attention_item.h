// The unit of work of fused attention (internal to ops/attention.cc): query rows of one sequence and KV head
// against a range of its context, block by block with an online softmax.
#ifndef TRIAXIAL_OPS_ATTENTION_ITEM_H_
#define TRIAXIAL_OPS_ATTENTION_ITEM_H_

#include <cstdint>

#include "ops/attention.h"

namespace triaxial {

// Query vectors of an item: its rows times the query heads of the group, [row][head]. A multiple of four, the
// register block of all kernels.
inline constexpr int kItemQueries = 64;
// Up to so many queries read FP8 codes directly; more of them expand a tile first.
inline constexpr int kFewQueries = 8;
inline constexpr int kMaxHeadDim = 128;
inline constexpr int kSumLanes = 16;  // the widest vector
inline constexpr int kMaxChannelGroups = kMaxHeadDim / kPaperGroup;
inline constexpr float kLog2e = 1.44269504f;  // scores are exponents of 2
// Scores may pass top by this much (weights 2^8) before top follows: it rarely moves after the first tile,
// and then nothing waits for a maximum over lanes.
inline constexpr float kSlack = 8;

struct AttentionItem {
  const AttentionSequence* sequence = nullptr;
  int kv_head = 0;
  int row = 0;  // first row, within the sequence
  int rows = 0;
  int64_t block_begin = 0;
  int64_t block_end = 0;
  bool step = false;           // attends to the step's own rows too
  bool matrix = false;         // for ops/attention_amx.h, which takes more queries
  int64_t partial_place = -1;  // of its PartialState among the partial states; -1: writes args.out
};

// Offset of query vector i of an item in args.q and args.out.
inline int64_t QueryPlace(const AttentionArgs& args, const AttentionItem& item, int i) {
  const int group = args.num_heads / args.geometry.num_kv_heads;
  const int64_t row = int64_t{item.sequence->row_begin} + item.row + i / group;
  return (row * args.num_heads + int64_t{item.kv_head} * group + i % group) * args.geometry.head_dim;
}
// Offset of the item's head in args.k and args.v, of row `row` of its sequence.
inline int64_t KvPlace(const AttentionArgs& args, const AttentionItem& item, int row) {
  const int64_t heads = (int64_t{item.sequence->row_begin} + row) * args.geometry.num_kv_heads + item.kv_head;
  return heads * args.geometry.head_dim;
}
// What the cache holds of the item's head in a block of its sequence.
inline const uint8_t* BlockHead(const AttentionArgs& args, const AttentionItem& item, int64_t block) {
  const KvBlockRef& ref = item.sequence->blocks[static_cast<size_t>(block)];
  return args.arena + int64_t{ref.unit_row} * UnitRowBytes(args.geometry) +
         int64_t{item.kv_head} * HeadBytes(args.geometry, ref.format, ref.capacity);
}

// Where an item leaves its state if others share its context: o (not normalized) [queries][head_dim], then
// top [queries] and the sum of weights [queries]: weights are 2^(score - top).
inline int64_t PartialFloats(int queries, int head_dim) { return int64_t{queries} * (head_dim + 2); }

// Everything a thread needs for one item. Rows of matrices lie kMaxHeadDim or kBlockTokens apart whatever the
// geometry. Starts zeroed, so that what pads a register block is a number.
struct AttentionWorkspace {
  alignas(64) float q[kItemQueries * kMaxHeadDim];        // times scale * log2(e)
  alignas(64) float scores[kItemQueries * kBlockTokens];  // of one tile; then the weights 2^(score - top)
  alignas(64) float out[kItemQueries * kMaxHeadDim];      // sum of weight * value
  alignas(64) float tile[kBlockTokens * kMaxHeadDim];     // one side of one block, expanded
  alignas(64) float sum[kItemQueries * kSumLanes];        // of weights, lane by lane
  alignas(64) float large_q[kFewQueries * kMaxHeadDim];   // q * 2^60, beside FP8 keys
  float top[kItemQueries];                                // weights are 2^(score - top)
  float keep[kItemQueries];                               // factor of `out` for the tile's top

  // Rows of the integer kernels in fixed point, a byte a plane, the most significant one first.
  struct Planes {
    alignas(64) int8_t bytes[kItemQueries][3][kMaxHeadDim];
    float step[kItemQueries];                    // of the last plane used
    float sum[kMaxChannelGroups][kItemQueries];  // what multiplies no code: see the kernels
  };
  Planes queries;
  float coarse_sum[kItemQueries];  // queries.sum[0] of the first two planes
  Planes weights;
};

// Runs one item with vectors of this machine. With `integer`, compressed blocks go through the kernels of
// ops/attention_vnni.h, else they are expanded a tile at a time.
void RunAttentionItem(const AttentionArgs& args, const AttentionItem& item, bool integer,
                      AttentionWorkspace& workspace, float* partials);

// A compressed side of a block (not 16 bits) to F32 [depth][lane], as docs/kv-format.md calls them.
void ExpandSide(const KvGeometry& g, Side side, int bits, const uint8_t* in, float* tile);

}  // namespace triaxial

#endif  // TRIAXIAL_OPS_ATTENTION_ITEM_H_
