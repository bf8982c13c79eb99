#include "replay/simulation.h"

#include <gtest/gtest.h>

#include "replay/report.h"

namespace triaxial {
namespace {

constexpr char kMooncake[] = "tests/data/traces/mooncake_conversation_60.jsonl";

RecordedSession Request(double arrival, int32_t prompt, int32_t output) {
  RecordedRequest request;
  request.arrival = arrival;
  request.prompt_tokens = prompt;
  request.output_tokens = output;
  return {.id = "", .steps = {request}};
}

// A small model on a device whose steps are easily calculated.
SimulationOptions Options(const std::string& policy, int64_t kv_bytes) {
  SimulationOptions options;
  options.policy = *LoadPolicy(policy);
  options.geometry = {2, 2, 128, Codec::kRotated};
  options.kv_bytes = kv_bytes;
  options.max_running = 64;
  options.max_step_tokens = 512;
  options.max_model_len = 1 << 18;
  options.cost.layer_weights = 1 << 20;
  options.cost.head_weights = 1 << 18;
  options.cost.attention_flops = 4096;
  options.cost.kv_bytes_per_row = 2048;
  options.device.bandwidth = 1e9;
  options.device.flops = 1e11;
  options.device.step_seconds = 1e-3;
  return options;
}

SimulationResult Replay(const Recording& recording, const SimulationOptions& options,
                        const ArrivalOptions& arrivals = {}) {
  auto result = Simulate(recording, arrivals, options, nullptr);
  EXPECT_TRUE(result.ok()) << result.status().message();
  return std::move(result).value();
}

TEST(Simulation, TheClockIsTheSumOfTheSteps) {
  Recording recording;
  recording.trace = {Request(0, 100, 3)};
  const SimulationOptions options = Options("bf16", 64 << 20);
  const SimulationResult result = Replay(recording, options);

  StepWork prefill{.rows = 100, .logits_rows = 1, .contexts = 5050};
  prefill.kv_bytes[static_cast<size_t>(Format::kBf16)] =
      BlockBytes(options.geometry, Format::kBf16) * (64 + 48) / 64;  // a block, and a tail with room for 48
  const double first = StepSeconds(options.cost, options.device, prefill);
  double all = first;
  for (const double context : {101., 102.}) {
    StepWork decode = prefill;
    decode.rows = 1;
    decode.contexts = context;
    all += StepSeconds(options.cost, options.device, decode);
  }
  ASSERT_EQ(result.ttft.size(), 1u);
  EXPECT_NEAR(result.ttft[0], first, 1e-6);
  EXPECT_NEAR(result.seconds, all, 1e-9);
  EXPECT_NEAR(result.tpot[0], (all - first) / 2, 1e-6);
  EXPECT_EQ(result.steps, 3);
  EXPECT_EQ(result.generated_tokens, 3);
}

TEST(Simulation, RequestsWaitForTheirTimeAndForTheirTurn) {
  Recording recording;
  recording.trace = {Request(0, 64, 1), Request(50, 64, 1), Request(50, 64, 1)};
  SimulationOptions options = Options("bf16", 64 << 20);
  options.max_running = 1;
  const SimulationResult result = Replay(recording, options);
  EXPECT_GT(result.seconds, 50);
  EXPECT_LT(result.seconds, 51);
  ASSERT_EQ(result.ttft.size(), 3u);
  EXPECT_LT(result.ttft[0], 0.5);
  EXPECT_GT(result.ttft[2], 1.5 * result.ttft[1]) << "the third waits for the second";
  EXPECT_NEAR(Replay(recording, options, {.speedup = 10}).seconds, 5, 0.5);
}

TEST(Simulation, EveryRequestOfATraceEndsAndNothingStaysBehind) {
  const auto recording = LoadRecording({kMooncake}, {});
  ASSERT_TRUE(recording.ok()) << recording.status().message();
  for (const char* policy : {"bf16", "paper", "kivi"}) {
    SimulationOptions options = Options(policy, int64_t{1} << 30);
    const SimulationResult result = Replay(*recording, options, {.requests = 150});
    EXPECT_EQ(result.requests, 150) << policy;
    EXPECT_EQ(result.finished, 150) << policy;
    EXPECT_EQ(result.ttft.size(), 150u) << policy;
    EXPECT_LE(result.rounding_loss, 0.03) << policy;
    EXPECT_LE(result.peak_usage, 1) << policy;
  }
}

TEST(Simulation, RunsAreTheSameAgain) {
  const auto recording = LoadRecording({kMooncake}, {});
  ASSERT_TRUE(recording.ok());
  const auto report = [&] {
    const SimulationResult result = Replay(*recording, Options("paper", 300 << 20));
    std::vector<PolicyRun> runs;
    runs.push_back({*LoadPolicy("paper"), result, 0});
    return ReportJson(runs).dump() + SeriesJson(result.series).dump();
  };
  EXPECT_EQ(report(), report());
}

TEST(Simulation, TooLittleMemoryCostsTimeButNoRequest) {
  Recording recording;
  for (int i = 0; i < 40; ++i) recording.trace.push_back(Request(0, 200, 900));
  const int64_t all = 40 * 20 * BlockBytes(Options("bf16", 0).geometry, Format::kBf16);
  const SimulationResult plenty = Replay(recording, Options("bf16", all));
  const SimulationResult scarce = Replay(recording, Options("bf16", all / 4));
  EXPECT_EQ(plenty.preemptions, 0);
  EXPECT_GT(scarce.preemptions, 0);
  EXPECT_EQ(scarce.finished, 40);
  EXPECT_GT(scarce.seconds, plenty.seconds);
  EXPECT_LT(scarce.mean_running, plenty.mean_running);
  EXPECT_EQ(plenty.prefilled_tokens, plenty.prompt_tokens);
  EXPECT_GT(scarce.prefilled_tokens, scarce.prompt_tokens) << "what was preempted is computed again";
}

TEST(Simulation, WhatCannotFitIsRefusedOrFails) {
  Recording recording;
  recording.trace = {Request(0, 5000, 10), Request(1, 100, 10), Request(2, 300, 5000), Request(3, 50, 10)};
  SimulationOptions options = Options("bf16", 1 << 20);  // 8 blocks of 64 tokens
  EXPECT_EQ(Replay(recording, options).refused, 1);
  EXPECT_EQ(Replay(recording, options).failed, 1);
  EXPECT_EQ(Replay(recording, options).finished, 2);
  options.max_model_len = 200;
  EXPECT_EQ(Replay(recording, options).refused, 2);
  EXPECT_FALSE(Simulate(recording, {}, Options("bf16", 1000), nullptr).ok());
}

// No more than 3% of the bytes of blocks are lost, and the capacity under mixed formats is the sum of bytes,
// for every mix from all INT4 to all INT2 (policy `paper`: instructions at 4 bits, screenshots at 2).
TEST(Simulation, CapacityIsTheSumOfBytesForEveryMix) {
  const KvGeometry geometry = Options("paper", 0).geometry;
  for (int tenths = 0; tenths <= 10; ++tenths) {
    Recording recording;
    recording.mix.system_tokens = 0;
    recording.mix.turn.clear();
    if (tenths > 0) recording.mix.turn.push_back({Modal::kImage, Semantic::kObs, 128 * tenths});
    if (tenths < 10) recording.mix.turn.push_back({Modal::kText, Semantic::kInst, 128 * (10 - tenths)});
    constexpr int kPrompt = 1280 * 16, kAnswer = 40;
    for (int i = 0; i < 60; ++i) recording.trace.push_back(Request(0, kPrompt, kAnswer));
    SimulationOptions options = Options("paper", 96 << 20);
    options.max_step_tokens = 1 << 16;  // many are there before the first has its answer
    const SimulationResult result = Replay(recording, options);
    const double bits = (tenths * EffectiveBits(geometry, Format::kK2V2) +
                         (10 - tenths) * EffectiveBits(geometry, Format::kK4V4)) /
                        10;
    EXPECT_EQ(result.finished, 60);
    EXPECT_LE(result.rounding_loss, 0.03) << tenths;
    EXPECT_NEAR(result.block_bits / bits, 1, 0.03) << tenths;
    // The arena fills up until one more request, its tail and a block of growth do not fit.
    const double bytes_per_token =
        bits / 8 * 2 * geometry.num_layers * geometry.num_kv_heads * geometry.head_dim;
    const auto tail = static_cast<double>(BlockBytes(geometry, Format::kBf16));
    const double held =
        static_cast<double>(result.peak_tokens) * bytes_per_token + result.peak_running * tail;
    const double one_more = kPrompt * bytes_per_token + 2 * tail;
    EXPECT_GT(held + one_more, 0.97 * static_cast<double>(options.kv_bytes)) << tenths;
    EXPECT_LE(static_cast<double>(result.peak_tokens) * bytes_per_token,
              1.03 * static_cast<double>(options.kv_bytes))
        << tenths;
  }
}

// The same on a real trace, where a priced policy's budget makes the mix and evictions scatter what is free.
TEST(Simulation, ATraceFillsTheMemoryWhateverTheMix) {
  const auto recording = LoadRecording({kMooncake}, {});
  ASSERT_TRUE(recording.ok());
  const auto priced =
      ParsePolicy(Json::parse(R"({"version": 1, "name": "priced", "price": 1e-12, "distortion": {
      "*/*/inst": {"k2v2": 4e-3, "k4v2": 2e-3, "k4v4": 1e-9}, "*/*/user": {"k2v2": 3e-3, "k4v2": 1.5e-3, "k4v4": 1e-9},
      "*/*/*": {"k2v2": 1e-3, "k4v2": 5e-4, "k4v4": 1e-9}}})"),
                  "priced");
  ASSERT_TRUE(priced.ok()) << priced.status().message();
  double last = 16;
  for (const double budget : {4.25, 3.75, 3.25, 2.75, 2.25}) {
    SimulationOptions options = Options("bf16", 128 << 20);
    options.policy = *priced;
    options.budget_bits = budget;
    const SimulationResult result = Replay(*recording, options, {.requests = 120});
    ASSERT_TRUE(result.filled.has_value()) << budget;
    EXPECT_GE(*result.filled, 0.97) << budget;
    EXPECT_LE(*result.filled, 1) << budget;
    EXPECT_LE(result.rounding_loss, 0.03) << budget;
    EXPECT_LE(result.block_bits, budget + 0.15);
    EXPECT_LE(result.block_bits, last);
    last = result.block_bits;
    EXPECT_EQ(result.finished, 120) << budget;
  }
}

TEST(Simulation, MemoryThatSufficesWasNeverShort) {
  Recording recording;
  recording.trace = {Request(0, 100, 3)};
  const SimulationResult result = Replay(recording, Options("bf16", 64 << 20));
  EXPECT_FALSE(result.filled.has_value());
  EXPECT_EQ(result.prefilled_tokens, 100);
}

TEST(Simulation, AgentsTakeTurns) {
  Recording recording;
  RecordedSession session = Request(0, 100, 5);
  session.steps.push_back(Request(0, 200, 5).steps[0]);
  recording.agents = {session, session, session};
  const SimulationResult one =
      Replay(recording, Options("bf16", 64 << 20), {.agents = 1, .think_seconds = 10});
  EXPECT_EQ(one.finished, 6);
  EXPECT_EQ(one.peak_running, 1);
  EXPECT_GT(one.seconds, 50) << "an agent thinks after each of five answers";
  const SimulationResult three =
      Replay(recording, Options("bf16", 64 << 20), {.agents = 3, .think_seconds = 10});
  EXPECT_EQ(three.finished, 6);
  EXPECT_LT(three.seconds, 18);
  const SimulationResult many =
      Replay(recording, Options("bf16", 64 << 20), {.requests = 100, .agents = 7, .think_seconds = 0});
  EXPECT_EQ(many.finished, 100);
  EXPECT_LE(many.peak_running, 7);
  EXPECT_GT(many.peak_running, 3);
}

TEST(Simulation, AConversationFindsItsPrefixAgain) {
  auto step = std::make_shared<RenderedStep>();
  step->system_tokens = 128;
  step->tokens.resize(640);
  for (size_t i = 0; i < step->tokens.size(); ++i) step->tokens[i] = static_cast<int32_t>(i);
  step->tags.assign(640, 0);
  auto next = std::make_shared<RenderedStep>(*step);
  next->tokens.resize(1280, 7);
  next->tags.resize(1280, 0);
  Recording recording;
  recording.agents.resize(1);
  recording.agents[0].steps.resize(2);
  recording.agents[0].steps[0] = {.prompt_tokens = 600, .output_tokens = 40, .blocks = {}, .rendered = step};
  recording.agents[0].steps[1] = {.prompt_tokens = 1240, .output_tokens = 40, .blocks = {}, .rendered = next};
  // The second step finds the nine blocks of the first one, answer included (its last token was never
  // stored).
  const SimulationResult once = Replay(recording, Options("bf16", 64 << 20), {.agents = 1});
  EXPECT_DOUBLE_EQ(once.hit_rate, 9 * 64 / 1840.);
  // In the second round the system prompt's two blocks are there before the first step.
  const SimulationResult twice = Replay(recording, Options("bf16", 64 << 20), {.requests = 4, .agents = 1});
  EXPECT_DOUBLE_EQ(twice.hit_rate, (9 + 2 + 9) * 64 / 3680.);
  EXPECT_LT(twice.ttft[0], once.ttft[1]);
}

TEST(Simulation, APricedPolicyDemotesWhereBf16Preempts) {
  Json entry;
  const std::array<double, kFormats> loss = {1e-2, 6e-3, 1e-3, 1e-4, 0};
  for (int f = 0; f + 1 < kFormats; ++f)
    entry[std::string(Name(static_cast<Format>(f)))] = loss[static_cast<size_t>(f)];
  const Json json = {{"version", 1}, {"name", "priced"}, {"distortion", {{"*/*/*", entry}}}, {"price", 0.0}};
  const auto priced = ParsePolicy(json, "priced");
  ASSERT_TRUE(priced.ok()) << priced.status().message();
  Recording recording;
  for (int i = 0; i < 40; ++i) recording.trace.push_back(Request(0, 200, 900));
  SimulationOptions options = Options("bf16", 0);
  options.kv_bytes = 10 * 20 * BlockBytes(options.geometry, Format::kBf16);  // a quarter of what all take
  options.distortion = priced->distortion;
  const SimulationResult bf16 = Replay(recording, options);
  options.policy = *priced;
  const SimulationResult demoting = Replay(recording, options);
  EXPECT_GT(bf16.preemptions, 0);
  EXPECT_EQ(bf16.demotions, 0);
  EXPECT_EQ(demoting.preemptions, 0);
  EXPECT_GT(demoting.demotions_by_cause[static_cast<size_t>(Cause::kPressure)], 0);
  EXPECT_GT(demoting.mean_running, 1.5 * bf16.mean_running);
  EXPECT_EQ(bf16.predicted_loss, 0.0);
  EXPECT_GT(*demoting.predicted_loss, 0);
  EXPECT_LT(*demoting.predicted_loss, loss[0]);
  EXPECT_EQ(demoting.finished, 40);
}

TEST(Percentile, IsANearestRank) {
  EXPECT_EQ(Percentile({}, 0.5), 0);
  EXPECT_EQ(Percentile({3}, 0.99), 3);
  EXPECT_EQ(Percentile({1, 2, 3, 4}, 0.5), 2);
  EXPECT_EQ(Percentile({1, 2, 3, 4}, 0.51), 3);
  EXPECT_EQ(Percentile({1, 2, 3, 4}, 1), 4);
}

TEST(TimeSeries, MergesIntervalsAndLosesNothing) {
  TimeSeries series(8, 1);
  Sample sample;
  sample.running = 2;
  sample.generated = 3;
  for (int i = 0; i < 20; ++i) series.Add(i, 1, sample);
  EXPECT_EQ(series.interval(), 4);
  double running = 0, generated = 0, seconds = 0;
  for (const TimeSeries::Point& point : series.points()) {
    running += point.sample.running;
    generated += point.sample.generated;
    seconds += point.seconds;
  }
  EXPECT_DOUBLE_EQ(running, 40);
  EXPECT_DOUBLE_EQ(generated, 60);
  EXPECT_DOUBLE_EQ(seconds, 20);
  EXPECT_LE(series.points().size(), 8u);
}

TEST(Report, HasTheKeysThatScriptsRead) {
  Recording recording;
  recording.trace = {Request(0, 100, 3)};
  std::vector<PolicyRun> runs;
  runs.push_back({*LoadPolicy("paper"), Replay(recording, Options("paper", 64 << 20)), 0.5});
  const Json json = ReportJson(runs);
  const Json& policy = json.at("policies").at(0);
  for (const char* key :
       {"name", "effective_bits", "capacity_tokens", "rounding_loss", "hit_rate", "demotions", "preemptions",
        "throughput", "ttft_p50", "ttft_p99", "predicted_loss"}) {
    EXPECT_TRUE(policy.contains(key)) << key;
  }
  EXPECT_EQ(policy["name"], "paper");
  EXPECT_TRUE(policy["predicted_loss"].is_null());
}

}  // namespace
}  // namespace triaxial
