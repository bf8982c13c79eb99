// The KV cache's bookkeeping: sequences and their block tables, the prefixes that later sequences find again,
// which format each block has, and who owns which unit rows. It allocates and counts; it never touches keys
// or values, and is tested without a model. One thread (the engine's) uses it.
//
// A step: what must make room (Reclaim, AgeBlocks, Compact) first, then Append() for each sequence of the
// batch, then the kernels on View() and on what was listed, then FinishStep(). Append() changes the tables at
// once; views show the appended tokens only after FinishStep(), because attention reads the cache as it was
// and takes the step's own tokens from the step.
//
// Complete blocks of shared sequences are known by what they hold (kv/prefix_tree.h). A block that no
// sequence uses any more stays, until its rows are needed.
//
// What changes the cache asks for the memory of its books first. Where the machine refuses it
// (std::bad_alloc) nothing has changed, except that Reclaim, AgeBlocks and KeepBudget may have done a part of
// their work. FreeSequence, FinishStep, AbortStep, EndWaking and DropCached need none.
#ifndef TRIAXIAL_KV_CACHE_H_
#define TRIAXIAL_KV_CACHE_H_

#include <array>
#include <cstdint>
#include <functional>
#include <map>
#include <span>
#include <string_view>
#include <utility>
#include <vector>

#include "base/status.h"
#include "kv/arena.h"
#include "kv/block.h"
#include "kv/block_heap.h"
#include "kv/format.h"
#include "kv/need.h"
#include "kv/prefix_tree.h"
#include "kv/view.h"

namespace triaxial {

// What a new sequence will hold, to find what is there already.
struct KvPrompt {
  std::string_view salt;  // blocks are shared among sequences of one salt
  std::span<const KvToken> tokens;
  Format min_format = Format::kK2V2;  // a cached block of fewer bits is none
};

// What the cache has of a prompt. The last token is never among it: it has to be computed.
struct KvMatch {
  int32_t begin = 0;      // leading tokens that are there
  int32_t stop = 0;       // where the next cached run begins behind `begin`; the prompt's end if none does
  int32_t tokens = 0;     // in all runs
  int64_t idle_rows = 0;  // unit rows of the blocks before `begin` that no sequence uses now
};

// What committing an append will do, for the kernels. Capacity is kept between steps.
struct KvAppend {
  std::vector<KvConvert> converts;  // to run before attention (blocks that left the recent window)
  std::vector<KvStore> stores;      // to run after attention; row_begin is relative to the appended tokens
};

// Blocks by [from][to][cause] that were re-quantized.
using KvDemotions = std::array<std::array<std::array<int64_t, kCauses>, kFormats>, kFormats>;

class KvCache {
 public:
  KvCache(const KvGeometry& geometry, int64_t total_rows, const TagNeeds& needs,
          PrefixTree::Hash hash = PrefixTree::DefaultHash);

  KvMatch Match(const KvPrompt& prompt) const;
  // A sequence that begins with what Match finds: Length() is match.begin. Matched blocks are its own from
  // now on, and take the age of its tags: those that deserve less wait to be re-quantized (AgeBlocks).
  SequenceId CreateSequence(const KvPrompt& prompt);
  // One that shares nothing.
  SequenceId CreateSequence();
  // Its complete blocks stay for others to find, if it shares; the rest is released, and reusable at once
  // unless the sequence takes part in the current step. Unknown ids are a CHECK, here and below.
  void FreeSequence(SequenceId id);

  // Tokens that it found in the cache and has kept or will come to.
  int32_t MatchedTokens(SequenceId id) const;
  // Tokens that may be appended before the next matched run begins, of which Length() then takes hold.
  int32_t NextStop(SequenceId id) const;
  // Unit rows that appending `tokens` would take beyond what is in use now. Allocates nothing.
  int64_t RowsToAppend(SequenceId id, std::span<const KvToken> tokens) const;
  // Allocates and records the append, at most one a step for a sequence, of at most NextStop tokens (CHECK);
  // overwrites `append` with what the kernels must do. ResourceExhausted, and nothing changed, if rows are
  // missing or no run is long enough.
  Status Append(SequenceId id, std::span<const KvToken> tokens, KvAppend* append);
  // Call once after the kernels of a step ran. Completed blocks can be found from now on.
  void FinishStep();
  // Instead, if they failed: what the step wrote is not to be trusted. Nobody will find those blocks; the
  // sequences that hold them are Lost, to be freed by the caller.
  void AbortStep();
  bool Lost(SequenceId id) const { return Find(id).lost; }

  // The sequence's blocks sorted by format (tail last among bf16), without what the current step appends but
  // with its conversions. Valid until the cache changes, but for appends to other sequences.
  std::span<const KvBlockRef> View(SequenceId id) const;
  int32_t Length(SequenceId id) const;
  // Its blocks in order of position, the tail last; the step's appends included. Valid until the next change.
  std::vector<const KvBlock*> Blocks(SequenceId id) const;
  // The same for each of them: fn(const KvBlock&).
  template <typename Fn>
  void ForEachBlock(SequenceId id, const Fn& fn) const {
    const Sequence& sequence = Find(id);
    for (const BlockId b : sequence.blocks) fn(block(b));
    if (sequence.tail != kNoBlock) fn(block(sequence.tail));
  }

  // The same as handles, and the block behind one: nullptr once it is gone.
  std::vector<BlockHandle> Handles(SequenceId id) const;
  const KvBlock* Block(const BlockHandle& handle) const;

  // Writes a block that leaves the cache to a place of rest.
  using Sleep = std::function<void(const KvBlock& block, const BlockKey& key, const BlockKey& parent)>;
  // Brings free rows up to `rows`, if it can, in this order:
  //  1. re-quantizes blocks, least loss per byte first, as long as that costs at most kPatience times the
  //     price at rest;
  //  2. drops blocks that nobody uses, least valuable first (`sleep` sees them, if given);
  //  3. re-quantizes down to the floors.
  // Conversions are in place, to be run before the step's attention; their rows can be used at once by stores
  // of this step. Without `converts` only the second happens, and the rows are free for anything. Only before
  // the step's first Append (CHECK). Returns the free rows.
  int64_t Reclaim(int64_t rows, std::vector<KvConvert>* converts, const Sleep& sleep);
  // Re-quantizes up to `blocks` of those that wait since their tags grew older, in place, as above. One in
  // the recent window of somebody who holds it stays as it is, until it is matched again.
  void AgeBlocks(int blocks, std::vector<KvConvert>* converts);
  int64_t ageing() const { return static_cast<int64_t>(ageing_.size()); }
  // Likewise up to `blocks`, cheapest loss per byte first, while complete blocks have more bits than the
  // budget and fill more than half of the arena.
  void KeepBudget(int blocks, std::vector<KvConvert>* converts);
  // Rows that Reclaim can bring: of blocks that nobody uses, nor any behind them, and of others above their
  // floor.
  int64_t ReclaimableRows() const { return slack_rows_; }
  static constexpr double kPatience = 8;
  // Puts all blocks that nobody uses to rest; they stay.
  void SleepAll(const Sleep& sleep);

  // For blocks that come back: the longest run of cached blocks that a prompt begins with, and the key of the
  // last of them (of the salt, if there is none).
  struct Waking {
    NodeId node = kNoNode;
    int32_t blocks = 0;
    BlockKey key;
  };
  Waking Awake(const KvPrompt& prompt);
  // The same, and the run stays until EndWaking. One at a time (CHECK).
  Waking BeginWaking(const KvPrompt& prompt);
  // Adds a block behind waking->node and moves on, if a run of rows is free and `fill` could bring its bytes
  // there; else false, and nothing changed.
  bool Wake(Format format, std::span<const KvToken> tokens,
            const std::function<bool(uint32_t unit_row)>& fill, Waking* waking);
  void EndWaking();

  // True if appends that take `rows` in all fit, after compaction at the latest.
  bool Fits(int64_t rows) const { return rows <= allocator_.free_rows(); }
  // True if they fit as the arena is now. (A single block may fit even where this is false.)
  bool FitsWithoutCompaction(int64_t rows) const { return rows <= allocator_.largest_run(); }
  // Slides blocks together so that all free rows form one run. Calls move(from_row, to_row, rows) in an order
  // in which each move's destination is free or overlaps only its own source. Only between steps (CHECK).
  void Compact(const std::function<void(uint32_t from_row, uint32_t to_row, int rows)>& move);
  // Forgets every cached prefix, those of running sequences too (they keep their blocks).
  void DropCached();

  const KvUsage& Usage() const { return usage_; }  // all blocks, each once, cached ones too
  KvUsage Usage(SequenceId id) const;              // those of one sequence
  const std::array<int64_t, kTags>& TokensByTag() const { return tokens_by_tag_; }
  int64_t free_rows() const { return allocator_.free_rows(); }
  int64_t total_rows() const { return allocator_.total_rows(); }
  int64_t cached_rows() const { return cached_rows_; }      // of blocks that no sequence uses
  int64_t cached_tokens() const { return cached_tokens_; }  // in them
  double price() const { return price_; }
  const KvDemotions& demotions() const { return demotions_; }
  int64_t evictions() const { return evictions_; }
  int64_t step() const { return step_; }
  const KvGeometry& geometry() const { return geometry_; }
  const TagNeeds& needs() const { return needs_; }

  // Free + used rows equal the arena, no two blocks overlap, users equal the tables that hold a block, the
  // tree and the orders of demotion and eviction agree with the blocks, and so do counters and views.
  // Internal error that says which. O(everything): for tests and on demand.
  Status CheckIntegrity() const;

 private:
  struct Sequence {
    std::vector<BlockId> blocks;  // complete, in order of position
    std::vector<BlockId> ahead;   // matched runs to come, last first
    BlockId tail = kNoBlock;
    int32_t length = 0;
    NodeId node = kNoNode;  // of the deepest of `blocks` that are in the tree, pinned; none: shares nothing
    Format min_format = Format::kK2V2;
    int32_t prompt_length = 0;                // what it was created for; may be less than it has come to
    size_t entered = 0;                       // blocks before this one are in the tree
    size_t settled = 0;                       // blocks before this one have left the recent window
    int64_t last_step = 0;                    // in which it was appended to
    bool lost = false;                        // holds blocks that are not to be trusted
    std::vector<KvBlockRef> view;             // complete blocks by format, then the tail
    std::array<int32_t, kFormats> in_view{};  // complete blocks of each format in `view`
    size_t viewed = 0;                        // complete blocks in `view`: the first so many of `blocks`
  };
  // What an append does to one block: fills the tail further, moves it to a larger place, or completes it.
  struct Fill {
    int32_t row_begin = 0;
    uint8_t from_tail = 0;
    uint8_t rows = 0;
    Format format = Format::kBf16;  // that it has afterwards
    uint8_t capacity = kBlockTokens;
    bool allocates = false;
    bool completes() const { return from_tail + rows == kBlockTokens; }
  };
  struct Plan {
    std::vector<BlockId> conversions;
    std::vector<Format> wishes;  // of those
    std::vector<Fill> fills;
    size_t settled = 0;
    int64_t rows = 0;  // to allocate
  };

  const Sequence& Find(SequenceId id) const;
  Sequence& Find(SequenceId id) { return const_cast<Sequence&>(std::as_const(*this).Find(id)); }
  const KvBlock& block(BlockId id) const { return blocks_[static_cast<size_t>(id)]; }
  KvBlock& block(BlockId id) { return blocks_[static_cast<size_t>(id)]; }
  int Units(Format format) const { return UnitsOf(geometry_, format); }
  int Units(const KvBlock& b) const { return UnitsOf(geometry_, b.format, b.capacity); }
  int64_t Bytes(const KvBlock& b) const { return BlockBytes(geometry_, b.format, b.capacity); }

  // cache.cc
  Format FormatOfBlock(const Sequence& sequence, const KvBlock* tail, size_t from_tail,
                       std::span<const KvToken> rows, int64_t position) const;
  void MakePlan(const Sequence& sequence, std::span<const KvToken> tokens) const;  // into plan_
  void ReservePlan(Sequence* sequence, KvAppend* append);
  Status AllocatePlan(size_t tokens);  // into rows_
  void Extend(SequenceId id, Sequence* sequence, const Fill& fill, std::span<const KvToken> tokens,
              uint32_t row, KvStore* store);
  void ReserveBlocks(size_t more);
  BlockId NewBlock(Format format, int capacity, uint32_t unit_row, int32_t position);
  void FreeBlock(BlockId id, bool in_step);
  void CountBlock(const KvBlock& b, int sign);
  void ReserveChanges(std::span<const BlockId> ids, std::vector<KvConvert>* converts);
  void ChangeFormat(BlockId id, Format to, Cause cause, std::vector<KvConvert>* converts);
  void AddToView(Sequence* sequence, const KvBlock& block) const;
  void MoveInView(Sequence* sequence, uint32_t unit_row, Format from, Format to) const;
  void RefreshView(Sequence* sequence) const;

  // cache_reuse.cc
  NodeId ChildOf(NodeId node, std::span<const KvToken> tokens) const;
  void Hold(SequenceId id, BlockId b);
  void Release(SequenceId id, BlockId b, bool in_step);
  void MoveTo(Sequence* sequence, NodeId node);
  void Pin(NodeId node);
  void Unpin(NodeId node);
  void CountReason(NodeId node, int32_t by);
  void Adopt(Sequence* sequence);
  void MeetNeed(const Sequence& sequence, BlockId b, std::span<const KvToken> tokens);
  void EnterTree(SequenceId id, Sequence* sequence);
  bool ReserveHolder(BlockId b);

  // cache_reclaim.cc
  void Reorder(BlockId id);  // its places among the blocks to demote and to drop
  void Unlist(BlockId id);   // out of both
  double ValueOf(const KvBlock& b) const;
  bool Recent(const KvBlock& b) const;
  int FloorRows(const KvBlock& b) const;
  void RelaxPrice();
  bool Demote(double limit, Cause cause, std::vector<KvConvert>* converts);
  bool Evict(const Sleep& sleep);
  void SleepBlock(const KvBlock& b, const Sleep& sleep);

  Status CheckSequence(const Sequence& sequence) const;
  Status CheckTree() const;

  KvGeometry geometry_;
  TagNeeds needs_;
  UnitAllocator allocator_;
  PrefixTree tree_;
  std::vector<KvBlock> blocks_;
  std::vector<BlockId> free_blocks_;
  std::map<SequenceId, Sequence> sequences_;
  SequenceId next_id_ = 1;
  int64_t next_serial_ = 1;

  int64_t step_ = 1;
  std::vector<SequenceId> in_step_;                      // appended to since the last FinishStep
  std::vector<std::pair<uint32_t, int>> freed_in_step_;  // (row, rows)
  std::vector<BlockId> converted_;                       // in this step

  BlockHeap demotable_;          // by loss per byte of the next step down
  BlockHeap evictable_;          // by value
  std::vector<BlockId> ageing_;  // deserve less since they were matched; may hold stale ids
  double price_ = 0;
  NodeId waking_ = kNoNode;
  double clock_ = 0;  // what a block that costs nothing would be worth now
  int64_t cached_rows_ = 0;
  int64_t cached_tokens_ = 0;
  int64_t slack_rows_ = 0;

  KvUsage usage_;
  std::array<int64_t, kTags> tokens_by_tag_{};
  KvDemotions demotions_{};
  int64_t evictions_ = 0;

  mutable Plan plan_;           // scratch of RowsToAppend and Append
  std::vector<uint32_t> rows_;  // scratch of Append: first rows of what plan_ allocates, in its order
};

}  // namespace triaxial

#endif  // TRIAXIAL_KV_CACHE_H_
