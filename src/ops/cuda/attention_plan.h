// The work of a step as the attention kernels read it. Built on the host, without CUDA.
#ifndef TRIAXIAL_OPS_CUDA_ATTENTION_PLAN_H_
#define TRIAXIAL_OPS_CUDA_ATTENTION_PLAN_H_

#include <cstdint>
#include <span>
#include <vector>

#include "ops/attention.h"

namespace triaxial::cuda {

// Query heads that one item of decode serves: the N of the tensor cores' m16n8k16.
inline constexpr int kItemHeads = 8;

// A piece of decode attention for one thread block: up to 8 query heads of one KV head, over a run of a
// sequence's blocks, which are sorted by format. Work is counted in pieces: one of a block at 2 and 4 bits,
// two (of 32 tokens) of an FP8 block, four (of 16) of a BF16 block. `heads` 0 ends the list.
struct alignas(16) DecodeItem {
  int32_t row = 0;  // of q and out
  int16_t kv_head = 0;
  int16_t first_head = 0;  // query head
  int32_t heads = 0;       // 1 to 8
  int32_t items = 0;       // of the whole plan
  int32_t table = 0;       // index of the first block
  int32_t end[5] = {};     // pieces up to the end of k2v2, k4v2, k4v4, fp8, bf16
  int32_t split = 0;       // of `splits`; split 0 also attends to the row itself
  int32_t splits = 0;
  int32_t slot = 0;     // of split 0 in the workspace of partial results
  int32_t counter = 0;  // of finished splits
  int32_t unused[2] = {};
};
static_assert(sizeof(DecodeItem) == 64);

struct DecodePlan {
  std::vector<KvBlockRef> table;  // of all sequences, each sorted by format
  std::vector<DecodeItem> items;  // heaviest first
  int slots = 0;
  int counters = 0;
};

struct DecodeMachine {
  int blocks = 0;  // thread blocks that run at a time
  int warps = 0;   // of each, which take pieces in turn
};

// The sequences with exactly one row. At most MaxItems(...) items and slots come out. `splits`: of the
// longest sequence, the others in proportion; 0 chooses the number that makes the step shortest.
void PlanDecode(const KvGeometry& geometry, int num_heads, const DecodeMachine& machine,
                std::span<const AttentionSequence> sequences, DecodePlan* plan, int splits = 0);
// Of any plan with so many sequences.
int MaxItems(const KvGeometry& geometry, int num_heads, const DecodeMachine& machine, int sequences);

// A block as prefill reads it; or up to 64 rows of the step (a tile), where unit_row is the first of them and
// the last three do not count.
struct PrefillBlock {
  uint32_t unit_row = 0;
  uint8_t tokens = 0;
  uint8_t capacity = 0;
  uint8_t k_bits = 0, v_bits = 0;
};
static_assert(sizeof(PrefillBlock) == 8);

// Tiles of rows are made for each KV head, keys and values, FP16.
constexpr int64_t PrefillTileBytes(int head_dim) { return int64_t{2} * kBlockTokens * head_dim * 2; }

// Queries that share a KV head, for two thread blocks: rows and heads of the group count together, row r and
// head h as r * group + h.
inline constexpr int kPrefillItemQueries = 256;
struct alignas(16) PrefillItem {
  int32_t row_begin = 0;  // of the sequence
  int32_t rows = 0;       // likewise
  int32_t first = 0;      // (row, head) of the first query
  int32_t kv_head = 0;
  int32_t table = 0;  // index of the sequence's first block
  int32_t blocks = 0;
  int32_t row_tile = 0;  // the sequence's first
};
static_assert(sizeof(PrefillItem) == 32);

struct PrefillPlan {
  std::vector<PrefillBlock> table;  // blocks, then tiles of rows
  int row_tiles = 0;
  std::vector<PrefillItem> items;
};

// The sequences with `least` rows or more, for a machine that takes `at_a_time` items.
void PlanPrefill(const KvGeometry& geometry, int num_heads, int at_a_time, int least,
                 std::span<const AttentionSequence> sequences, PrefillPlan* plan);
// Items of any plan with so many sequences and rows.
int MaxPrefillItems(const KvGeometry& geometry, int num_heads, int sequences, int rows);
constexpr int MaxRowTiles(int sequences, int rows) { return sequences + rows / kBlockTokens; }

}  // namespace triaxial::cuda

#endif  // TRIAXIAL_OPS_CUDA_ATTENTION_PLAN_H_
