// The KV cache's bookkeeping: sequences, their block tables, and who owns which unit rows. It allocates and
// counts; it never touches keys or values, and is tested without a model. One thread (the engine's) uses it.
#ifndef TRIAXIAL_KV_CACHE_H_
#define TRIAXIAL_KV_CACHE_H_

#include <array>
#include <cstdint>
#include <span>
#include <unordered_map>
#include <vector>

#include "base/status.h"
#include "kv/arena.h"
#include "kv/format.h"
#include "kv/tag.h"
#include "kv/view.h"

namespace triaxial {

using SequenceId = int64_t;
using BlockId = int32_t;

// A token about to be appended: what it is and what its tag deserves.
struct KvToken {
  uint8_t tag = 0;  // Tag::index()
  Format wish = Format::kBf16;
};

struct KvBlock {
  uint32_t unit_row = 0;
  int32_t position = 0;  // of its first token in the sequence
  uint8_t tokens = 0;    // 64 once complete
  Format format = Format::kBf16;
  int32_t users = 0;  // sequences whose table holds it; 0: free slot
  std::array<KvToken, kBlockTokens> token{};
};

// Bytes and tokens in use, from the blocks themselves.
struct KvUsage {
  std::array<int64_t, kFormats> tokens{};
  std::array<int64_t, kFormats>
      bytes{};              // whole blocks, metadata included; a tail counts all of its BF16 block
  int64_t tail_tokens = 0;  // the part of `tokens`/`bytes` [kBf16] that are tails of sequences
  int64_t tail_bytes = 0;
  int64_t total_tokens() const;
  int64_t total_bytes() const;
  // Stored bits per element, metadata and tails included; 0 for an empty cache.
  double effective_bits(const KvGeometry& geometry) const;
  KvUsage& operator+=(const KvUsage& other);
};

// What committing an append will do, for the kernels. Capacity is kept between steps.
struct KvAppend {
  std::vector<KvConvert> converts;  // to run before attention (blocks that left the recent window)
  std::vector<KvStore> stores;      // to run after attention; row_begin is relative to the appended tokens
};

class KvCache {
 public:
  KvCache(const KvGeometry& geometry, int64_t total_rows);

  SequenceId CreateSequence(int recent_window);
  // Releases every block that no other sequence uses, and the tail. Unknown ids are a CHECK.
  void FreeSequence(SequenceId id);

  // Unit rows that appending `tokens` would take beyond what is in use now. Allocates nothing.
  int64_t RowsToAppend(SequenceId id, std::span<const KvToken> tokens) const;
  // Allocates and records the append; fills `append` with what the kernels must do in this step.
  // ResourceExhausted, and nothing changed, if rows are missing. Rows that become free by converts or
  // completed tails are reusable only after FinishStep(). The caller runs Compaction first when free rows
  // suffice but no run is long enough.
  Status Append(SequenceId id, std::span<const KvToken> tokens, KvAppend* append);
  // Drops the newest tokens of a sequence down to `length`; only tokens still in the tail can be dropped
  // (CHECK).
  void TruncateTail(SequenceId id, int32_t length);
  // Call once after the kernels of a step ran.
  void FinishStep();

  // The sequence's blocks sorted by format (tail last among bf16). Between Append and FinishStep it is what
  // the step's attention reads: the converts of that Append done, its tokens not yet in it. From FinishStep on
  // it has them. Valid until FinishStep, Compact or FreeSequence; at most one Append per sequence and step.
  std::span<const KvBlockRef> View(SequenceId id) const;
  int32_t Length(SequenceId id) const;
  // Its blocks in order of position, the tail last.
  std::vector<const KvBlock*> Blocks(SequenceId id) const;

  // True if `rows` fit in one run after compaction at the latest.
  bool Fits(int64_t rows) const { return rows <= allocator_.free_rows(); }
  // Slides blocks together so that all free rows form one run. Calls move(from_row, to_row, rows) in an order
  // in which each move's destination is free or overlaps only its own source. Only between steps.
  template <typename Move>
  void Compact(const Move& move);

  KvUsage Usage() const;               // all blocks, each once
  KvUsage Usage(SequenceId id) const;  // those of one sequence
  std::array<int64_t, kTags> TokensByTag() const;
  int64_t free_rows() const { return allocator_.free_rows(); }
  int64_t total_rows() const { return allocator_.total_rows(); }
  const KvGeometry& geometry() const { return geometry_; }

  // free + used rows equal the arena, users equal the tables that hold a block, no two blocks overlap.
  // InternalError says which.
  Status CheckIntegrity() const;

 private:
  struct Sequence;
  KvGeometry geometry_;
  UnitAllocator allocator_;
  std::vector<KvBlock> blocks_;
  std::vector<BlockId> free_blocks_;
  std::unordered_map<SequenceId, Sequence> sequences_;
  std::vector<std::pair<uint32_t, int>> freed_in_step_;  // (row, rows)
  SequenceId next_id_ = 1;
};

}  // namespace triaxial

#endif  // TRIAXIAL_KV_CACHE_H_
