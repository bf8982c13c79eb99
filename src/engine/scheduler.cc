#include "engine/scheduler.h"

#include <algorithm>
#include <array>
#include <utility>

#include "base/check.h"
#include "base/checked_math.h"
#include "kv/policy.h"

namespace triaxial {
namespace {

bool Older(const Sequence* a, const Sequence* b) { return a->id < b->id; }

}  // namespace

int64_t PredictRows(const KvGeometry& geometry, std::span<const KvToken> tokens, int recent_window) {
  const int64_t blocks = static_cast<int64_t>(tokens.size()) / kBlockTokens;
  const int64_t quantized = std::max<int64_t>(0, blocks - CeilDiv(recent_window, kBlockTokens));
  const int64_t tail_and_growth = 2;
  int64_t rows = (blocks - quantized + tail_and_growth) * UnitsOf(geometry, Format::kBf16);
  std::array<Format, kBlockTokens> wishes;
  for (int64_t b = 0; b < quantized; ++b) {
    for (int i = 0; i < kBlockTokens; ++i) {
      wishes[static_cast<size_t>(i)] = tokens[static_cast<size_t>(b * kBlockTokens + i)].wish;
    }
    rows += UnitsOf(geometry, BlockFormat(wishes));
  }
  return rows;
}

void Plan::Clear() {
  rows.clear();
  preempt.clear();
  fail = nullptr;
}

void Step::Clear() {
  items.clear();
  converts.clear();
  stores.clear();
  rows = 0;
}

Scheduler::Scheduler(const SchedulerLimits& limits, KvCache* cache, Move move)
    : limits_(limits), cache_(cache), move_(std::move(move)) {
  CHECK(limits.max_running > 0 && limits.max_step_tokens >= limits.max_running);
  running_.reserve(static_cast<size_t>(limits.max_running));
}

void Scheduler::Enqueue(Sequence* sequence) {
  sequence->predicted_rows = PredictRows(cache_->geometry(), sequence->kv_tokens, limits_.recent_window);
  waiting_.reserve(waiting_.size() + running_.size() + 1);
  waiting_.insert(std::upper_bound(waiting_.begin(), waiting_.end(), sequence, Older), sequence);
}

void Scheduler::Remove(Sequence* sequence) {
  if (sequence->cache_id != 0) {
    cache_->FreeSequence(std::exchange(sequence->cache_id, 0));
    running_.erase(std::find(running_.begin(), running_.end(), sequence));
  } else {
    waiting_.erase(std::find(waiting_.begin(), waiting_.end(), sequence));
  }
}

int64_t Scheduler::RowsFor(const Sequence& sequence, int32_t count) const {
  return cache_->RowsToAppend(
      sequence.cache_id, std::span(sequence.kv_tokens)
                             .subspan(static_cast<size_t>(sequence.computed), static_cast<size_t>(count)));
}

int64_t Scheduler::RowsHeld(const Sequence& sequence) const {
  const KvGeometry& geometry = cache_->geometry();
  return cache_->Usage(sequence.cache_id).total_bytes() / (UnitRowBytes(geometry) * geometry.num_layers);
}

void Scheduler::MakePlan(Plan* plan) const {
  plan->Clear();
  int64_t free = cache_->free_rows();
  int32_t budget = limits_.max_step_tokens;
  size_t staying = running_.size();
  const auto preempt_youngest = [&] {
    Sequence* youngest = running_[--staying];
    free += RowsHeld(*youngest);
    plan->preempt.push_back(youngest);
  };

  for (size_t i = 0; i < staying; ++i) {
    Sequence* sequence = running_[i];
    if (sequence->pending() != 1) continue;
    const int64_t rows = RowsFor(*sequence, 1);
    while (rows > free && staying > i + 1) preempt_youngest();
    if (rows > free) {
      if (i == 0) {
        plan->fail = sequence;
      } else {
        preempt_youngest();
      }
      break;
    }
    free -= rows;
    --budget;
    plan->rows.push_back({sequence, 1});
  }

  bool short_of_memory = !plan->preempt.empty() || plan->fail != nullptr;
  for (size_t i = 0; i < staying && budget > 0 && plan->fail == nullptr; ++i) {
    Sequence* sequence = running_[i];
    if (sequence->pending() == 1) continue;
    int32_t count = std::min(sequence->pending(), budget);
    int64_t rows = RowsFor(*sequence, count);
    while (rows > free && count > 0) {
      short_of_memory = true;
      count /= 2;
      rows = count > 0 ? RowsFor(*sequence, count) : 0;
    }
    if (count == 0) break;
    free -= rows;
    budget -= count;
    plan->rows.push_back({sequence, count});
  }

  if (!short_of_memory) PlanAdmissions(free, budget, plan);
  if (plan->rows.empty() && plan->preempt.empty() && plan->fail == nullptr) {
    if (staying > 1) {
      preempt_youngest();
    } else if (staying == 1) {
      plan->fail = running_[0];
    } else if (!waiting_.empty()) {
      plan->fail = waiting_.front();
    }
  }
}

void Scheduler::PlanAdmissions(int64_t free, int32_t budget, Plan* plan) const {
  size_t places = static_cast<size_t>(limits_.max_running) - running_.size();
  for (auto it = waiting_.begin(); it != waiting_.end() && places > 0 && budget > 0; ++it, --places) {
    if ((*it)->predicted_rows > free) return;
    const int32_t count = std::min((*it)->pending(), budget);
    free -= (*it)->predicted_rows;
    budget -= count;
    plan->rows.push_back({*it, count});
  }
}

void Scheduler::Commit(const Plan& plan, Step* step) {
  step->Clear();
  for (Sequence* sequence : plan.preempt) Preempt(sequence);
  if (std::exchange(scattered_, false)) Compact();
  for (const Plan::Rows& rows : plan.rows) {
    if (rows.sequence->cache_id == 0) Admit(rows.sequence);
    if (Append(rows.sequence, rows.count, step)) continue;
    if (!step->items.empty()) {  // rows of this step must not move any more
      scattered_ = true;
      return;
    }
    Compact();
    CHECK(Append(rows.sequence, rows.count, step));  // the plan counted the rows
  }
}

void Scheduler::Admit(Sequence* sequence) {
  CHECK(sequence == waiting_.front());
  sequence->cache_id = cache_->CreateSequence(limits_.recent_window);
  running_.push_back(sequence);
  waiting_.erase(waiting_.begin());
}

void Scheduler::Preempt(Sequence* sequence) {
  Remove(sequence);
  sequence->computed = 0;
  Enqueue(sequence);
  ++preemptions_;
}

bool Scheduler::Append(Sequence* sequence, int32_t count, Step* step) {
  const auto tokens = std::span(sequence->kv_tokens)
                          .subspan(static_cast<size_t>(sequence->computed), static_cast<size_t>(count));
  if (!cache_->Append(sequence->cache_id, tokens, &append_).ok()) return false;
  step->converts.insert(step->converts.end(), append_.converts.begin(), append_.converts.end());
  for (KvStore store : append_.stores) {
    store.row_begin += step->rows;
    step->stores.push_back(store);
  }
  step->items.push_back({sequence, step->rows, sequence->computed, count, cache_->View(sequence->cache_id)});
  step->rows += count;
  sequence->computed += count;
  return true;
}

void Scheduler::Compact() {
  cache_->Compact(move_);
  ++compactions_;
}

}  // namespace triaxial
