// What a client asks of the engine, and what it hears back.
#ifndef TRIAXIAL_ENGINE_REQUEST_H_
#define TRIAXIAL_ENGINE_REQUEST_H_

#include <cstdint>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "base/status.h"
#include "kv/cache.h"
#include "text/prompt.h"

namespace triaxial {

using RequestId = int64_t;

struct SamplingParams {
  float temperature = 0;  // 0: greedy
  float top_p = 1;
  int top_k = 0;  // 0: off
  float min_p = 0;
  uint64_t seed = 0;
  bool has_seed = false;  // without one, the engine draws it
  float presence_penalty = 0;
  float frequency_penalty = 0;
  float repetition_penalty = 1;
  int max_tokens = 0;                   // 0: up to the model's length
  std::vector<int32_t> stop_token_ids;  // besides the model's own
  bool ignore_eos = false;
  int logprobs = -1;  // top alternatives per token to report; -1: none
};

// InvalidArgument naming the field, its value and the range it must lie in.
Status Validate(const SamplingParams& params);

struct TokenLogprob {
  int32_t token = 0;
  float logprob = 0;
};

enum class FinishReason { kNone, kStop, kLength, kCancelled, kError };

struct RequestStats {
  int32_t prompt_tokens = 0;
  int32_t cached_tokens = 0;
  int32_t completion_tokens = 0;
  KvUsage kv;             // the request's blocks when it finished
  int32_t demotions = 0;  // of its blocks, while it ran
  double effective_bits = 0;
  double queue_seconds = 0;
  double ttft_seconds = 0;
  double total_seconds = 0;
};

// A generated token, or the end. `token` is -1 where an event carries only an end (cancel, error, length 0).
struct TokenEvent {
  RequestId id = 0;
  int32_t token = -1;
  float logprob = 0;
  std::vector<TokenLogprob> top;  // as many as asked for, best first
  FinishReason finish = FinishReason::kNone;
  Status error;        // for kError
  RequestStats stats;  // when finish != kNone
};

struct Request {
  Prompt prompt;
  SamplingParams sampling;
  bool starts_in_thought = false;  // for the tags of generated tokens
  // Blocks are shared only among requests of one salt: the API key's (or ""), joined with `cache_salt`.
  std::string salt;
  std::string tenant;                 // the API key's identity, among which the scheduler is fair
  Format min_format = Format::kK2V2;  // cached blocks of fewer bits are prefilled again
  int priority = 0;                   // classes from -100 to 100, higher ones first
  double timeout_seconds = 0;         // from Submit to the last token, then DeadlineExceeded; 0: none
  // Called on the engine thread, mostly while the next step runs, for every event, the last of which has
  // finish != kNone. Must not block. If it
  // throws it has not taken the event: the request is cancelled; a last event is followed by one more, an
  // error.
  std::function<void(TokenEvent&&)> on_event;
};

}  // namespace triaxial

#endif  // TRIAXIAL_ENGINE_REQUEST_H_
