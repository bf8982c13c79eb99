// The KV cache's bookkeeping: sequences, their block tables, and who owns which unit rows. It allocates and
// counts; it never touches keys or values, and is tested without a model. One thread (the engine's) uses it.
//
// A step: Append() for each sequence of the batch, run the kernels on View() and what Append() listed, then
// FinishStep(). Append() changes the tables at once; views show the appended tokens only after FinishStep(),
// because attention reads the cache as it was and takes the step's own tokens from the step.
#ifndef TRIAXIAL_KV_CACHE_H_
#define TRIAXIAL_KV_CACHE_H_

#include <array>
#include <cstdint>
#include <functional>
#include <span>
#include <unordered_map>
#include <utility>
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
  std::array<int64_t, kFormats> bytes{};  // whole blocks, metadata included; a tail counts all of its block
  int64_t tail_tokens = 0;                // the part of `tokens`/`bytes` [kBf16] that are tails of sequences
  int64_t tail_bytes = 0;
  int64_t total_tokens() const;
  int64_t total_bytes() const;
  // Stored bits per element, metadata and tails included; 0 for an empty cache.
  double effective_bits(const KvGeometry& geometry) const;
  KvUsage& operator+=(const KvUsage& other);
  bool operator==(const KvUsage&) const = default;
};

// What committing an append will do, for the kernels. Capacity is kept between steps.
struct KvAppend {
  std::vector<KvConvert> converts;  // to run before attention (blocks that left the recent window)
  std::vector<KvStore> stores;      // to run after attention; row_begin is relative to the appended tokens
};

class KvCache {
 public:
  KvCache(const KvGeometry& geometry, int64_t total_rows);

  // A complete block stays BF16 while any of its tokens is among the sequence's newest `recent_window` in the
  // cache; then it takes the BlockFormat of its tokens' wishes: when it is stored, or by a conversion at the
  // start of the next step.
  SequenceId CreateSequence(int recent_window);
  // Releases every block that no other sequence uses, and the tail; reusable at once unless the sequence
  // takes part in the current step. Unknown ids are a CHECK, here and below.
  void FreeSequence(SequenceId id);

  // Unit rows that appending `tokens` would take beyond what is in use now. Allocates nothing.
  int64_t RowsToAppend(SequenceId id, std::span<const KvToken> tokens) const;
  // Allocates and records the append, at most one a step for a sequence (CHECK); overwrites `append` with
  // what the kernels must do. ResourceExhausted, and nothing changed, if rows are missing or no run is long
  // enough. Rows that conversions leave are reusable only after FinishStep().
  Status Append(SequenceId id, std::span<const KvToken> tokens, KvAppend* append);
  // Drops the newest tokens of a sequence down to `length`; only tokens still in the tail can be dropped
  // (CHECK).
  void TruncateTail(SequenceId id, int32_t length);
  // Call once after the kernels of a step ran.
  void FinishStep();

  // The sequence's blocks sorted by format (tail last among bf16), without what the current step appends but
  // with its conversions. Valid until FinishStep, TruncateTail, Compact or FreeSequence.
  std::span<const KvBlockRef> View(SequenceId id) const;
  int32_t Length(SequenceId id) const;
  // Its blocks in order of position, the tail last; the step's appends included. Valid until the next Append.
  std::vector<const KvBlock*> Blocks(SequenceId id) const;

  // True if appends that take `rows` in all fit, after compaction at the latest.
  bool Fits(int64_t rows) const { return rows <= allocator_.free_rows(); }
  // True if they fit as the arena is now. (A single block may fit even where this is false.)
  bool FitsWithoutCompaction(int64_t rows) const { return rows <= allocator_.largest_run(); }
  // Slides blocks together so that all free rows form one run. Calls move(from_row, to_row, rows) in an order
  // in which each move's destination is free or overlaps only its own source. Only between steps (CHECK).
  void Compact(const std::function<void(uint32_t from_row, uint32_t to_row, int rows)>& move);

  const KvUsage& Usage() const { return usage_; }  // all blocks, each once
  KvUsage Usage(SequenceId id) const;              // those of one sequence
  const std::array<int64_t, kTags>& TokensByTag() const { return tokens_by_tag_; }
  int64_t free_rows() const { return allocator_.free_rows(); }
  int64_t total_rows() const { return allocator_.total_rows(); }
  const KvGeometry& geometry() const { return geometry_; }

  // Free + used rows equal the arena, no two blocks overlap, users equal the tables that hold a block,
  // counters and views agree with the blocks. Internal error that says which. O(everything): for tests and
  // idle times.
  Status CheckIntegrity() const;

 private:
  struct Sequence {
    std::vector<BlockId> blocks;  // complete, in order of position
    BlockId tail = -1;            // kept, possibly without tokens, until it becomes a BF16 block; -1: none
    int32_t length = 0;
    int32_t recent_window = 0;
    size_t settled = 0;                       // blocks before this one have left the recent window
    int64_t last_step = 0;                    // in which it was appended to
    std::vector<KvBlockRef> view;             // complete blocks by format, then the tail
    std::array<int32_t, kFormats> in_view{};  // complete blocks of each format in `view`
    size_t viewed = 0;                        // complete blocks in `view`: the first so many of `blocks`
  };
  // What an append does to one block: fills it further, or completes it.
  struct Fill {
    int32_t row_begin = 0;
    uint8_t from_tail = 0;
    uint8_t rows = 0;
    Format format = Format::kBf16;  // that it has afterwards
    bool allocates = false;
    bool in_place() const { return format == Format::kBf16; }
    bool completes() const { return from_tail + rows == kBlockTokens; }
  };
  struct Plan {
    std::vector<std::pair<BlockId, Format>> conversions;
    std::vector<Fill> fills;
    size_t settled = 0;
    int64_t rows = 0;  // to allocate
  };

  const Sequence& Find(SequenceId id) const;
  Sequence& Find(SequenceId id) { return const_cast<Sequence&>(std::as_const(*this).Find(id)); }
  const KvBlock& block(BlockId id) const { return blocks_[static_cast<size_t>(id)]; }
  KvBlock& block(BlockId id) { return blocks_[static_cast<size_t>(id)]; }
  int Units(Format format) const { return UnitsOf(geometry_, format); }

  void MakePlan(const Sequence& sequence, std::span<const KvToken> tokens) const;  // into plan_
  Status AllocatePlan(size_t tokens);                                              // into rows_
  void Convert(Sequence* sequence, BlockId id, Format to, uint32_t to_row, KvAppend* append);
  void Extend(Sequence* sequence, const Fill& fill, std::span<const KvToken> tokens, uint32_t row,
              KvStore* store);
  BlockId NewBlock(Format format, uint32_t unit_row, int32_t position);
  void ReleaseBlock(BlockId id, bool in_step);
  void AddToView(Sequence* sequence, const KvBlock& block) const;
  void RefreshView(Sequence* sequence) const;
  Status CheckSequence(const Sequence& sequence) const;

  KvGeometry geometry_;
  UnitAllocator allocator_;
  std::vector<KvBlock> blocks_;
  std::vector<BlockId> free_blocks_;
  std::unordered_map<SequenceId, Sequence> sequences_;
  SequenceId next_id_ = 1;

  int64_t step_ = 1;
  std::vector<SequenceId> in_step_;                      // appended to since the last FinishStep
  std::vector<std::pair<uint32_t, int>> freed_in_step_;  // (row, rows)

  KvUsage usage_;
  std::array<int64_t, kTags> tokens_by_tag_{};

  mutable Plan plan_;           // scratch of RowsToAppend and Append
  std::vector<uint32_t> rows_;  // scratch of Append: first rows of what plan_ allocates, in its order
};

}  // namespace triaxial

#endif  // TRIAXIAL_KV_CACHE_H_
