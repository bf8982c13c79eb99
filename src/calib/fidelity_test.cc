#include "calib/fidelity.h"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

namespace triaxial {
namespace {

constexpr int64_t kElements = 1024;  // of one token

StepScore Step(int32_t conversation, bool exact, bool action) {
  return {.conversation = conversation, .exact = exact, .action = action, .tokens = 10, .agreeing = 9};
}

TEST(ScoreToken, EqualsTheDefinition) {
  // p = (1/2, 1/4, 1/4), q = (1/4, 1/2, 1/4): KL = 1/2 ln 2 - 1/4 ln 2.
  const std::vector<float> p = {std::log(2.0f), 0, 0};
  const std::vector<float> q = {5, 5 + std::log(2.0f), 5};
  const TokenScore score = ScoreToken(MakeReference(p), q, 0);
  EXPECT_NEAR(score.kl, 0.25 * std::log(2.0), 1e-6);
  EXPECT_NEAR(score.nll, std::log(4.0), 1e-6);
  EXPECT_FALSE(score.exact);
  EXPECT_FALSE(score.agrees);
  EXPECT_TRUE(ScoreToken(MakeReference(p), q, 1).exact);
}

TEST(ScoreToken, OfTheSameLogitsIsZeroWhateverTheirSize) {
  const std::vector<float> p = {300, -300, 0, 299.5f};
  const std::vector<float> shifted = {1300, 700, 1000, 1299.5f};
  for (const std::vector<float>& q : {p, shifted}) {
    const TokenScore score = ScoreToken(MakeReference(p), q, 3);
    EXPECT_NEAR(score.kl, 0, 1e-6);
    EXPECT_TRUE(score.agrees);
    EXPECT_NEAR(score.nll, 0.5 + std::log1p(std::exp(-0.5)), 1e-4);
  }
}

TEST(ScoreToken, TiesGoToTheSmallerIdAndNanIsNeverBest) {
  const float nan = std::numeric_limits<float>::quiet_NaN();
  const ReferenceRow row = MakeReference(std::vector<float>{nan, 1, 1, 0});
  EXPECT_EQ(row.argmax, 1);
  const TokenScore score = ScoreToken(row, std::vector<float>{nan, nan, 2, nan}, 2);
  EXPECT_TRUE(score.exact);
  EXPECT_FALSE(score.agrees);
  EXPECT_TRUE(std::isfinite(score.kl));
}

TEST(Summarize, CountsStepsConversationsAndBytes) {
  std::vector<StepScore> steps = {Step(0, true, true), Step(0, true, true), Step(1, false, true),
                                  Step(1, true, true), Step(2, false, false)};
  for (StepScore& step : steps) {
    step.nll = 10 * std::log(2.0);
    step.kl = 1;
    step.kv_bytes = 512;
    step.kv_tokens = 2;
  }
  std::vector<float> kl(50, 0.0f);
  kl[7] = 3;
  const Fidelity f = Summarize(steps, kl, kElements, 1);
  EXPECT_EQ(f.steps, 5);
  EXPECT_EQ(f.conversations, 3);
  EXPECT_EQ(f.tokens, 50);
  EXPECT_DOUBLE_EQ(f.all_exact, 3.0 / 5);
  EXPECT_DOUBLE_EQ(f.action_match, 4.0 / 5);
  EXPECT_DOUBLE_EQ(f.episode_exact, 2.0 / 3);
  EXPECT_DOUBLE_EQ(f.episode_all_exact, 1.0 / 3);
  EXPECT_DOUBLE_EQ(f.top1_agreement, 0.9);
  EXPECT_NEAR(f.perplexity, 2, 1e-9);
  EXPECT_NEAR(f.kl_mean, 0.1, 1e-9);
  EXPECT_EQ(f.kl_p99, 0);  // one of fifty lies above the 99th percentile
  EXPECT_DOUBLE_EQ(f.kv_bytes, 512);
  EXPECT_DOUBLE_EQ(f.effective_bits, 8.0 * 512 / (2 * kElements));
  EXPECT_LE(f.action_match_ci.low, f.action_match);
  EXPECT_GE(f.action_match_ci.high, f.action_match);
}

TEST(Bootstrap, IsTheBinomialIntervalWhenEveryConversationHasOneStep) {
  std::vector<ConversationCount> counts;
  for (int i = 0; i < 400; ++i) counts.push_back({i % 4 == 0, 1});
  const Interval interval = Bootstrap(counts, 1);
  const double deviation = std::sqrt(0.25 * 0.75 / 400);
  EXPECT_NEAR(interval.low, 0.25 - 1.96 * deviation, 0.006);
  EXPECT_NEAR(interval.high, 0.25 + 1.96 * deviation, 0.006);
}

// Steps that fail together say less than as many steps apart.
TEST(Bootstrap, ResamplesConversationsNotSteps) {
  std::vector<ConversationCount> apart, together;
  for (int i = 0; i < 400; ++i) apart.push_back({i % 2, 1});
  for (int i = 0; i < 20; ++i) together.push_back({i % 2 * 20, 20});
  const Interval narrow = Bootstrap(apart, 1);
  const Interval wide = Bootstrap(together, 1);
  EXPECT_GT(wide.high - wide.low, 3 * (narrow.high - narrow.low));
}

TEST(Bootstrap, PairedDifferenceOfEqualCountsIsZero) {
  std::vector<ConversationCount> a, b;
  for (int i = 0; i < 30; ++i) a.push_back({i % 3, 2});
  b = a;
  Interval difference = BootstrapDifference(a, b, 1);
  EXPECT_EQ(difference.low, 0);
  EXPECT_EQ(difference.high, 0);
  for (ConversationCount& count : b) --count.hits;
  difference = BootstrapDifference(a, b, 1);
  EXPECT_DOUBLE_EQ(difference.low, -0.5);
  EXPECT_DOUBLE_EQ(difference.high, -0.5);
}

TEST(Bootstrap, OfNothingIsNothing) {
  const Interval interval = Bootstrap({}, 1);
  EXPECT_EQ(interval.low, 0);
  EXPECT_EQ(interval.high, 0);
}

}  // namespace
}  // namespace triaxial
