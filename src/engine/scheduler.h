// Who runs in the next step, with how many rows, and who must make room. Plan looks and allocates nothing;
// Commit is the only place that allocates, re-quantizes, puts to sleep, drops, admits and preempts. Knows
// formats and bytes, but no model.
//
// The rules, in order:
//  1. Sequences that wait for one token (decode) get their row: higher priority first, then older first. If
//     even what can be reclaimed has no room for a row's growth, the last of them is preempted: it gives up
//     its blocks (which stay cached while there is room) and is prefilled again later, output included. If
//     the first is left alone in a later plan and still does not fit, it fails.
//  2. The rest of the step goes to the prefill of running sequences in the same order, in chunks; a chunk
//     shrinks to what the arena takes.
//  3. Waiting sequences are admitted by predicted bytes, once their sleeping blocks are back, a few each step
//     and for one sequence at a time: by priority; those that were preempted before new
//     ones; then the API key that has been served least, and its requests in order of arrival. None overtakes
//     one that does not fit. Nobody is admitted in a step that ran short of memory. Where nobody runs, the
//     first is admitted whatever was predicted.
//  4. If all this yields nothing and no block waits to be re-quantized for its age, the last running sequence
//     is preempted, or what is alone fails: every plan makes progress.
// Room is made in the order that KvCache::Reclaim says.
#ifndef TRIAXIAL_ENGINE_SCHEDULER_H_
#define TRIAXIAL_ENGINE_SCHEDULER_H_

#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <span>
#include <string>
#include <vector>

#include "engine/kv_backing.h"
#include "engine/request.h"
#include "kv/cache.h"

namespace triaxial {

// An API key. Served tokens are counted as in Sheng et al., "Fairness in serving large language models"
// (VTC): one that comes back starts level with the least served of those that are there, unless it was served
// more.
struct Tenant {
  std::deque<struct Sequence*> waiting;  // in order of arrival; of one priority class
  int32_t requests = 0;                  // waiting and running
  double served = 0;
};

// The tenants of a priority class.
class TenantClass {
 public:
  Tenant* Arrive(const std::string& name, struct Sequence* sequence);  // which waits
  void Leave(Tenant* tenant);                                          // one of its requests ended
  const std::map<std::string, Tenant, std::less<>>& tenants() const { return tenants_; }

  // Tenants without requests that are remembered, those that were served most.
  static constexpr size_t kRemembered = 256;

 private:
  void RaiseLevel();

  std::map<std::string, Tenant, std::less<>> tenants_;
  size_t present_ = 0;  // those with requests
  double level_ = 0;    // where somebody starts who is not known
};

// What the scheduler knows of a request: what its tokens are, and how far it got. Owned by the engine.
struct Sequence {
  RequestId id = 0;                // grows with arrival
  std::vector<KvToken> kv_tokens;  // prompt, then output
  std::string salt;                // as in Request, likewise the next three
  std::string tenant;
  Format min_format = Format::kK2V2;
  int priority = 0;
  int32_t computed = 0;       // leading tokens whose keys and values are in the cache
  SequenceId cache_id = 0;    // 0: not running
  int32_t cached_tokens = 0;  // found in the cache when it was first admitted
  bool admitted_before = false;
  // The scheduler's own:
  Tenant* account = nullptr;    // while it is queued or runs
  int64_t predicted_rows = -1;  // unit rows that its tokens from predicted_begin on will take
  int32_t predicted_begin = 0;
  int32_t awake_blocks = 0;  // of the prompt, when its waking was interrupted

  int32_t pending() const { return static_cast<int32_t>(kv_tokens.size()) - computed; }
  KvPrompt prompt() const { return {.salt = salt, .tokens = kv_tokens, .min_format = min_format}; }
};

// Unit rows that a sequence takes beyond its first `begin` tokens (a multiple of 64) once all are in the
// cache, its tail and one more block of growth included. A priced policy is counted at its floors.
int64_t PredictRows(const KvGeometry& geometry, const TagNeeds& needs, std::span<const KvToken> tokens,
                    int32_t begin, Format min_format);

struct SchedulerLimits {
  int32_t max_running = 0;
  int32_t max_step_tokens = 0;  // at least max_running
};

// What a step will do; nothing has happened yet.
struct Plan {
  struct Rows {
    Sequence* sequence;
    int32_t begin;  // first token; of one to be admitted, behind what the cache has of it
    int32_t count;  // 0: is only admitted
  };
  std::vector<Rows> rows;          // one that is not running is to be admitted
  std::vector<Sequence*> preempt;  // before anything else
  Sequence* fail = nullptr;        // runs, has the arena to itself and does not fit
  bool short_of_memory = false;    // not all rows that could be used were to be had
  void Clear();
  // Made while a step ran: whether the step's end can be expected to change nothing. It gives back memory,
  // where that is short, and completes blocks that a prompt to be admitted may share.
  bool stands_after_step() const;
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
  bool empty() const { return items.empty() && converts.empty(); }
};

class Scheduler {
 public:
  // `cache` and `backing` must outlive the scheduler. Where memory is missing (std::bad_alloc), Enqueue has
  // done nothing, MakePlan's plan is of no use, and after Commit comes AbortStep. The others need none.
  Scheduler(const SchedulerLimits& limits, KvCache* cache, KvBacking* backing);

  void Enqueue(Sequence* sequence);
  // Takes a sequence out, wherever it is (if it is), and gives up its blocks. Only between steps.
  void Remove(Sequence* sequence);

  // Also while a step runs: each sequence that has got to its last token is then taken to want one more.
  void MakePlan(Plan* plan) const;
  // Carries the plan out, except for `fail`. When free rows are scattered, the step takes what fits and the
  // next one begins with a compaction; the items are then the plan's first ones.
  void Commit(const Plan& plan, Step* step);
  // After the kernels of a step ran; or, if they failed, AbortStep: see KvCache. The former returns whether
  // some sequence met blocks of others and is further than its rows, which a plan made meanwhile does not
  // know; the latter the sequences whose blocks are not to be trusted, to be removed by the caller, valid
  // until the next.
  bool FinishStep();
  std::span<Sequence* const> AbortStep();
  // Who gives way before all others that run; nullptr if nobody runs.
  Sequence* last_running() const { return running_.empty() ? nullptr : running_.back(); }

  bool idle() const { return running_.empty() && waiting_ == 0 && cache_->ageing() == 0; }
  int32_t running() const { return static_cast<int32_t>(running_.size()); }
  int32_t waiting() const { return waiting_; }
  int64_t preemptions() const { return preemptions_; }
  int64_t compactions() const { return compactions_; }

  // Whether the last commit only waited for sleeping blocks to come (KvBacking::WaitForFetched).
  bool waits_for_blocks() const { return waits_for_blocks_; }

  // Blocks that a step re-quantizes because they grew older or exceed the budget.
  static constexpr int kConvertsPerStep = 32;
  // Bytes of sleeping blocks that a step brings back (the last block may exceed them), and how many blocks
  // are asked for ahead.
  static constexpr int64_t kWokenBytesPerStep = int64_t{16} << 20;
  static constexpr size_t kFetchedAhead = 32;

 private:
  int64_t RowsFor(const Sequence& sequence, int32_t count) const;
  int64_t RowsHeld(const Sequence& sequence) const;
  int32_t CountNow(const Plan::Rows& rows) const;
  void PlanAdmissions(int64_t available, int32_t budget, Plan* plan) const;
  bool PlanAdmission(Sequence* sequence, int64_t* available, int32_t* budget, Plan* plan) const;
  void Admit(Sequence* sequence);
  bool Wake(Sequence* sequence);
  void StopWaking();
  bool SleepsBehind(const KvCache::Waking& awake, const KvPrompt& prompt) const;
  void FetchAhead(const Sequence& sequence);
  void Preempt(Sequence* sequence);
  void MakeRoom(const Plan& plan, Step* step);
  bool Append(Sequence* sequence, int32_t count, Step* step);
  void Compact();

  SchedulerLimits limits_;
  KvCache* cache_;
  KvBacking* backing_;
  KvCache::Sleep sleep_;                                // to the backing, if it keeps anything
  std::vector<Sequence*> running_;                      // by priority, then oldest first
  std::vector<Sequence*> preempted_;                    // likewise; they wait, too
  std::map<int, TenantClass, std::greater<>> classes_;  // by priority: who waits and was never admitted
  int32_t waiting_ = 0;
  KvAppend append_;
  std::vector<Sequence*> in_step_;
  std::vector<Sequence*> lost_;
  bool scattered_ = false;      // the last step met free rows without a long enough run
  bool stuck_ = false;          // the last commit could append nothing
  Sequence* waking_ = nullptr;  // waits while its sleeping blocks come back; those that have come are kept
  KvCache::Waking awake_;       // its
  bool waits_for_blocks_ = false;
  std::vector<BlockKey> fetch_;  // scratch of FetchAhead
  int64_t preemptions_ = 0;
  int64_t compactions_ = 0;
};

}  // namespace triaxial

#endif  // TRIAXIAL_ENGINE_SCHEDULER_H_
