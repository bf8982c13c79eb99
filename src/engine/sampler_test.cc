#include "engine/sampler.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>
#include <set>

namespace triaxial {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

std::vector<float> RandomLogits(size_t size, float spread, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal(0, spread);
  std::vector<float> logits(size);
  for (float& x : logits) x = normal(random);
  return logits;
}

SampledToken Draw(const SamplingParams& params, const std::vector<float>& logits, uint64_t draw = 0,
                  std::vector<TokenLogprob>* top = nullptr, const TokenHistory& history = {}) {
  Sampler sampler;
  return sampler.Sample(params, history, 7, draw, logits, top);
}

// The definition, written plainly: probabilities after temperature, top-k, top-p and min-p.
std::vector<double> Reference(const SamplingParams& p, const std::vector<float>& logits) {
  std::vector<int> order(logits.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int>(i);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return logits[a] > logits[b]; });
  if (p.top_k > 0 && static_cast<size_t>(p.top_k) < order.size()) order.resize(p.top_k);
  const double max = logits[order[0]];
  std::vector<double> weight;
  double total = 0;
  for (const int i : order) {
    weight.push_back(std::exp((logits[i] - max) / p.temperature));
    total += weight.back();
  }
  std::vector<double> result(logits.size(), 0);
  double sum = 0;
  double kept = 0;
  for (size_t i = 0; i < order.size() && sum < p.top_p * total; ++i) {
    sum += weight[i];
    if (weight[i] < p.min_p) continue;
    result[order[i]] = weight[i];
    kept += weight[i];
  }
  for (double& x : result) x /= kept;
  return result;
}

// Pearson's statistic over tokens with at least five expected draws, the others in one bin, must stay below
// what chance exceeds once in about 10^5 runs; tokens of probability 0 must not occur.
void ExpectDistribution(const SamplingParams& params, const std::vector<float>& logits) {
  const std::vector<double> expected = Reference(params, logits);
  constexpr int kDraws = 4000;
  std::vector<int> count(logits.size(), 0);
  Sampler sampler;
  for (int i = 0; i < kDraws; ++i) {
    const SampledToken s = sampler.Sample(params, {}, 42, static_cast<uint64_t>(i), logits, nullptr);
    ASSERT_GE(s.token, 0);
    ++count[static_cast<size_t>(s.token)];
  }
  double chi = 0;
  int bins = 0;
  double rest_expected = 0;
  double rest_count = 0;
  for (size_t t = 0; t < logits.size(); ++t) {
    if (expected[t] == 0) {
      EXPECT_EQ(count[t], 0) << "token " << t;
    } else if (expected[t] * kDraws < 5) {
      rest_expected += expected[t] * kDraws;
      rest_count += count[t];
    } else {
      chi += std::pow(count[t] - expected[t] * kDraws, 2) / (expected[t] * kDraws);
      ++bins;
    }
  }
  if (rest_expected >= 5) {
    chi += std::pow(rest_count - rest_expected, 2) / rest_expected;
    ++bins;
  }
  const double freedom = std::max(1, bins - 1);
  EXPECT_LT(chi, freedom + 5 * std::sqrt(2 * freedom) + 12) << bins << " bins";
}

std::set<int32_t> Support(const SamplingParams& params, const std::vector<float>& logits) {
  std::set<int32_t> tokens;
  for (uint64_t i = 0; i < 4000; ++i) tokens.insert(Draw(params, logits, i).token);
  return tokens;
}

TEST(Sampler, GreedyTakesTheFirstOfTheLargest) {
  std::vector<float> logits = RandomLogits(5000, 1, 1);
  logits[4321] = logits[1234] = 50;
  EXPECT_EQ(Draw({}, logits).token, 1234);
  EXPECT_EQ(Draw({}, {-3.0f}).token, 0);
}

TEST(Sampler, FollowsTheDefinition) {
  for (const float spread : {0.5f, 2.0f}) {
    const std::vector<float> logits = RandomLogits(300, spread, 3);
    for (const float temperature : {0.7f, 1.5f}) {
      for (const int top_k : {0, 1, 20, 299}) {
        for (const float top_p : {1.0f, 0.8f}) {
          for (const float min_p : {0.0f, 0.2f}) {
            SCOPED_TRACE(testing::Message()
                         << spread << " " << temperature << " " << top_k << " " << top_p << " " << min_p);
            SamplingParams params;
            params.temperature = temperature;
            params.top_k = top_k;
            params.top_p = top_p;
            params.min_p = min_p;
            ExpectDistribution(params, logits);
          }
        }
      }
    }
  }
}

TEST(Sampler, FollowsTheDefinitionOverSeveralBlocks) {
  std::vector<float> logits = RandomLogits(3001, 0.1f, 5);
  for (size_t i = 0; i < logits.size(); i += 100) logits[i] += 6;
  SamplingParams params;
  params.temperature = 1;
  ExpectDistribution(params, logits);
  params.top_p = 0.9f;
  ExpectDistribution(params, logits);
}

TEST(Sampler, TopPKeepsTheFewestThatReachIt) {
  // Probabilities 1/2, 1/4, 1/8, 1/8: exact in binary.
  const std::vector<float> logits = {std::log(1.0f), std::log(4.0f), std::log(2.0f), std::log(1.0f)};
  for (const int top_k : {0, 3}) {  // with top-k 3: 4/7, 2/7, 1/7
    SamplingParams params;
    params.temperature = 1;
    params.top_k = top_k;
    params.top_p = 0.49f;
    EXPECT_EQ(Support(params, logits), (std::set<int32_t>{1}));
    params.top_p = 0.76f;
    EXPECT_EQ(Support(params, logits), top_k == 0 ? (std::set<int32_t>{0, 1, 2}) : (std::set<int32_t>{1, 2}));
  }
  // Equal probabilities: a sum that reaches top_p exactly is enough, and ties go to smaller ids.
  SamplingParams params;
  params.temperature = 1;
  params.top_p = 0.5f;
  EXPECT_EQ(Support(params, {0, 0, 0, 0}), (std::set<int32_t>{0, 1}));
  std::vector<float> flat(1024, 0);
  params.top_p = 0.0625f;
  const std::set<int32_t> kept = Support(params, flat);
  EXPECT_EQ(kept.size(), 64u);
  EXPECT_EQ(*kept.rbegin(), 63);
}

TEST(Sampler, MinPKeepsWhatReachesItsShareOfTheBest) {
  SamplingParams params;
  params.temperature = 1;
  params.min_p = 0.5f;
  for (const int top_k : {0, 3}) {
    params.top_k = top_k;
    const std::vector<float> logits = {0, std::log(0.51f), std::log(0.49f), -1};
    EXPECT_EQ(Support(params, logits), (std::set<int32_t>{0, 1}));
  }
  params.min_p = 1;
  EXPECT_EQ(Support(params, {1, 2, 2, 0}), (std::set<int32_t>{1, 2}));
}

TEST(Sampler, TopKCutsTiesBySmallerId) {
  SamplingParams params;
  params.temperature = 1;
  params.top_k = 3;
  std::vector<float> logits(2000, 0);
  logits[1500] = 1;
  EXPECT_EQ(Support(params, logits), (std::set<int32_t>{0, 1, 1500}));
}

TEST(Sampler, TheSameSeedAndDrawGiveTheSameToken) {
  const std::vector<float> logits = RandomLogits(1000, 1, 9);
  SamplingParams params;
  params.temperature = 1;
  Sampler one;
  Sampler other;
  int differ_by_seed = 0;
  int differ_by_draw = 0;
  for (uint64_t i = 0; i < 200; ++i) {
    const int32_t token = one.Sample(params, {}, 5, i, logits, nullptr).token;
    (void)other.Sample(params, {}, 99, i, RandomLogits(700, 2, 1), nullptr);  // somebody else in the batch
    EXPECT_EQ(other.Sample(params, {}, 5, i, logits, nullptr).token, token);
    differ_by_seed += one.Sample(params, {}, 6, i, logits, nullptr).token != token;
    differ_by_draw += one.Sample(params, {}, 5, i + 1, logits, nullptr).token != token;
  }
  EXPECT_GT(differ_by_seed, 190);
  EXPECT_GT(differ_by_draw, 190);
}

TEST(Sampler, DrawsAreUniformForEverySeed) {
  for (const uint64_t seed : {uint64_t{0}, uint64_t{1}, uint64_t{2}, ~uint64_t{0}}) {
    std::array<int, 10> bins{};
    for (uint64_t i = 0; i < 10000; ++i) {
      const double u = UniformDraw(seed, i);
      ASSERT_GE(u, 0);
      ASSERT_LT(u, 1);
      ++bins[static_cast<size_t>(u * 10)];
    }
    for (const int count : bins) EXPECT_NEAR(count, 1000, 150);
  }
}

TEST(Sampler, RepetitionPenaltyCoversPromptAndOutput) {
  SamplingParams params;
  params.repetition_penalty = 2;
  const std::vector<int32_t> prompt = {0, 0, 3};
  TokenHistory history(params, prompt);
  history.Add(1);
  std::vector<float> logits = {4, -1, 3, kNan, 1};
  history.Penalize(params, logits);
  EXPECT_EQ(logits[0], 2);   // positive: divided, once however often it occurs
  EXPECT_EQ(logits[1], -2);  // negative: multiplied
  EXPECT_EQ(logits[2], 3);
  EXPECT_EQ(Draw(params, {4, -1, 3, kNan, 1}, 0, nullptr, history).token, 2);
}

TEST(Sampler, PresenceAndFrequencyPenaltiesCoverTheOutputOnly) {
  SamplingParams params;
  params.presence_penalty = 0.5f;
  params.frequency_penalty = 0.25f;
  TokenHistory history(params, std::vector<int32_t>{0, 1, 2});
  history.Add(1);
  history.Add(1);
  history.Add(1);
  history.Add(2);
  std::vector<float> logits = {1, 1, 1, 1};
  history.Penalize(params, logits);
  EXPECT_EQ(logits, (std::vector<float>{1, -0.25f, 0.25f, 1}));
}

TEST(Sampler, LogprobsAreThoseOfTheRawLogits) {
  const std::vector<float> logits = RandomLogits(5000, 3, 11);
  double sum = 0;
  for (const float x : logits) sum += std::exp(static_cast<double>(x));
  SamplingParams params;
  params.temperature = 3;
  params.top_k = 100;
  params.presence_penalty = 2;
  params.logprobs = 5;
  TokenHistory history(params, {});
  std::vector<int> order(logits.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = static_cast<int>(i);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return logits[a] > logits[b]; });
  for (int i = 0; i < 30; ++i) history.Add(order[i]);
  for (uint64_t draw = 0; draw < 20; ++draw) {
    std::vector<TokenLogprob> top = {{1, 2}};
    const SampledToken sampled = Draw(params, logits, draw, &top, history);
    EXPECT_NEAR(sampled.logprob, logits[sampled.token] - std::log(sum), 1e-4);
    ASSERT_EQ(top.size(), 5u);
    for (int i = 0; i < 5; ++i) {
      EXPECT_EQ(top[i].token, order[i]);
      EXPECT_NEAR(top[i].logprob, logits[order[i]] - std::log(sum), 1e-4);
    }
  }
}

TEST(Sampler, SurvivesNanAndInfinity) {
  std::vector<SamplingParams> settings(6);
  settings[1].temperature = 0.7f;
  settings[2].temperature = 0.7f;
  settings[2].top_k = 2;
  settings[3].temperature = 100;
  settings[3].top_p = 0.5f;
  settings[3].min_p = 0.1f;
  settings[4].temperature = 1e-5f;
  settings[5].temperature = 1;
  settings[5].repetition_penalty = 0.01f;
  for (SamplingParams& params : settings) {
    params.logprobs = 3;
    TokenHistory history(params, std::vector<int32_t>{0, 1, 2, 3});
    std::vector<TokenLogprob> top;
    for (uint64_t draw = 0; draw < 50; ++draw) {
      EXPECT_EQ(Draw(params, {kNan, -kInf, kNan, -kInf}, draw, &top, history).token, -1);
      EXPECT_EQ(Draw(params, {kNan, -kInf, 3, kNan}, draw, &top, history).token, 2);
      const SampledToken infinite = Draw(params, {0, kInf, 5, kInf, kNan}, draw, &top, history);
      EXPECT_TRUE(infinite.token == 1 || infinite.token == 3);
      EXPECT_NEAR(infinite.logprob, std::log(0.5), 1e-4);
      for (const TokenLogprob& t : top) EXPECT_TRUE(std::isfinite(t.logprob));
      EXPECT_GE(Draw(params, {-3e38f, 3e38f, 2e38f, kNan}, draw, &top, history).token, 0);
      EXPECT_EQ(Draw(params, {-3e38f, -3e38f, -2e38f, kNan}, draw, &top).token, 2);
    }
  }
}

TEST(Sampler, ValidatesEveryField) {
  EXPECT_TRUE(Validate({}).ok());
  const auto refused = [](auto set, const char* field) {
    SamplingParams params;
    set(&params);
    const Status status = Validate(params);
    EXPECT_EQ(status.code(), Code::kInvalidArgument) << field;
    EXPECT_NE(status.message().find(field), std::string::npos) << status.message();
  };
  refused([](SamplingParams* p) { p->temperature = -0.1f; }, "temperature");
  refused([](SamplingParams* p) { p->temperature = kNan; }, "temperature");
  refused([](SamplingParams* p) { p->top_p = 0; }, "top_p");
  refused([](SamplingParams* p) { p->top_p = 1.01f; }, "top_p");
  refused([](SamplingParams* p) { p->top_k = -1; }, "top_k");
  refused([](SamplingParams* p) { p->min_p = 1.5f; }, "min_p");
  refused([](SamplingParams* p) { p->presence_penalty = 2.5f; }, "presence_penalty");
  refused([](SamplingParams* p) { p->frequency_penalty = kNan; }, "frequency_penalty");
  refused([](SamplingParams* p) { p->repetition_penalty = 0; }, "repetition_penalty");
  refused([](SamplingParams* p) { p->max_tokens = -1; }, "max_tokens");
  refused([](SamplingParams* p) { p->logprobs = 21; }, "logprobs");
}

}  // namespace
}  // namespace triaxial
