#include "engine/scheduler.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <new>
#include <random>
#include <string>
#include <vector>

#include "kv/policy.h"

namespace triaxial {
namespace {

constexpr KvGeometry kGeometry = {1, 1, 64, Codec::kPaper};

int64_t Rows(Format format) { return UnitsOf(kGeometry, format); }

// Scheduler, cache and sequences that generate a given number of tokens; the model is left out.
class World {
 public:
  World(int64_t total_rows, SchedulerLimits limits, const TagNeeds& needs = TagNeeds::ByIndex())
      : cache(kGeometry, total_rows, needs), scheduler(limits, &cache, &backing) {}

  struct Job : Sequence {
    RequestId conversation = 0;  // those of one have the same tokens
    int32_t to_generate = 0;
    Format wish = Format::kK2V2;
    bool failed = false;
    bool done = false;
  };

  static KvToken Token(const Job& job, Format wish) {
    return {{job.kv_tokens.size(), static_cast<uint64_t>(job.conversation)}, static_cast<uint8_t>(wish)};
  }

  // Of its own content, so that nothing is shared, unless a conversation is named.
  Job* Add(int32_t prompt, int32_t to_generate, Format wish = Format::kK2V2, const std::string& tenant = "",
           RequestId conversation = 0) {
    auto job = std::make_unique<Job>();
    job->tenant = tenant;
    job->id = static_cast<RequestId>(jobs.size()) + 1;
    job->conversation = conversation != 0 ? conversation : -job->id;
    for (int32_t i = 0; i < prompt; ++i) job->kv_tokens.push_back(Token(*job, wish));
    job->to_generate = to_generate;
    job->wish = wish;
    scheduler.Enqueue(job.get());
    beside_holds = false;
    jobs.push_back(std::move(job));
    return jobs.back().get();
  }

  // One step; false if there was nothing to do.
  bool Run() {
    if (scheduler.idle()) return false;
    scheduler.MakePlan(&plan);
    if (beside_holds) ExpectPlannedBeside();
    scheduler.Commit(plan, &step);
    scheduler.MakePlan(&beside);
    beside_holds = !scheduler.FinishStep() && beside.stands_after_step();
    for (const Step::Item& item : step.items) {
      auto* job = static_cast<Job*>(item.sequence);
      EXPECT_EQ(cache.Length(job->cache_id), job->computed);
      EXPECT_GE(job->computed, item.begin + item.count);  // more where a matched run begins
      if (job->pending() > 0) continue;
      job->kv_tokens.push_back(Token(*job, job->wish));
      if (--job->to_generate == 0) {
        scheduler.Remove(job);
        job->done = true;
        beside_holds = false;
      }
    }
    if (plan.fail != nullptr) {
      EXPECT_GT(PredictRows(kGeometry, cache.needs(), plan.fail->kv_tokens, 0, plan.fail->min_format),
                cache.total_rows())
          << "it would have fitted";
      scheduler.Remove(plan.fail);
      static_cast<Job*>(plan.fail)->failed = true;
    }
    return true;
  }

  // The plan that was made while the last step ran is that of now, but for who is admitted: rows may have
  // become free since.
  void ExpectPlannedBeside() {
    ASSERT_LE(beside.rows.size(), plan.rows.size());
    for (size_t i = 0; i < beside.rows.size(); ++i) {
      EXPECT_EQ(beside.rows[i].sequence, plan.rows[i].sequence);
      EXPECT_EQ(beside.rows[i].begin, plan.rows[i].begin);
      EXPECT_EQ(beside.rows[i].count, plan.rows[i].count);
    }
    ++planned_beside;
  }

  std::vector<std::pair<RequestId, int32_t>> Planned() const {
    std::vector<std::pair<RequestId, int32_t>> rows;
    for (const Plan::Rows& r : plan.rows) rows.emplace_back(r.sequence->id, r.count);
    return rows;
  }

  // Every row is free, or of blocks that nobody uses.
  bool Unused() const { return cache.free_rows() + cache.cached_rows() == cache.total_rows(); }

  KvBacking backing;
  KvCache cache;
  Scheduler scheduler;
  std::vector<std::unique_ptr<Job>> jobs;
  Plan plan;
  Plan beside;  // as the engine makes it while a step runs
  bool beside_holds = false;
  int planned_beside = 0;
  Step step;
};

using Rowlist = std::vector<std::pair<RequestId, int32_t>>;

TEST(Scheduler, DecodesFirstThenPrefillsTheOldest) {
  World world(100000, {.max_running = 8, .max_step_tokens = 100});
  world.Add(30, 5);
  world.Add(150, 5);
  world.Add(40, 5);
  world.Run();
  EXPECT_EQ(world.Planned(), (Rowlist{{1, 30}, {2, 70}}));
  world.Run();
  EXPECT_EQ(world.Planned(), (Rowlist{{1, 1}, {2, 80}, {3, 19}}));
  world.Run();
  EXPECT_EQ(world.Planned(), (Rowlist{{1, 1}, {2, 1}, {3, 21}}));
  world.Run();
  EXPECT_EQ(world.Planned(), (Rowlist{{1, 1}, {2, 1}, {3, 1}}));
  EXPECT_EQ(world.step.items[2].begin, 40);
  EXPECT_EQ(world.step.items[2].row, 2);
  EXPECT_EQ(world.planned_beside, 2);  // not the step that admits
}

TEST(Scheduler, RunsNoMoreThanItMay) {
  World world(100000, {.max_running = 2, .max_step_tokens = 100});
  for (int i = 0; i < 5; ++i) world.Add(10, 3);
  world.Run();
  EXPECT_EQ(world.Planned(), (Rowlist{{1, 10}, {2, 10}}));
  EXPECT_EQ(world.scheduler.running(), 2);
  EXPECT_EQ(world.scheduler.waiting(), 3);
  while (world.Run()) {
  }
  for (const auto& job : world.jobs) EXPECT_TRUE(job->done);
}

TEST(Scheduler, PlanChangesNothing) {
  World world(3 * Rows(Format::kBf16) + 5, {.max_running = 8, .max_step_tokens = 64});
  for (int i = 0; i < 3; ++i) world.Add(60, 100);
  for (int i = 0; i < 100; ++i) {
    const int64_t free = world.cache.free_rows();
    const KvUsage usage = world.cache.Usage();
    Plan first;
    Plan second;
    world.scheduler.MakePlan(&first);
    world.scheduler.MakePlan(&second);
    EXPECT_EQ(first.rows.size(), second.rows.size());
    EXPECT_EQ(first.preempt, second.preempt);
    EXPECT_EQ(world.cache.free_rows(), free);
    EXPECT_EQ(world.cache.Usage(), usage);
    if (!world.Run()) break;
  }
}

TEST(Scheduler, NobodyPassesAHeadThatDoesNotFit) {
  // Room for the first and the third together, but not for the first and the second.
  const std::vector<KvToken> long_prompt(640, {{}, static_cast<uint8_t>(Format::kBf16)});
  const int64_t total = PredictRows(kGeometry, TagNeeds::ByIndex(), long_prompt, 0, Format::kK2V2);
  World world(total, {.max_running = 8, .max_step_tokens = 1000});
  World::Job* first = world.Add(10, 20);
  World::Job* second = world.Add(640, 5, Format::kBf16);
  World::Job* third = world.Add(10, 1);
  for (int i = 0; i < 20; ++i) {
    EXPECT_FALSE(first->done);
    world.Run();
    EXPECT_EQ(second->cache_id, 0);
    EXPECT_EQ(third->cache_id, 0);
  }
  EXPECT_TRUE(first->done);
  world.Run();
  EXPECT_NE(second->cache_id, 0);
  while (world.Run()) {
  }
  EXPECT_TRUE(second->done && third->done);
}

TEST(Scheduler, PreemptsTheYoungestAndBringsItBackFirst) {
  // Room for both when they are admitted, but not for all that they generate.
  World world(6 * Rows(Format::kBf16), {.max_running = 8, .max_step_tokens = 1000});
  World::Job* first = world.Add(60, 250, Format::kBf16);
  World::Job* second = world.Add(60, 250, Format::kBf16);
  while (world.scheduler.preemptions() == 0) ASSERT_TRUE(world.Run());
  EXPECT_NE(first->cache_id, 0);
  EXPECT_EQ(second->cache_id, 0);
  EXPECT_EQ(second->computed, 0);
  EXPECT_GT(second->pending(), 100);  // its output is kept
  World::Job* third = world.Add(10, 1);
  while (second->cache_id == 0) {
    EXPECT_EQ(third->cache_id, 0);
    ASSERT_TRUE(world.Run());
  }
  while (world.Run()) {
  }
  EXPECT_TRUE(first->done && second->done && third->done);
  EXPECT_EQ(second->kv_tokens.size(), 310u);
  EXPECT_TRUE(world.Unused());
}

TEST(Scheduler, FailsWhatDoesNotFitAlone) {
  World world(3 * Rows(Format::kBf16), {.max_running = 4, .max_step_tokens = 100});
  World::Job* grows = world.Add(40, 100000, Format::kBf16);
  World::Job* after = world.Add(10, 3);
  World::Job* never = world.Add(64 * 40, 1, Format::kBf16);
  World::Job* last = world.Add(10, 3);
  int steps = 0;
  while (world.Run()) ASSERT_LT(++steps, 100000);
  EXPECT_TRUE(grows->failed);
  EXPECT_GT(grows->kv_tokens.size(), 128u);  // but only when the arena was full
  EXPECT_TRUE(after->done);
  EXPECT_TRUE(never->failed);
  EXPECT_TRUE(last->done);
}

TEST(Scheduler, FailsTheHeadThatBlocksAndNoOtherTenants) {
  World world(3 * Rows(Format::kBf16), {.max_running = 4, .max_step_tokens = 100});
  World::Job* never = world.Add(64 * 40, 1, Format::kBf16, "a");
  World::Job* modest = world.Add(10, 3, Format::kBf16, "b");
  int steps = 0;
  while (world.Run()) ASSERT_LT(++steps, 1000);
  EXPECT_TRUE(never->failed);
  EXPECT_TRUE(modest->done);
  EXPECT_TRUE(world.Unused());
}

TEST(Scheduler, WhatFitsOnceItsCachedBlocksHaveAgedIsAdmitted) {
  World world(5 * Rows(Format::kBf16), {.max_running = 4, .max_step_tokens = 1000});
  World::Job* first = world.Add(193, 1, Format::kBf16);
  while (world.Run()) {
  }
  ASSERT_TRUE(first->done);
  ASSERT_EQ(world.cache.cached_tokens(), 192);
  // The same text again, of which less is to be kept by now, and more: three blocks of BF16 in the cache, a
  // tail and a block of growth would be all that there is.
  World::Job* again = world.Add(321, 1, Format::kK2V2);
  for (size_t i = 0; i < 192; ++i) again->kv_tokens[i].content = first->kv_tokens[i].content;
  int steps = 0;
  while (world.Run()) ASSERT_LT(++steps, 100);
  EXPECT_TRUE(again->done);
  EXPECT_EQ(again->cached_tokens, 192);
  EXPECT_TRUE(world.Unused());
}

TEST(Scheduler, TheLastOneFailsOnlyWhenNobodyIsLeftToPreempt) {
  World world(368 + 10 * Rows(Format::kBf16), {.max_running = 4, .max_step_tokens = 1000});
  World::Job* first = world.Add(112, 20, Format::kBf16);  // its tail is full and takes 64 rows to grow
  World::Job* second = world.Add(256, 3, Format::kBf16);
  World::Job* third = world.Add(256, 3, Format::kBf16);  // holds the same blocks as the second
  for (size_t i = 0; i < 256; ++i) third->kv_tokens[i].content = second->kv_tokens[i].content;
  world.Run();
  ASSERT_EQ(first->computed + second->computed + third->computed, 112 + 256 + 256);
  ASSERT_EQ(world.cache.free_rows(), 10 * Rows(Format::kBf16));
  world.cache.Compact([](uint32_t, uint32_t, int) {});
  const SequenceId other = world.cache.CreateSequence();  // has the rest of the arena
  KvAppend append;
  ASSERT_TRUE(
      world.cache.Append(other, std::vector<KvToken>(640, {{}, static_cast<uint8_t>(Format::kBf16)}), &append)
          .ok());
  world.cache.FinishStep();
  world.beside_holds = false;
  int steps = 0;
  while (world.Run()) ASSERT_LT(++steps, 1000);
  EXPECT_TRUE(first->done && second->done && third->done);
  EXPECT_GE(world.scheduler.preemptions(), 2);
  world.cache.FreeSequence(other);
  EXPECT_TRUE(world.Unused());
}

TEST(Scheduler, WhatCouldNotBeAdmittedStillWaits) {
  struct Backing : KvBacking {
    bool asleep() const override { return true; }
    bool Contains(const BlockKey&) const override { throw std::bad_alloc(); }
  } backing;
  KvCache cache(kGeometry, 1000, TagNeeds::ByIndex());
  Scheduler scheduler({.max_running = 4, .max_step_tokens = 100}, &cache, &backing);
  Sequence sequence;
  sequence.id = 1;
  sequence.kv_tokens.resize(200);
  scheduler.Enqueue(&sequence);
  Plan plan;
  Step step;
  scheduler.MakePlan(&plan);
  EXPECT_THROW(scheduler.Commit(plan, &step), std::bad_alloc);
  EXPECT_TRUE(scheduler.AbortStep().empty());
  EXPECT_EQ(scheduler.waiting(), 1);
  EXPECT_EQ(scheduler.running(), 0);
  const Status status = cache.CheckIntegrity();
  EXPECT_TRUE(status.ok()) << status.message();
  scheduler.Remove(&sequence);
  EXPECT_EQ(scheduler.waiting(), 0);
  EXPECT_TRUE(scheduler.idle());
}

TEST(Scheduler, OneRequestAtATimeGetsNoMoreThanItsShare) {
  World world(100000, {.max_running = 1, .max_step_tokens = 1000});
  for (int i = 0; i < 300; ++i) world.Add(20, 1, Format::kK2V2, "many");
  World::Job* large = nullptr;
  const auto served = [&](const std::string& tenant) {
    int64_t tokens = 0;
    for (const auto& job : world.jobs) tokens += job->tenant == tenant ? job->computed : 0;
    return tokens;
  };
  for (int steps = 0; steps < 100; ++steps) {
    if (large == nullptr || large->done) large = world.Add(200, 1, Format::kK2V2, "large");
    ASSERT_TRUE(world.Run());
    EXPECT_LE(std::abs(served("large") - served("many")), 220) << steps;
  }
}

TEST(Scheduler, RemembersABoundedNumberOfTenants) {
  TenantClass tenants;
  Sequence request;
  Tenant* stays = tenants.Arrive("stays", &request);
  for (int i = 0; i < 2000; ++i) {
    Tenant* tenant = tenants.Arrive(std::to_string(i), &request);
    EXPECT_EQ(tenant->served, 0);
    tenant->served += i + 1;
    tenants.Leave(tenant);
    EXPECT_LE(tenants.tenants().size(), TenantClass::kRemembered + 1);
  }
  EXPECT_EQ(tenants.Arrive("1999", &request)->served, 2000) << "who was served most is remembered";
  EXPECT_EQ(tenants.Arrive("5", &request)->served, 0);
  stays->served = 1e6;
  tenants.Leave(stays);
  tenants.Leave(tenants.Arrive("5", &request));
  EXPECT_EQ(tenants.Arrive("new", &request)->served, 0)
      << "level with the least served of those that are there";
}

// The smallest arena in which a request runs, and one that is a unit smaller.
TEST(Scheduler, AnArenaThatIsOneUnitTooSmall) {
  for (const Format wish : {Format::kK2V2, Format::kK4V4, Format::kBf16}) {
    const auto fits = [&](int64_t total_rows) {
      World world(total_rows, {.max_running = 4, .max_step_tokens = 100});
      World::Job* job = world.Add(300, 90, wish);
      World::Job* next = world.Add(10, 1);
      for (int steps = 0; world.Run(); ++steps) EXPECT_LT(steps, 10000);
      EXPECT_NE(job->done, job->failed);
      EXPECT_TRUE(next->done) << "whatever became of the one before";
      EXPECT_TRUE(world.Unused());
      const Status status = world.cache.CheckIntegrity();
      EXPECT_TRUE(status.ok()) << status.message();
      return job->done;
    };
    int64_t rows = Rows(Format::kBf16);
    while (!fits(rows)) ASSERT_LT(++rows, 20 * Rows(Format::kBf16));
    // Six blocks and a tail; BF16 tails are moved while they grow.
    EXPECT_GE(rows, 6 * Rows(wish) + Rows(Format::kBf16) / 4);
    EXPECT_LE(rows, 6 * Rows(wish) + Rows(Format::kBf16) * 7 / 4);
    for (int64_t more = 1; more < 30; ++more) EXPECT_TRUE(fits(rows + more)) << "more is never too small";
  }
}

// All that a crowd takes together but one unit: nobody fails.
TEST(Scheduler, ACrowdInAnArenaThatIsOneUnitTooSmall) {
  const auto run = [](int64_t total_rows, int64_t* least_free) {
    World world(total_rows, {.max_running = 6, .max_step_tokens = 100});
    for (int i = 0; i < 6; ++i) world.Add(100 + 30 * i, 150, static_cast<Format>(i % kFormats));
    while (world.Run()) *least_free = std::min(*least_free, world.cache.free_rows());
    for (const auto& job : world.jobs) EXPECT_TRUE(job->done);
    EXPECT_TRUE(world.Unused());
    return world.scheduler.preemptions();
  };
  const int64_t plenty = 100000;
  int64_t least_free = plenty;
  EXPECT_EQ(run(plenty, &least_free), 0);
  for (int64_t less = 1; less < 40; ++less) {
    int64_t ignored = plenty;
    run(plenty - least_free - less, &ignored);
  }
}

TEST(Scheduler, PredictionCoversThePrefill) {
  std::mt19937 random(1);
  for (int round = 0; round < 200; ++round) {
    const int window = static_cast<int>(random() % 4) * 50;
    const auto prompt = static_cast<int32_t>(1 + random() % 1000);
    std::vector<KvToken> tokens;
    Format wish = Format::kK2V2;
    for (int32_t i = 0; i < prompt; ++i) {
      if (random() % 20 == 0) wish = static_cast<Format>(random() % kFormats);
      tokens.push_back({{}, static_cast<uint8_t>(wish)});
    }
    TagNeeds needs = TagNeeds::ByIndex();
    needs.recent_window = window;
    KvCache cache(kGeometry, 100000, needs);
    const SequenceId id = cache.CreateSequence();
    KvAppend append;
    ASSERT_TRUE(cache.Append(id, tokens, &append).ok());
    cache.FinishStep();
    const int64_t used = cache.total_rows() - cache.free_rows();
    const int64_t predicted = PredictRows(kGeometry, needs, tokens, 0, Format::kK2V2);
    EXPECT_GE(predicted, used + Rows(Format::kBf16));  // a block of growth
    EXPECT_LE(predicted, used + 3 * Rows(Format::kBf16));
  }
}

// Whatever comes, every sequence ends, in order of what the rules promise, and the books balance.
TEST(Scheduler, RandomLoadsAlwaysMakeProgress) {
  int64_t preemptions = 0;
  int64_t compactions = 0;
  int64_t planned_beside = 0;
  for (uint32_t seed = 0; seed < 60; ++seed) {
    SCOPED_TRACE(seed);
    std::mt19937 random(seed);
    const auto below = [&](int n) { return static_cast<int>(random() % static_cast<uint32_t>(n)); };
    const int max_running = 1 + below(8);
    const SchedulerLimits limits = {max_running, max_running + below(100)};
    TagNeeds needs = TagNeeds::ByIndex();
    needs.recent_window = below(3) * 70;
    const bool shares = seed % 2 == 1;
    World world(Rows(Format::kBf16) * (4 + below(20)) + below(30), limits, needs);
    int to_add = 40;
    int steps = 0;
    int idle_steps = 0;
    while (to_add > 0 || !world.scheduler.idle()) {
      ASSERT_LT(++steps, 50000);
      while (to_add > 0 && (world.scheduler.idle() || below(4) == 0)) {
        World::Job* job = world.Add(1 + below(300), 1 + below(200), static_cast<Format>(below(kFormats)), "",
                                    shares ? 1 + below(3) : 0);
        if (shares && below(3) == 0) job->min_format = static_cast<Format>(below(kFormats));
        for (KvToken& token : job->kv_tokens) {
          if (below(3) == 0) token.tag = static_cast<uint8_t>(below(kFormats));
        }
        --to_add;
      }
      world.Run();
      int32_t rows = 0;
      for (const Step::Item& item : world.step.items) rows += item.count;
      EXPECT_LE(rows, limits.max_step_tokens);
      EXPECT_LE(world.scheduler.running(), limits.max_running);
      EXPECT_EQ(rows, world.step.rows);
      if (rows == 0 && world.plan.preempt.empty() && world.plan.fail == nullptr) ++idle_steps;
      if (below(20) == 0) {
        const Status status = world.cache.CheckIntegrity();
        ASSERT_TRUE(status.ok()) << status.message();
      }
      if (below(30) == 0) {  // somebody gives up
        World::Job* job = world.jobs[static_cast<size_t>(below(static_cast<int>(world.jobs.size())))].get();
        if (!job->done && !job->failed) {
          world.scheduler.Remove(job);
          job->done = true;
          world.beside_holds = false;
        }
      }
    }
    EXPECT_LT(10 * idle_steps, steps);
    for (const auto& job : world.jobs) EXPECT_TRUE(job->done || job->failed);
    EXPECT_TRUE(world.Unused());
    preemptions += world.scheduler.preemptions();
    planned_beside += world.planned_beside;
    compactions += world.scheduler.compactions();
  }
  EXPECT_GT(preemptions, 0);
  EXPECT_GT(compactions, 0);
  EXPECT_GT(planned_beside, 0);
}

}  // namespace
}  // namespace triaxial
