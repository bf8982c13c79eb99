// How blocks that sleep come back: a few each step, while others run.
#include <gtest/gtest.h>

#include <algorithm>
#include <unordered_map>
#include <utility>
#include <vector>

#include "engine/scheduler.h"

namespace triaxial {
namespace {

constexpr KvGeometry kGeometry = {1, 1, 64, Codec::kPaper};
constexpr int64_t kBlockBytes = Scheduler::kWokenBytesPerStep / 4;  // so that four of them are a step's

// Blocks of a conversation; each comes a step after it was asked for.
class Bed : public KvBacking {
 public:
  void Add(const Sequence& sequence, int32_t blocks) {
    BlockKey parent = RootKey(sequence.salt);
    for (int32_t b = 0; b < blocks; ++b) {
      SleepingBlock block;
      block.position = b * kBlockTokens;
      block.format = Format::kK2V2;
      for (size_t i = 0; i < kBlockTokens; ++i) {
        block.contents[i] = sequence.kv_tokens[static_cast<size_t>(block.position) + i].content;
      }
      block.parent = parent;
      block.key = parent = ChildKey(parent, block.contents);
      block.bytes.resize(kBlockBytes);
      blocks_.emplace(block.key, std::move(block));
    }
  }
  bool asleep() const override { return !blocks_.empty(); }
  bool Contains(const BlockKey& key) const override { return blocks_.contains(key); }
  void Fetch(std::span<const BlockKey> keys) override {
    EXPECT_LE(keys.size(), Scheduler::kFetchedAhead);
    here_ = std::exchange(asked_, {keys.begin(), keys.end()});
  }
  Result<SleepingBlock> Take(const BlockKey& key) override {
    if (std::find(here_.begin(), here_.end(), key) == here_.end()) return Unavailable("not yet");
    return blocks_.at(key);
  }
  Status Write(uint32_t, int, SleepingBlock&&) override {
    ++written;
    return OkStatus();
  }
  int written = 0;

 private:
  std::unordered_map<BlockKey, SleepingBlock, BlockKeyHash> blocks_;
  std::vector<BlockKey> asked_, here_;
};

Sequence Make(RequestId id, size_t tokens) {
  Sequence sequence;
  sequence.id = id;
  for (size_t t = 0; t < tokens; ++t) sequence.kv_tokens.push_back({{t, static_cast<uint64_t>(id)}, 0});
  return sequence;
}

class SchedulerWakeTest : public testing::Test {
 protected:
  void Run() {
    scheduler_.MakePlan(&plan_);
    scheduler_.Commit(plan_, &step_);
    scheduler_.FinishStep();
    for (const Step::Item& item : step_.items) {
      if (item.sequence->pending() > 0) continue;
      item.sequence->kv_tokens.push_back({{item.sequence->kv_tokens.size(), 99}, 0});
    }
    const Status status = cache_.CheckIntegrity();
    EXPECT_TRUE(status.ok()) << status.message();
  }
  bool Ran(const Sequence& sequence) const {
    return std::any_of(step_.items.begin(), step_.items.end(),
                       [&](const Step::Item& item) { return item.sequence == &sequence; });
  }

  Bed bed_;
  KvCache cache_{kGeometry, 3000, TagNeeds::ByIndex()};
  Scheduler scheduler_{{.max_running = 8, .max_step_tokens = 512}, &cache_, &bed_};
  Plan plan_;
  Step step_;
};

TEST_F(SchedulerWakeTest, AFewEachStepAndNobodyWaitsForThem) {
  Sequence talks = Make(1, 10), wakes = Make(2, 64 * 30 + 5), is_new = Make(3, 20);
  scheduler_.Enqueue(&talks);
  Run();
  bed_.Add(wakes, 30);
  scheduler_.Enqueue(&wakes);
  Run();
  scheduler_.Enqueue(&is_new);
  int steps = 0;
  for (; wakes.cache_id == 0; ++steps) {
    ASSERT_LT(steps, 20);
    const int before = bed_.written;
    Run();
    EXPECT_TRUE(Ran(talks)) << steps;
    EXPECT_LE(bed_.written - before, 4);
    EXPECT_FALSE(scheduler_.waits_for_blocks());
    EXPECT_TRUE(steps < 2 || Ran(is_new)) << "it has none that sleep";
  }
  EXPECT_GE(steps, 8);
  EXPECT_EQ(bed_.written, 30);
  EXPECT_EQ(wakes.cached_tokens, 30 * 64);
  Run();
  EXPECT_TRUE(Ran(wakes));
  EXPECT_EQ(step_.rows, 2 + 5) << "what is left of its prompt";
}

TEST_F(SchedulerWakeTest, OneAtATime) {
  Sequence first = Make(1, 64 * 6 + 1), second = Make(2, 64 * 6 + 1);
  bed_.Add(first, 6);
  bed_.Add(second, 6);
  scheduler_.Enqueue(&first);
  scheduler_.Enqueue(&second);
  Run();
  EXPECT_TRUE(scheduler_.waits_for_blocks()) << "nobody runs, and nothing has come";
  while (first.cache_id == 0) {
    Run();
    EXPECT_EQ(second.cache_id, 0);
    ASSERT_LE(bed_.written, 6 + 4);
  }
  for (int steps = 0; second.cache_id == 0; ++steps) {
    ASSERT_LT(steps, 10);
    Run();
  }
  EXPECT_EQ(bed_.written, 12);
  EXPECT_EQ(first.cached_tokens, 6 * 64);
  EXPECT_EQ(second.cached_tokens, 6 * 64);
}

TEST_F(SchedulerWakeTest, WhoLeavesMeanwhileHoldsNothing) {
  Sequence wakes = Make(1, 64 * 20 + 1);
  bed_.Add(wakes, 20);
  scheduler_.Enqueue(&wakes);
  while (bed_.written < 5) Run();
  EXPECT_EQ(wakes.cache_id, 0);
  scheduler_.Remove(&wakes);
  EXPECT_TRUE(scheduler_.idle());
  EXPECT_EQ(cache_.free_rows() + cache_.cached_rows(), cache_.total_rows());
  EXPECT_EQ(cache_.Match(wakes.prompt()).begin, bed_.written * 64) << "what came stays for whoever asks next";
}

TEST(SchedulerWake, WhatOthersNeedTheRoomOfIsComputedAgain) {
  Bed bed;
  KvCache cache(kGeometry, 500, TagNeeds::ByIndex());
  Scheduler scheduler({.max_running = 8, .max_step_tokens = 512}, &cache, &bed);
  Plan plan;
  Step step;
  const auto run = [&] {
    scheduler.MakePlan(&plan);
    scheduler.Commit(plan, &step);
    scheduler.FinishStep();
    const Status status = cache.CheckIntegrity();
    EXPECT_TRUE(status.ok()) << status.message();
  };
  Sequence grows = Make(1, 10), wakes = Make(2, 64 * 20 + 1);
  scheduler.Enqueue(&grows);
  run();
  bed.Add(wakes, 20);
  scheduler.Enqueue(&wakes);
  while (bed.written < 8) run();
  const std::vector<KvToken> more = Make(1, 64 * 34).kv_tokens;
  grows.kv_tokens.insert(grows.kv_tokens.end(), more.begin(), more.end());
  for (int steps = 0; grows.pending() > 0; ++steps) {
    ASSERT_LT(steps, 50);
    run();
  }
  EXPECT_EQ(wakes.cache_id, 0) << "there is no room for it";
  EXPECT_LT(cache.Match(wakes.prompt()).begin, bed.written * 64) << "nor for all that came";
  const int written = bed.written;
  scheduler.Remove(&grows);
  while (wakes.cache_id == 0) run();
  EXPECT_EQ(bed.written, written) << "it could go on for ever";
  EXPECT_EQ(wakes.cached_tokens, cache.Length(wakes.cache_id) - step.rows);
}

}  // namespace
}  // namespace triaxial
