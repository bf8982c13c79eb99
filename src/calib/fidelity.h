// What a cache's precision costs: scores of recorded answers, position by position, and their summary.
#ifndef TRIAXIAL_CALIB_FIDELITY_H_
#define TRIAXIAL_CALIB_FIDELITY_H_

#include <cstdint>
#include <span>
#include <vector>

namespace triaxial {

// How one distribution of the next token compares with the recorded token and with that of a BF16 cache.
struct TokenScore {
  int32_t argmax = 0;   // the most likely token
  bool exact = false;   // it is the recorded one
  bool agrees = false;  // it is that of the BF16 cache
  float nll = 0;        // -ln probability of the recorded token
  float kl = 0;         // KL(BF16 || this), nats; never negative
};

// A row of reference logits, prepared for many comparisons.
struct ReferenceRow {
  std::vector<float> log_p;
  int32_t argmax = 0;
};
// Ties of the largest logit go to the smaller id, as in greedy sampling. NaN counts as minus infinity.
ReferenceRow MakeReference(std::span<const float> logits);
TokenScore ScoreToken(const ReferenceRow& reference, std::span<const float> logits, int32_t recorded);

// One recorded answer.
struct StepScore {
  int32_t conversation = 0;
  int32_t step = 0;
  bool exact = false;   // every token is the most likely one, the thought's too
  bool action = false;  // every token that the client sees: the call with all arguments, or the answer
  int32_t tokens = 0;
  int32_t agreeing = 0;
  double nll = 0;  // sums over tokens
  double kl = 0;
  float kl_max = 0;
  int32_t wrong = -1;    // the first token that is not the most likely one; -1: none
  int32_t said = -1;     // what the model says there instead
  int64_t kv_bytes = 0;  // that the conversation takes in the cache when the answer ends
  int64_t kv_tokens = 0;
};

struct Interval {
  double low = 0;
  double high = 0;
};

struct Fidelity {
  int64_t steps = 0;
  int64_t conversations = 0;
  int64_t tokens = 0;
  double all_exact = 0;  // steps all of whose tokens are exact, thoughts too
  Interval all_exact_ci;
  double action_match = 0;
  Interval action_match_ci;
  double episode_exact = 0;  // conversations all of whose actions match
  Interval episode_exact_ci;
  double episode_all_exact = 0;  // all of whose tokens are exact, thoughts too
  Interval episode_all_exact_ci;
  double top1_agreement = 0;
  double kl_mean = 0;
  double kl_p99 = 0;
  double kl_root_mean = 0;  // mean of the divergences' roots: not a few tokens' alone, as their mean is
  double perplexity = 0;
  double kv_bytes = 0;        // mean over steps
  double effective_bits = 0;  // bits per element over all steps, metadata and tails included
};

struct ConversationCount {
  int64_t hits = 0;
  int64_t total = 0;
};
// 95% interval of sum(hits) / sum(total) by resampling whole conversations (percentile bootstrap, 2000
// draws); the same for the same counts and seed. Steps of a conversation fail together, so they are no sample
// of their own.
Interval Bootstrap(std::span<const ConversationCount> counts, uint64_t seed);
// Likewise of the difference of two rates over the same conversations (b minus a), resampled together:
// narrower than two intervals apart, because hard conversations are hard for both.
Interval BootstrapDifference(std::span<const ConversationCount> a, std::span<const ConversationCount> b,
                             uint64_t seed);

enum class Measure { kAllTokens, kAction, kEpisode, kEpisodeAllTokens };
// Per conversation, in order of first appearance.
std::vector<ConversationCount> CountByConversation(std::span<const StepScore> steps, Measure measure);

// `kl` holds every token's divergence (for the percentile; reordered). `elements_per_token` counts K and V
// over all layers and heads.
Fidelity Summarize(std::span<const StepScore> steps, std::span<float> kl, int64_t elements_per_token,
                   uint64_t seed);

}  // namespace triaxial

#endif  // TRIAXIAL_CALIB_FIDELITY_H_
