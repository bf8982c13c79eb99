#include "engine/sampler.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <limits>

namespace triaxial {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kHuge = 1e36f;  // stands for infinity, so that differences stay numbers
constexpr float kGreedyBelow = 1e-5f;
constexpr size_t kLanes = 16;   // independent sums or maxima, which the compiler keeps in vector registers
constexpr size_t kBlock = 512;  // logits per step of a scan; a multiple of kLanes

// Largest value of a block; NaN is ignored. `count` is at most kBlock.
float BlockMax(const float* x, size_t count) {
  std::array<float, kLanes> lanes;
  lanes.fill(-kInfinity);
  size_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (size_t j = 0; j < kLanes; ++j) lanes[j] = x[i + j] > lanes[j] ? x[i + j] : lanes[j];
  }
  for (; i < count; ++i) lanes[0] = x[i] > lanes[0] ? x[i] : lanes[0];
  float max = lanes[0];
  for (const float lane : lanes) max = lane > max ? lane : max;
  return max;
}

struct Best {
  int32_t token = -1;
  float value = -kInfinity;
};

Best ArgMax(std::span<const float> logits) {
  Best best;
  for (size_t begin = 0; begin < logits.size(); begin += kBlock) {
    const size_t count = std::min(kBlock, logits.size() - begin);
    const float max = BlockMax(logits.data() + begin, count);
    if (!(max > best.value)) continue;
    const float* at = std::find(logits.data() + begin, logits.data() + begin + count, max);
    best = {static_cast<int32_t>(at - logits.data()), max};
  }
  return best;
}

// exp(x) for x <= 0 to about two units in the last place, 0 below -80 and for NaN. Branch-free, so that loops
// over it become vector code on every machine.
inline float ExpOfNegative(float x) {
  const float safe = x > -80.0f ? x : -80.0f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  const float shifted = safe * 1.44269504f + kRound;
  const float n = shifted - kRound;
  const float r = (safe - n * 0.693359375f) - n * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const int32_t exponent = std::bit_cast<int32_t>(shifted) << 23;  // n, shifted into the exponent's place
  const float scaled = std::bit_cast<float>(std::bit_cast<int32_t>(p) + exponent);
  return x > -80.0f ? scaled : 0.0f;
}

// weights[i] = exp((x[i] - max) * scale); returns their sum. `count` is at most kBlock.
double BlockWeights(const float* __restrict x, size_t count, float max, float scale,
                    float* __restrict weights) {
  for (size_t i = 0; i < count; ++i) weights[i] = ExpOfNegative((x[i] - max) * scale);
  std::array<float, kLanes> sums{};
  size_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (size_t j = 0; j < kLanes; ++j) sums[j] += weights[i + j];
  }
  double sum = 0;
  for (; i < count; ++i) sum += weights[i];
  for (const float lane : sums) sum += lane;
  return sum;
}

// log(sum(exp(x - max))).
double LogSumExp(std::span<const float> logits, float max) {
  std::array<float, kBlock> weights;
  double sum = 0;
  for (size_t begin = 0; begin < logits.size(); begin += kBlock) {
    const size_t count = std::min(kBlock, logits.size() - begin);
    sum += BlockWeights(logits.data() + begin, count, max, 1.0f, weights.data());
  }
  return std::log(sum);
}

uint64_t Mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

}  // namespace

double UniformDraw(uint64_t seed, uint64_t draw) {
  constexpr uint64_t kGamma = 0x9e3779b97f4a7c15u;
  const uint64_t bits = Mix(Mix(seed + kGamma) + (draw + 1) * kGamma);
  return static_cast<double>(bits >> 11) * 0x1p-53;
}

TokenHistory::TokenHistory(const SamplingParams& params, std::span<const int32_t> prompt) {
  active_ = params.repetition_penalty != 1 || params.presence_penalty != 0 || params.frequency_penalty != 0;
  if (!active_) return;
  if (params.repetition_penalty != 1) {
    std::vector<int32_t> tokens(prompt.begin(), prompt.end());
    std::sort(tokens.begin(), tokens.end());
    tokens.erase(std::unique(tokens.begin(), tokens.end()), tokens.end());
    entries_.reserve(tokens.size() + 1024);
    for (const int32_t token : tokens) entries_.push_back({token, 0});
  } else {
    entries_.reserve(1024);
  }
}

void TokenHistory::Add(int32_t token) {
  if (!active_) return;
  auto at = std::lower_bound(entries_.begin(), entries_.end(), token,
                             [](const Entry& entry, int32_t t) { return entry.token < t; });
  if (at == entries_.end() || at->token != token) at = entries_.insert(at, {token, 0});
  ++at->generated;
}

void TokenHistory::Penalize(const SamplingParams& params, std::span<float> logits) const {
  for (const Entry& entry : entries_) {
    float& logit = logits[static_cast<size_t>(entry.token)];
    logit = logit > 0 ? logit / params.repetition_penalty : logit * params.repetition_penalty;
    if (entry.generated > 0) {
      logit -= params.presence_penalty + params.frequency_penalty * static_cast<float>(entry.generated);
    }
    if (logit > kHuge) logit = kHuge;
  }
}

// Leaves in candidates_ the k best logits, in no order. Logits of minus infinity and NaN are never among
// them.
void Sampler::SelectTop(std::span<const float> logits, size_t k) {
  candidates_.clear();
  const size_t limit = std::max<size_t>(4 * k, 256);
  float threshold = -kInfinity;  // whatever does not exceed it has k better ones before it
  const auto shrink = [&] {
    if (candidates_.size() <= k) return;
    const auto kth = candidates_.begin() + static_cast<ptrdiff_t>(k) - 1;
    std::nth_element(candidates_.begin(), kth, candidates_.end(), Ahead);
    threshold = kth->value;
    candidates_.resize(k);
  };
  constexpr size_t kStride = 64;
  for (size_t begin = 0; begin < logits.size(); begin += kStride) {
    const size_t count = std::min(kStride, logits.size() - begin);
    if (!(BlockMax(logits.data() + begin, count) > threshold)) continue;
    for (size_t i = begin; i < begin + count; ++i) {
      if (logits[i] > threshold) candidates_.push_back({logits[i], static_cast<int32_t>(i)});
    }
    if (candidates_.size() >= limit) shrink();
  }
  shrink();
}

// Drops from candidates_ (weights) all but the fewest best ones whose sum reaches `mass`, in no order.
void Sampler::KeepNucleus(double mass) {
  size_t begin = 0;
  size_t end = candidates_.size();
  double before = 0;
  const auto at = [&](size_t i) { return candidates_.begin() + static_cast<ptrdiff_t>(i); };
  while (end - begin > 32) {  // halve the range that holds the boundary, instead of sorting everything
    const size_t middle = begin + (end - begin) / 2;
    std::nth_element(at(begin), at(middle), at(end), Ahead);
    double upper = 0;
    for (size_t i = begin; i < middle; ++i) upper += candidates_[i].value;
    if (before + upper >= mass) {
      end = middle;
    } else {
      before += upper;
      begin = middle;
    }
  }
  std::sort(at(begin), at(end), Ahead);
  while (begin < end && before < mass) before += candidates_[begin++].value;
  candidates_.resize(begin);
}

int32_t Sampler::DrawFromTop(const SamplingParams& params, std::span<const float> logits, double uniform) {
  SelectTop(logits, static_cast<size_t>(params.top_k));
  std::sort(candidates_.begin(), candidates_.end(), Ahead);
  const float max = candidates_[0].value;
  double total = 0;
  for (Candidate& c : candidates_) {
    c.value = std::exp((c.value - max) / params.temperature);
    total += c.value;
  }
  const double mass = total * params.top_p;
  double kept = 0;
  size_t size = 0;
  while (size < candidates_.size() && kept < mass && candidates_[size].value >= params.min_p) {
    kept += candidates_[size++].value;
  }
  double rest = uniform * kept;
  for (size_t i = 0; i < size; ++i) {
    rest -= candidates_[i].value;
    if (rest < 0) return candidates_[i].token;
  }
  return candidates_[0].token;  // rounding left nothing over
}

int32_t Sampler::DrawFromAll(const SamplingParams& params, std::span<const float> logits, float max,
                             double uniform) {
  weights_.resize(logits.size());
  block_sums_.clear();
  double total = 0;
  const float scale = 1.0f / params.temperature;
  for (size_t begin = 0; begin < logits.size(); begin += kBlock) {
    const size_t count = std::min(kBlock, logits.size() - begin);
    block_sums_.push_back(BlockWeights(logits.data() + begin, count, max, scale, weights_.data() + begin));
    total += block_sums_.back();
  }

  if (params.top_p >= 1 && params.min_p <= 0) {
    double rest = uniform * total;
    size_t block = 0;
    while (block + 1 < block_sums_.size() && rest >= block_sums_[block]) rest -= block_sums_[block++];
    int32_t last = -1;
    for (size_t i = block * kBlock; i < std::min((block + 1) * kBlock, weights_.size()); ++i) {
      if (weights_[i] <= 0) continue;
      last = static_cast<int32_t>(i);
      rest -= weights_[i];
      if (rest < 0) break;
    }
    return last >= 0 ? last : ArgMax(logits).token;
  }

  // All tokens below this weight together hold less than 1 - top_p: the nucleus never needs one of them.
  const double outside = (1.0 - params.top_p) * total / static_cast<double>(logits.size());
  const float least = std::max(params.min_p, static_cast<float>(0.999 * std::max(outside, 0.0)));
  candidates_.clear();
  for (size_t i = 0; i < weights_.size(); ++i) {
    if (weights_[i] >= least && weights_[i] > 0) {
      candidates_.push_back({weights_[i], static_cast<int32_t>(i)});
    }
  }
  if (params.top_p < 1) KeepNucleus(params.top_p * total);
  double kept = 0;
  for (const Candidate& c : candidates_) kept += c.value;
  double rest = uniform * kept;
  for (const Candidate& c : candidates_) {
    rest -= c.value;
    if (rest < 0) return c.token;
  }
  return candidates_.empty() ? ArgMax(logits).token : candidates_.back().token;
}

void Sampler::ReportLogprobs(std::span<const float> logits, float max, const SamplingParams& params,
                             SampledToken* sampled, std::vector<TokenLogprob>* top) {
  const double log_sum = LogSumExp(logits, max);
  const auto logprob = [&](float logit) { return static_cast<float>(double{logit} - max - log_sum); };
  sampled->logprob = logprob(logits[static_cast<size_t>(sampled->token)]);
  if (params.logprobs == 0) return;
  SelectTop(logits, static_cast<size_t>(params.logprobs));
  std::sort(candidates_.begin(), candidates_.end(), Ahead);
  for (const Candidate& c : candidates_) top->push_back({c.token, logprob(c.value)});
}

SampledToken Sampler::Sample(const SamplingParams& params, const TokenHistory& history, uint64_t seed,
                             uint64_t draw, std::span<const float> logits, std::vector<TokenLogprob>* top) {
  if (top != nullptr) top->clear();
  Best best = ArgMax(logits);
  if (best.token < 0) return {};
  std::span<const float> raw = logits;
  std::vector<float> finite;  // only for a model that produced infinity
  if (best.value > kHuge) {
    finite.assign(logits.begin(), logits.end());
    for (float& x : finite) x = x > kHuge ? kHuge : x;
    raw = finite;
    best = ArgMax(raw);
  }
  const float raw_max = best.value;
  std::span<const float> used = raw;
  if (history.active()) {
    logits_.assign(raw.begin(), raw.end());
    history.Penalize(params, logits_);
    used = logits_;
    best = ArgMax(used);
    if (best.token < 0) return {};
  }

  SampledToken sampled;
  if (params.temperature < kGreedyBelow) {
    sampled.token = best.token;
  } else {
    const double uniform = UniformDraw(seed, draw);
    const bool few = params.top_k > 0 && static_cast<size_t>(params.top_k) < used.size();
    sampled.token = few ? DrawFromTop(params, used, uniform) : DrawFromAll(params, used, best.value, uniform);
  }
  if (params.logprobs >= 0 && top != nullptr) ReportLogprobs(raw, raw_max, params, &sampled, top);
  return sampled;
}

}  // namespace triaxial
