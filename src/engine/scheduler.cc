#include "engine/scheduler.h"

#include <algorithm>
#include <array>
#include <limits>
#include <utility>

#include "base/check.h"
#include "base/checked_math.h"
#include "base/log.h"
#include "base/reserve.h"

namespace triaxial {
namespace {

// The order in which sequences are served; whoever comes last gives way.
bool Before(const Sequence* a, const Sequence* b) {
  return a->priority != b->priority ? a->priority > b->priority : a->id < b->id;
}

void InsertInOrder(std::vector<Sequence*>* sequences, Sequence* sequence) {
  sequences->insert(std::upper_bound(sequences->begin(), sequences->end(), sequence, Before), sequence);
}

// One token more than there are is the one that a step is about to choose: its tag is a guess.
std::span<const KvToken> TokensOf(const Sequence& sequence, int32_t begin, int32_t count) {
  if (begin == static_cast<int32_t>(sequence.kv_tokens.size())) return std::span(sequence.kv_tokens).last(1);
  return std::span(sequence.kv_tokens).subspan(static_cast<size_t>(begin), static_cast<size_t>(count));
}

BlockKey KeyBehind(const BlockKey& parent, std::span<const KvToken> tokens) {
  std::array<ContentId, kBlockTokens> contents;
  for (size_t i = 0; i < kBlockTokens; ++i) contents[i] = tokens[i].content;
  return ChildKey(parent, contents);
}

}  // namespace

int64_t PredictRows(const KvGeometry& geometry, const TagNeeds& needs, std::span<const KvToken> tokens,
                    int32_t begin, Format min_format) {
  const auto blocks = static_cast<int64_t>(tokens.size()) / kBlockTokens;
  const int64_t quantized = std::max<int64_t>(0, blocks - CeilDiv(needs.recent_window, kBlockTokens));
  const int64_t tail_and_growth = 2;
  const int64_t first = begin / kBlockTokens;
  int64_t rows = (blocks - std::max(first, quantized) + tail_and_growth) * UnitsOf(geometry, Format::kBf16);
  std::array<uint8_t, kBlockTokens> tags;
  for (int64_t b = first; b < quantized; ++b) {
    for (int i = 0; i < kBlockTokens; ++i) {
      tags[static_cast<size_t>(i)] = tokens[static_cast<size_t>(b * kBlockTokens + i)].tag;
    }
    const Format least =
        Choose(needs, NeedOf(needs, tags, b == 0), geometry, std::numeric_limits<double>::infinity());
    rows += UnitsOf(geometry, std::max(least, min_format));
  }
  return rows;
}

void Plan::Clear() {
  rows.clear();
  preempt.clear();
  fail = nullptr;
  short_of_memory = false;
}

bool Plan::stands_after_step() const {
  return !rows.empty() && fail == nullptr && !short_of_memory &&
         std::all_of(rows.begin(), rows.end(), [](const Rows& r) { return r.sequence->cache_id != 0; });
}

void Step::Clear() {
  items.clear();
  converts.clear();
  stores.clear();
  rows = 0;
}

Scheduler::Scheduler(const SchedulerLimits& limits, KvCache* cache, KvBacking* backing)
    : limits_(limits), cache_(cache), backing_(backing) {
  CHECK(limits.max_running > 0 && limits.max_step_tokens >= limits.max_running);
  const auto max_running = static_cast<size_t>(limits.max_running);
  running_.reserve(max_running);
  in_step_.reserve(max_running);
  lost_.reserve(max_running);
  if (!backing->sleeps()) return;
  sleep_ = [backing](const KvBlock& block, const BlockKey& key, const BlockKey& parent) {
    backing->Sleep(block, key, parent);
  };
}

Tenant* TenantClass::Arrive(const std::string& name, Sequence* sequence) {
  Tenant& tenant = tenants_[name];
  tenant.waiting.push_back(sequence);
  RaiseLevel();
  if (tenant.requests++ == 0) {
    tenant.served = std::max(tenant.served, level_);
    ++present_;
  }
  return &tenant;
}

// Who would start at the level anyway needs no memory; of the others the least served are forgotten first.
void TenantClass::Leave(Tenant* tenant) {
  if (--tenant->requests > 0) return;
  if (--present_ == 0) {
    level_ = std::max(level_, tenant->served);
  } else {
    RaiseLevel();
  }
  std::erase_if(tenants_,
                [this](const auto& t) { return t.second.requests == 0 && t.second.served <= level_; });
  if (tenants_.size() - present_ <= kRemembered) return;
  auto least = tenants_.end();
  for (auto t = tenants_.begin(); t != tenants_.end(); ++t) {
    if (t->second.requests > 0) continue;
    if (least == tenants_.end() || t->second.served < least->second.served) least = t;
  }
  tenants_.erase(least);
}

void TenantClass::RaiseLevel() {
  double least = std::numeric_limits<double>::infinity();
  for (const auto& [name, tenant] : tenants_) {
    if (tenant.requests > 0) least = std::min(least, tenant.served);
  }
  if (present_ > 0) level_ = std::max(level_, least);
}

void Scheduler::Enqueue(Sequence* sequence) {
  // All may have to give way one day, and then there is to be a place for each.
  ReserveAtLeast(&preempted_, running_.size() + static_cast<size_t>(waiting_) + 1);
  sequence->account = classes_[sequence->priority].Arrive(sequence->tenant, sequence);
  ++waiting_;
}

void Scheduler::Remove(Sequence* sequence) {
  if (sequence->account == nullptr) return;
  stuck_ = false;  // its rows may be what was missing
  if (waking_ == sequence) StopWaking();
  if (sequence->cache_id != 0) {
    cache_->FreeSequence(std::exchange(sequence->cache_id, 0));
    std::erase(running_, sequence);
  } else {
    if (std::erase(preempted_, sequence) == 0) std::erase(sequence->account->waiting, sequence);
    --waiting_;
  }
  classes_[sequence->priority].Leave(std::exchange(sequence->account, nullptr));
}

int64_t Scheduler::RowsFor(const Sequence& sequence, int32_t count) const {
  return cache_->RowsToAppend(sequence.cache_id, TokensOf(sequence, sequence.computed, count));
}

// Rows that nobody else holds and that Reclaim does not count already.
int64_t Scheduler::RowsHeld(const Sequence& sequence) const {
  const KvGeometry& geometry = cache_->geometry();
  int64_t rows = 0;
  cache_->ForEachBlock(sequence.cache_id, [&](const KvBlock& b) {
    if (b.users == 1) rows += UnitsOf(geometry, b.format, b.capacity) - b.slack;
  });
  return rows;
}

// What of a plan's rows is appended now that its sequences are admitted, but for one that is waking. One that
// blocks woke for begins behind them, in the next plan; and who was admitted before it may have woken a block
// that it matches, where it ends. A token that was expected need not have come.
int32_t Scheduler::CountNow(const Plan::Rows& rows) const {
  if (rows.sequence->cache_id == 0 || rows.begin != rows.sequence->computed) return 0;
  return std::min({rows.count, rows.sequence->pending(), cache_->NextStop(rows.sequence->cache_id)});
}

void Scheduler::MakePlan(Plan* plan) const {
  plan->Clear();
  int64_t available = cache_->free_rows() + cache_->ReclaimableRows();
  int32_t budget = limits_.max_step_tokens;
  size_t staying = running_.size();
  const auto preempt_last = [&] {
    Sequence* sequence = running_[--staying];
    available += RowsHeld(*sequence);
    plan->preempt.push_back(sequence);
  };
  // Only where nothing can make room any more: not those that are preempted, nor who wakes, nor blocks that
  // grew older.
  const auto may_fail = [&] { return plan->preempt.empty() && waking_ == nullptr && cache_->ageing() == 0; };
  bool& short_of_memory = plan->short_of_memory;
  if (stuck_) {  // what was counted as free could not be had
    short_of_memory = true;
    if (staying > 1) {
      preempt_last();
    } else if (staying == 1 && may_fail()) {
      plan->fail = running_[0];
      return;
    }
  }

  for (size_t i = 0; i < staying; ++i) {
    Sequence* sequence = running_[i];
    if (sequence->pending() > 1) continue;
    const int64_t rows = RowsFor(*sequence, 1);
    while (rows > available && staying > i + 1) preempt_last();
    if (rows > available) {
      short_of_memory = true;
      if (i > 0) {
        preempt_last();
      } else if (may_fail()) {
        plan->fail = sequence;
      }
      break;
    }
    available -= rows;
    --budget;
    plan->rows.push_back({sequence, sequence->computed, 1});
  }

  short_of_memory = short_of_memory || !plan->preempt.empty();
  for (size_t i = 0; i < staying && budget > 0 && plan->fail == nullptr; ++i) {
    Sequence* sequence = running_[i];
    if (sequence->pending() <= 1) continue;
    int32_t count = std::min({sequence->pending(), budget, cache_->NextStop(sequence->cache_id)});
    int64_t rows = RowsFor(*sequence, count);
    while (rows > available && count > 0) {
      short_of_memory = true;
      count /= 2;
      rows = count > 0 ? RowsFor(*sequence, count) : 0;
    }
    if (count == 0) break;
    available -= rows;
    budget -= count;
    plan->rows.push_back({sequence, sequence->computed, count});
  }

  if (!short_of_memory) PlanAdmissions(available, budget, plan);
  if (plan->rows.empty() && plan->fail == nullptr && may_fail()) {
    if (staying > 1) {
      preempt_last();
    } else if (staying == 1) {
      plan->fail = running_[0];
    }
  }
}

// False if it has to wait, and with it all behind it. Where nobody runs there is nothing to wait for: what is
// predicted is not what it takes once the blocks that it shares are its own and may grow older.
bool Scheduler::PlanAdmission(Sequence* sequence, int64_t* available, int32_t* budget, Plan* plan) const {
  const KvMatch match = cache_->Match(sequence->prompt());
  if (sequence->predicted_rows < 0 || sequence->predicted_begin != match.begin) {
    sequence->predicted_rows = PredictRows(cache_->geometry(), cache_->needs(), sequence->kv_tokens,
                                           match.begin, sequence->min_format);
    sequence->predicted_begin = match.begin;
  }
  // What woke for it is kept for it, and is not among what is available.
  const int64_t rows = sequence->predicted_rows + (sequence == waking_ ? 0 : match.idle_rows);
  const bool fits = rows <= *available;
  if (!fits && !(running_.empty() && plan->rows.empty())) return false;
  *available -= rows;
  const auto tokens = static_cast<int32_t>(sequence->kv_tokens.size());
  // What may wake is not computed before it had its chance: then the rows come with the next plan.
  const bool may_wake =
      backing_->asleep() && match.begin + kBlockTokens < tokens && !sequence->admitted_before;
  const int32_t count =
      may_wake || !fits ? 0 : std::min({tokens - match.begin, match.stop - match.begin, *budget});
  *budget -= count;
  plan->rows.push_back({sequence, match.begin, count});
  return true;
}

void Scheduler::PlanAdmissions(int64_t available, int32_t budget, Plan* plan) const {
  size_t places = static_cast<size_t>(limits_.max_running) - running_.size();
  size_t next_preempted = 0;
  const auto admit_preempted = [&](int priority) {  // those of at least this priority
    while (next_preempted < preempted_.size() && preempted_[next_preempted]->priority >= priority) {
      if (places == 0 || budget <= 0) return false;
      if (!PlanAdmission(preempted_[next_preempted], &available, &budget, plan)) return false;
      ++next_preempted;
      --places;
    }
    return true;
  };
  struct Cursor {
    double served;
    const Tenant* tenant;
    size_t next;
  };
  std::vector<Cursor> cursors;
  for (const auto& [priority, tenant_class] : classes_) {
    if (!admit_preempted(priority)) return;
    cursors.clear();
    for (const auto& [name, tenant] : tenant_class.tenants()) {
      if (!tenant.waiting.empty()) cursors.push_back({tenant.served, &tenant, 0});
    }
    while (!cursors.empty()) {
      if (places == 0 || budget <= 0) return;
      const auto least =
          std::min_element(cursors.begin(), cursors.end(), [](const Cursor& a, const Cursor& b) {
            return a.served != b.served ? a.served < b.served
                                        : a.tenant->waiting[a.next]->id < b.tenant->waiting[b.next]->id;
          });
      Sequence* sequence = least->tenant->waiting[least->next];
      if (!PlanAdmission(sequence, &available, &budget, plan)) return;
      --places;
      least->served += static_cast<double>(sequence->kv_tokens.size()) - plan->rows.back().begin;
      if (++least->next == least->tenant->waiting.size()) cursors.erase(least);
    }
  }
  admit_preempted(std::numeric_limits<int>::min());
}

void Scheduler::Commit(const Plan& plan, Step* step) {
  step->Clear();
  waits_for_blocks_ = false;
  stuck_ = false;
  for (Sequence* sequence : plan.preempt) Preempt(sequence);
  if (std::exchange(scattered_, false)) Compact();
  if (plan.short_of_memory && waking_ != nullptr) StopWaking();
  bool wakes = false;
  for (const Plan::Rows& rows : plan.rows) {
    if (rows.sequence->cache_id != 0) continue;
    // One that waits for its blocks keeps nobody else waiting who has none asleep.
    if (rows.sequence->admitted_before || !backing_->asleep() || Wake(rows.sequence)) {
      Admit(rows.sequence);
    } else {
      wakes = true;
    }
  }
  MakeRoom(plan, step);
  for (const Plan::Rows& rows : plan.rows) {
    const int32_t count = CountNow(rows);
    if (count == 0) continue;
    if (Append(rows.sequence, count, step)) continue;
    if (!step->empty()) {  // rows of this step must not move any more
      scattered_ = true;
      return;
    }
    Compact();
    if (Append(rows.sequence, count, step)) continue;
    stuck_ = true;
    return;
  }
  waits_for_blocks_ = wakes && step->empty();
}

// Between what is in use and the arena's end there is to be a little room, so that steps do not each fight
// for their rows: below the lower mark it is brought to the upper one.
void Scheduler::MakeRoom(const Plan& plan, Step* step) {
  cache_->AgeBlocks(kConvertsPerStep, &step->converts);
  cache_->KeepBudget(kConvertsPerStep, &step->converts);
  int64_t rows = 0;
  for (const Plan::Rows& r : plan.rows) {
    if (const int32_t count = CountNow(r); count > 0) rows += RowsFor(*r.sequence, count);
  }
  if (rows == 0) return;
  // What is dropped goes to sleep at once, where there is a place for it: a step's worth is enough.
  const int64_t most = sleep_ ? 4 * UnitsOf(cache_->geometry(), Format::kBf16) : cache_->total_rows();
  const int64_t high = std::min(most, cache_->total_rows() / 64), low = high / 2;
  if (cache_->free_rows() < rows + low) cache_->Reclaim(rows + high, &step->converts, sleep_);
}

void Scheduler::Admit(Sequence* sequence) {
  sequence->cache_id = cache_->CreateSequence(sequence->prompt());
  // Nothing from here on throws: it waits, or it runs.
  if (std::erase(preempted_, sequence) == 0) {
    std::erase(sequence->account->waiting, sequence);
  }
  --waiting_;
  sequence->computed = cache_->Length(sequence->cache_id);
  if (!std::exchange(sequence->admitted_before, true)) {
    sequence->cached_tokens = cache_->MatchedTokens(sequence->cache_id);
  }
  InsertInOrder(&running_, sequence);
}

// Blocks of the prompt that sleep come back behind those that are there, while rows can be had by dropping
// others. False if more are to come, in steps to come.
bool Scheduler::Wake(Sequence* sequence) {
  const KvPrompt prompt = sequence->prompt();
  if (waking_ != sequence) {
    const KvCache::Waking awake = cache_->Awake(prompt);
    // Where others needed the room of what had come there is no end to it.
    if (!SleepsBehind(awake, prompt) || awake.blocks < sequence->awake_blocks) return true;
    if (waking_ != nullptr) return false;
    awake_ = cache_->BeginWaking(prompt);
    waking_ = sequence;
  }
  FetchAhead(*sequence);
  for (int64_t bytes = 0; SleepsBehind(awake_, prompt);) {
    if (bytes >= kWokenBytesPerStep) return false;
    const std::span<const KvToken> tokens = TokensOf(*sequence, awake_.blocks * kBlockTokens, kBlockTokens);
    Result<SleepingBlock> block = backing_->Take(KeyBehind(awake_.key, tokens));
    if (block.status().code() == Code::kUnavailable) return false;
    if (!block.ok()) {
      spdlog::warn("a sleeping block is lost: {}", block.status().message());
      break;
    }
    if (block->position != awake_.blocks * kBlockTokens) break;
    bytes += static_cast<int64_t>(block->bytes.size());
    const Format format = block->format;
    const int rows = UnitsOf(cache_->geometry(), format);
    while (!cache_->FitsWithoutCompaction(rows)) {  // others may lie between the rows that are free
      const int64_t free = cache_->free_rows();
      if (cache_->Reclaim(free + 1, nullptr, sleep_) == free) break;
    }
    const auto fill = [&](uint32_t unit_row) {
      const Status written = backing_->Write(unit_row, rows, *std::move(block));
      if (!written.ok()) spdlog::warn("a sleeping block is lost: {}", written.message());
      return written.ok();
    };
    if (!cache_->Wake(format, tokens, fill, &awake_)) break;
  }
  StopWaking();
  return true;
}

// What woke is like any other block now.
void Scheduler::StopWaking() {
  waking_->awake_blocks = awake_.blocks;
  waking_ = nullptr;
  cache_->EndWaking();
}

// Whether the block behind those that are awake sleeps.
bool Scheduler::SleepsBehind(const KvCache::Waking& awake, const KvPrompt& prompt) const {
  const auto begin = static_cast<size_t>(awake.blocks) * kBlockTokens;
  return begin + kBlockTokens < prompt.tokens.size() &&
         backing_->Contains(KeyBehind(awake.key, prompt.tokens.subspan(begin, kBlockTokens)));
}

// Asks for the next blocks behind those that are there, as far as they sleep.
void Scheduler::FetchAhead(const Sequence& sequence) {
  fetch_.clear();
  BlockKey key = awake_.key;
  for (int32_t begin = awake_.blocks * kBlockTokens;
       fetch_.size() < kFetchedAhead &&
       begin + kBlockTokens < static_cast<int32_t>(sequence.kv_tokens.size());
       begin += kBlockTokens) {
    key = KeyBehind(key, TokensOf(sequence, begin, kBlockTokens));
    if (!backing_->Contains(key)) break;
    fetch_.push_back(key);
  }
  backing_->Fetch(fetch_);
}

void Scheduler::Preempt(Sequence* sequence) {
  cache_->FreeSequence(std::exchange(sequence->cache_id, 0));
  std::erase(running_, sequence);
  sequence->computed = 0;
  sequence->predicted_rows = -1;
  InsertInOrder(&preempted_, sequence);
  ++waiting_;
  ++preemptions_;
}

bool Scheduler::Append(Sequence* sequence, int32_t count, Step* step) {
  if (!cache_->Append(sequence->cache_id, TokensOf(*sequence, sequence->computed, count), &append_).ok()) {
    return false;
  }
  step->converts.insert(step->converts.end(), append_.converts.begin(), append_.converts.end());
  for (KvStore store : append_.stores) {
    store.row_begin += step->rows;
    step->stores.push_back(store);
  }
  step->items.push_back({sequence, step->rows, sequence->computed, count, cache_->View(sequence->cache_id)});
  step->rows += count;
  sequence->computed += count;
  sequence->account->served += count;
  in_step_.push_back(sequence);
  return true;
}

bool Scheduler::FinishStep() {
  cache_->FinishStep();
  bool further = false;
  for (Sequence* sequence : in_step_) {
    if (sequence->cache_id == 0) continue;
    const int32_t length = cache_->Length(sequence->cache_id);
    further = further || length != sequence->computed;
    sequence->computed = length;
  }
  in_step_.clear();
  return further;
}

std::span<Sequence* const> Scheduler::AbortStep() {
  in_step_.clear();
  cache_->AbortStep();
  lost_.clear();
  for (Sequence* sequence : running_) {
    if (cache_->Lost(sequence->cache_id)) lost_.push_back(sequence);
  }
  return lost_;
}

void Scheduler::Compact() {
  cache_->Compact([this](uint32_t from, uint32_t to, int rows) { backing_->Move(from, to, rows); });
  ++compactions_;
}

}  // namespace triaxial
