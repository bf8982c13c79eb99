// Time that the scheduler takes of a decode step: MakePlan and Commit with many long sequences running, by
// itself (no model, no memory behind the cache).
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <memory>
#include <vector>

#include "engine/scheduler.h"

namespace triaxial {
namespace {

struct Options {
  int sequences = 256;
  int tokens = 32768;
  int steps = 256;  // four blocks of growth
};

int Run(const Options& options) {
  using Clock = std::chrono::steady_clock;
  const KvGeometry geometry = {1, 8, 128, Codec::kRotated};
  const auto sequences = static_cast<size_t>(options.sequences);
  const int64_t blocks = options.tokens / kBlockTokens + options.steps / kBlockTokens + 4;
  KvCache cache(geometry, blocks * options.sequences * UnitsOf(geometry, Format::kK4V4),
                TagNeeds::Uniform(Format::kK2V2));
  KvBacking backing;
  const SchedulerLimits limits = {.max_running = options.sequences,
                                  .max_step_tokens = options.sequences + options.tokens};
  Scheduler scheduler(limits, &cache, &backing);
  std::vector<std::unique_ptr<Sequence>> owned;
  for (size_t i = 0; i < sequences; ++i) {
    auto sequence = std::make_unique<Sequence>();
    sequence->id = static_cast<RequestId>(i) + 1;
    sequence->kv_tokens.reserve(static_cast<size_t>(options.tokens + options.steps) + 2);
    // Lengths spread over a block, so that in every step a few tails become full.
    for (size_t t = 0; t < static_cast<size_t>(options.tokens) - i % kBlockTokens; ++t) {
      sequence->kv_tokens.push_back({{t, i}, 0});  // nothing is shared
    }
    scheduler.Enqueue(sequence.get());
    owned.push_back(std::move(sequence));
  }

  Plan plan;
  Step step;
  const auto add_token = [&] {
    for (const Step::Item& item : step.items) {
      if (item.sequence->pending() == 0)
        item.sequence->kv_tokens.push_back({{item.sequence->kv_tokens.size(), 0}, 0});
    }
  };
  while (scheduler.running() < options.sequences || step.rows != options.sequences) {
    scheduler.MakePlan(&plan);
    scheduler.Commit(plan, &step);
    scheduler.FinishStep();
    add_token();
    if (plan.rows.empty()) return fmt::print(stderr, "the sequences do not fit\n"), 1;
  }

  std::vector<double> plan_us;
  std::vector<double> commit_us;
  std::vector<double> finish_us;
  const auto microseconds = [](Clock::time_point from, Clock::time_point to) {
    return std::chrono::duration<double, std::micro>(to - from).count();
  };
  for (int i = 0; i < options.steps; ++i) {
    const Clock::time_point start = Clock::now();
    scheduler.MakePlan(&plan);
    const Clock::time_point planned = Clock::now();
    scheduler.Commit(plan, &step);
    const Clock::time_point committed = Clock::now();
    scheduler.FinishStep();
    const Clock::time_point finished = Clock::now();
    plan_us.push_back(microseconds(start, planned));
    commit_us.push_back(microseconds(planned, committed));
    finish_us.push_back(microseconds(committed, finished));
    add_token();
  }
  fmt::print("{} sequences of {} tokens, {} steps; microseconds a step:\n", options.sequences, options.tokens,
             options.steps);
  const auto report = [](const char* name, std::vector<double> us) {
    std::sort(us.begin(), us.end());
    fmt::print("  {:8} median {:7.1f}  p90 {:7.1f}  max {:7.1f}\n", name, us[us.size() / 2],
               us[us.size() * 9 / 10], us.back());
  };
  std::vector<double> sum_us;
  for (size_t i = 0; i < plan_us.size(); ++i) sum_us.push_back(plan_us[i] + commit_us[i]);
  report("plan", plan_us);
  report("commit", commit_us);
  report("both", sum_us);
  report("finish", finish_us);
  return 0;
}

}  // namespace
}  // namespace triaxial

int main(int argc, char** argv) {
  triaxial::Options options;
  CLI::App app("Time of planning and committing a decode step.");
  app.add_option("--sequences", options.sequences, "Running sequences.")->check(CLI::Range(1, 4096));
  app.add_option("--tokens", options.tokens, "Tokens of each.")->check(CLI::Range(64, 1 << 20));
  app.add_option("--steps", options.steps, "Decode steps to time.")->check(CLI::Range(1, 100000));
  CLI11_PARSE(app, argc, argv);
  return triaxial::Run(options);
}
