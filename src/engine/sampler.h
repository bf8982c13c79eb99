// The choice of the next token from a row of logits.
//
// Order of the rules, all over the logits of one row: repetition penalty, presence and frequency penalties,
// temperature, top-k, top-p over what top-k left, min-p relative to the most probable token. Ties go to the
// smaller token id. NaN counts as minus infinity; infinite logits win and are as good as each other.
#ifndef TRIAXIAL_ENGINE_SAMPLER_H_
#define TRIAXIAL_ENGINE_SAMPLER_H_

#include <cstdint>
#include <span>
#include <vector>

#include "engine/request.h"

namespace triaxial {

// What penalties need to know of a request's tokens. Empty, and free, for requests without penalties.
class TokenHistory {
 public:
  TokenHistory() = default;
  TokenHistory(const SamplingParams& params, std::span<const int32_t> prompt);
  bool active() const { return active_; }
  // Counts a generated token.
  void Add(int32_t token);
  // Repetition: Hugging Face's rule over prompt and output (positive logits divided, negative ones
  // multiplied). Presence and frequency: OpenAI's, over the output alone.
  void Penalize(const SamplingParams& params, std::span<float> logits) const;

 private:
  struct Entry {
    int32_t token;
    int32_t generated;  // times that it occurs in the output
  };
  bool active_ = false;
  std::vector<Entry> entries_;  // sorted by token
};

struct SampledToken {
  int32_t token = -1;  // -1: no logit was above minus infinity
  float logprob = 0;   // of the raw logits' log-softmax; only computed if asked for
};

// Stateless but for scratch memory: one serves all requests.
class Sampler {
 public:
  // The same (seed, draw) and logits give the same token, whatever else runs; `draw` counts the tokens of a
  // request. `top` (cleared) receives the params.logprobs most probable tokens, best first; the logprobs are
  // those before penalties and temperature.
  SampledToken Sample(const SamplingParams& params, const TokenHistory& history, uint64_t seed, uint64_t draw,
                      std::span<const float> logits, std::vector<TokenLogprob>* top);

 private:
  struct Candidate {
    float value;  // logit, later its weight exp((logit - max) / temperature)
    int32_t token;
  };
  static bool Ahead(const Candidate& a, const Candidate& b) {
    return a.value > b.value || (a.value == b.value && a.token < b.token);
  }
  void SelectTop(std::span<const float> logits, size_t k);
  void ReportLogprobs(std::span<const float> logits, float max, const SamplingParams& params,
                      SampledToken* sampled, std::vector<TokenLogprob>* top);
  int32_t DrawFromTop(const SamplingParams& params, std::span<const float> logits, double uniform);
  int32_t DrawFromAll(const SamplingParams& params, std::span<const float> logits, float max, double uniform);
  void KeepNucleus(double mass);

  std::vector<float> logits_;          // a changed copy: penalties, infinities
  std::vector<float> weights_;         // [vocab]
  std::vector<double> block_sums_;     // of weights_
  std::vector<Candidate> candidates_;  // what is left
};

// A number in [0, 1) from a request's seed and the index of the draw (SplitMix64 in counter mode).
double UniformDraw(uint64_t seed, uint64_t draw);

}  // namespace triaxial

#endif  // TRIAXIAL_ENGINE_SAMPLER_H_
