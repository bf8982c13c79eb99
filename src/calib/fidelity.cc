#include "calib/fidelity.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>

#include "base/check.h"

namespace triaxial {
namespace {

constexpr int kDraws = 2000;
constexpr float kFloor = -1e30f;  // for what is no number

float Clean(float logit) { return std::isnan(logit) ? kFloor : std::max(logit, kFloor); }

int32_t Argmax(std::span<const float> logits) {
  size_t best = 0;
  for (size_t i = 1; i < logits.size(); ++i) {
    if (Clean(logits[i]) > Clean(logits[best])) best = i;
  }
  return static_cast<int32_t>(best);
}

double LogSumExp(std::span<const float> logits, float largest) {
  double sum = 0;
  for (const float logit : logits) sum += std::exp(Clean(logit) - largest);
  return largest + std::log(sum);
}

double Percentile(std::vector<double>* values, double q) {
  const auto at = static_cast<size_t>(std::llround(q * static_cast<double>(values->size() - 1)));
  std::nth_element(values->begin(), values->begin() + static_cast<std::ptrdiff_t>(at), values->end());
  return (*values)[at];
}

// The 95% interval of `statistic` over resampled conversations.
template <typename Statistic>
Interval Resample(size_t conversations, uint64_t seed, const Statistic& statistic) {
  if (conversations == 0) return {};
  std::mt19937_64 random(seed);
  std::vector<size_t> drawn(conversations);
  std::vector<double> values;
  for (int i = 0; i < kDraws; ++i) {
    for (size_t& index : drawn) index = random() % conversations;
    values.push_back(statistic(drawn));
  }
  return {Percentile(&values, 0.025), Percentile(&values, 0.975)};
}

double Rate(std::span<const ConversationCount> counts, const std::vector<size_t>& drawn) {
  int64_t hits = 0;
  int64_t total = 0;
  for (const size_t i : drawn) {
    hits += counts[i].hits;
    total += counts[i].total;
  }
  return total == 0 ? 0 : static_cast<double>(hits) / static_cast<double>(total);
}

double Rate(std::span<const ConversationCount> counts) {
  int64_t hits = 0;
  int64_t total = 0;
  for (const ConversationCount& count : counts) {
    hits += count.hits;
    total += count.total;
  }
  return total == 0 ? 0 : static_cast<double>(hits) / static_cast<double>(total);
}

}  // namespace

ReferenceRow MakeReference(std::span<const float> logits) {
  ReferenceRow row;
  row.argmax = Argmax(logits);
  const double sum = LogSumExp(logits, Clean(logits[static_cast<size_t>(row.argmax)]));
  row.log_p.reserve(logits.size());
  for (const float logit : logits) row.log_p.push_back(static_cast<float>(Clean(logit) - sum));
  return row;
}

TokenScore ScoreToken(const ReferenceRow& reference, std::span<const float> logits, int32_t recorded) {
  CHECK(logits.size() == reference.log_p.size());
  CHECK(recorded >= 0 && static_cast<size_t>(recorded) < logits.size());
  const int32_t argmax = Argmax(logits);
  const double sum = LogSumExp(logits, Clean(logits[static_cast<size_t>(argmax)]));
  double kl = 0;
  for (size_t i = 0; i < logits.size(); ++i) {
    const double log_p = reference.log_p[i];
    if (log_p < -80) continue;  // adds nothing that a double could hold beside the rest
    kl += std::exp(static_cast<float>(log_p)) * (log_p - (Clean(logits[i]) - sum));
  }
  return {.argmax = argmax,
          .exact = argmax == recorded,
          .agrees = argmax == reference.argmax,
          .nll = static_cast<float>(sum - Clean(logits[static_cast<size_t>(recorded)])),
          .kl = static_cast<float>(std::max(0.0, kl))};
}

Interval Bootstrap(std::span<const ConversationCount> counts, uint64_t seed) {
  return Resample(counts.size(), seed, [&](const std::vector<size_t>& drawn) { return Rate(counts, drawn); });
}

Interval BootstrapDifference(std::span<const ConversationCount> a, std::span<const ConversationCount> b,
                             uint64_t seed) {
  CHECK(a.size() == b.size());
  return Resample(a.size(), seed,
                  [&](const std::vector<size_t>& drawn) { return Rate(b, drawn) - Rate(a, drawn); });
}

std::vector<ConversationCount> CountByConversation(std::span<const StepScore> steps, Measure measure) {
  const bool all_tokens = measure == Measure::kAllTokens || measure == Measure::kEpisodeAllTokens;
  std::vector<ConversationCount> counts;
  int32_t last = -1;
  for (const StepScore& step : steps) {
    if (counts.empty() || step.conversation != last) counts.emplace_back();
    last = step.conversation;
    ++counts.back().total;
    counts.back().hits += all_tokens ? step.exact : step.action;
  }
  if (measure == Measure::kAllTokens || measure == Measure::kAction) return counts;
  for (ConversationCount& count : counts) count = {count.hits == count.total, 1};
  return counts;
}

Fidelity Summarize(std::span<const StepScore> steps, std::span<float> kl, int64_t elements_per_token,
                   uint64_t seed) {
  Fidelity f;
  double nll = 0;
  int64_t agreeing = 0;
  int64_t kv_bytes = 0;
  int64_t kv_tokens = 0;
  for (const StepScore& step : steps) {
    f.tokens += step.tokens;
    agreeing += step.agreeing;
    nll += step.nll;
    f.kl_mean += step.kl;
    kv_bytes += step.kv_bytes;
    kv_tokens += step.kv_tokens;
  }
  if (f.tokens == 0) return f;
  f.steps = static_cast<int64_t>(steps.size());
  const auto tokens = static_cast<double>(f.tokens);
  f.top1_agreement = static_cast<double>(agreeing) / tokens;
  f.perplexity = std::exp(nll / tokens);
  f.kl_mean /= tokens;
  for (const float one : kl) f.kl_root_mean += std::sqrt(one) / tokens;
  const auto at = static_cast<std::ptrdiff_t>(0.99 * static_cast<double>(kl.size() - 1));
  std::nth_element(kl.begin(), kl.begin() + at, kl.end());
  f.kl_p99 = kl[static_cast<size_t>(at)];
  f.kv_bytes = static_cast<double>(kv_bytes) / static_cast<double>(f.steps);
  f.effective_bits = 8.0 * static_cast<double>(kv_bytes) /
                     static_cast<double>(std::max<int64_t>(1, kv_tokens * elements_per_token));
  const auto rate = [&](Measure measure, double* value, Interval* interval) {
    const std::vector<ConversationCount> counts = CountByConversation(steps, measure);
    *value = Rate(counts);
    *interval = Bootstrap(counts, seed);
    f.conversations = static_cast<int64_t>(counts.size());
  };
  rate(Measure::kAllTokens, &f.all_exact, &f.all_exact_ci);
  rate(Measure::kAction, &f.action_match, &f.action_match_ci);
  rate(Measure::kEpisode, &f.episode_exact, &f.episode_exact_ci);
  rate(Measure::kEpisodeAllTokens, &f.episode_all_exact, &f.episode_all_exact_ci);
  return f;
}

}  // namespace triaxial
