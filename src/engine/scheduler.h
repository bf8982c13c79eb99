// Who runs in the next step, with how many rows, and who must make room. Plan looks and allocates nothing;
// Commit is the only place that allocates, admits and preempts. Knows formats and bytes, but no model.
//
// The rules, in order:
//  1. Sequences that wait for one token (decode) get their row, oldest first. If the arena has no room for a
//     row's growth, the youngest running sequence is preempted: its blocks are freed and its tokens, output
//     included, are prefilled again later. If only the oldest is left and still does not fit, it fails.
//  2. The rest of the step goes to the prefill of running sequences, oldest first, in chunks; a chunk shrinks
//     to what the arena takes.
//  3. Waiting sequences are admitted in order of arrival, by predicted bytes, never past one that does not
//     fit. Nobody is admitted in a step that ran short of memory.
//  4. If all this yields nothing, the youngest running sequence is preempted, or what is alone fails: every
//     plan makes progress.
#ifndef TRIAXIAL_ENGINE_SCHEDULER_H_
#define TRIAXIAL_ENGINE_SCHEDULER_H_

#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "engine/request.h"
#include "kv/cache.h"

namespace triaxial {

// What the scheduler knows of a request: what its tokens deserve, and how far it got. Owned by the engine.
struct Sequence {
  RequestId id = 0;                // grows with arrival
  std::vector<KvToken> kv_tokens;  // prompt, then output
  int32_t computed = 0;            // leading tokens whose keys and values are in the cache
  SequenceId cache_id = 0;         // 0: not running
  int64_t predicted_rows = 0;      // unit rows that it will take, set when it is queued
  int32_t pending() const { return static_cast<int32_t>(kv_tokens.size()) - computed; }
};

// Unit rows of a sequence once these tokens are in the cache, its tail and one more block of growth included.
int64_t PredictRows(const KvGeometry& geometry, std::span<const KvToken> tokens, int recent_window);

struct SchedulerLimits {
  int32_t max_running = 0;
  int32_t max_step_tokens = 0;  // at least max_running
  int recent_window = 0;        // of the policy, for KvCache::CreateSequence
};

// What a step will do; nothing has happened yet.
struct Plan {
  struct Rows {
    Sequence* sequence;
    int32_t count;
  };
  std::vector<Rows> rows;          // one that is not running is to be admitted
  std::vector<Sequence*> preempt;  // before anything else
  Sequence* fail = nullptr;        // has the arena to itself and does not fit
  void Clear();
};

// What was allocated for a step. Rows are packed in the order of the items.
struct Step {
  struct Item {
    Sequence* sequence;
    int32_t row;    // first row of the step
    int32_t begin;  // first token
    int32_t count;
    std::span<const KvBlockRef> blocks;  // what its attention reads, besides the rows themselves
  };
  std::vector<Item> items;
  std::vector<KvConvert> converts;
  std::vector<KvStore> stores;  // row_begin counts rows of the step
  int32_t rows = 0;
  void Clear();
};

class Scheduler {
 public:
  // Moves the bytes of a block, as KvArena::Move.
  using Move = std::function<void(uint32_t from_row, uint32_t to_row, int rows)>;
  // `cache` must outlive the scheduler.
  Scheduler(const SchedulerLimits& limits, KvCache* cache, Move move);

  void Enqueue(Sequence* sequence);
  // Takes a sequence out, wherever it is, and frees its blocks. Only between steps.
  void Remove(Sequence* sequence);

  void MakePlan(Plan* plan) const;
  // Carries the plan out, except for `fail`. When free rows are scattered, the step takes what fits and the
  // next one begins with a compaction; the items are then the plan's first ones.
  void Commit(const Plan& plan, Step* step);

  bool idle() const { return running_.empty() && waiting_.empty(); }
  int32_t running() const { return static_cast<int32_t>(running_.size()); }
  int32_t waiting() const { return static_cast<int32_t>(waiting_.size()); }
  int64_t preemptions() const { return preemptions_; }
  int64_t compactions() const { return compactions_; }

 private:
  int64_t RowsFor(const Sequence& sequence, int32_t count) const;
  int64_t RowsHeld(const Sequence& sequence) const;
  void PlanAdmissions(int64_t free, int32_t budget, Plan* plan) const;
  void Admit(Sequence* sequence);
  void Preempt(Sequence* sequence);
  bool Append(Sequence* sequence, int32_t count, Step* step);
  void Compact();

  SchedulerLimits limits_;
  KvCache* cache_;
  Move move_;
  std::vector<Sequence*> running_;  // oldest first; all older than those that wait
  std::vector<Sequence*> waiting_;  // likewise; with room for all that run, so that preempting cannot throw
  KvAppend append_;
  bool scattered_ = false;  // the last step met free rows without a long enough run
  int64_t preemptions_ = 0;
  int64_t compactions_ = 0;
};

}  // namespace triaxial

#endif  // TRIAXIAL_ENGINE_SCHEDULER_H_
