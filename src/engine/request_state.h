// A request inside the engine: made by Submit in the client's thread, then owned by the engine thread.
#ifndef TRIAXIAL_ENGINE_REQUEST_STATE_H_
#define TRIAXIAL_ENGINE_REQUEST_STATE_H_

#include <array>
#include <chrono>
#include <cstdint>
#include <memory>
#include <vector>

#include "engine/request.h"
#include "engine/sampler.h"
#include "engine/scheduler.h"
#include "model/batch.h"
#include "text/token_tagger.h"

namespace triaxial {

using Clock = std::chrono::steady_clock;

struct RequestState : Sequence {
  explicit RequestState(const MarkupIds& markup, bool starts_in_thought)
      : tagger(markup, starts_in_thought) {}

  Request request;              // its prompt keeps the images only
  std::vector<int32_t> tokens;  // prompt, then output; as many as kv_tokens
  int32_t prompt_tokens = 0;
  int32_t max_length = 0;                                 // of prompt and output together
  std::vector<int32_t> stop_ids;                          // sorted
  MropePositions positions;                               // of the prompt
  std::vector<std::unique_ptr<VisualFeatures>> features;  // [images], kept while the prefill is inside one
  uint64_t seed = 0;
  TokenHistory history;
  GenerationTagger tagger;
  bool started = false;    // has been admitted
  bool finished = false;   // its last event is among those to be sent; removed when it was
  bool deaf = false;       // its receiver failed; to be cancelled between steps
  int64_t first_step = 0;  // of the cache, when it was admitted
  Clock::time_point submitted;
  Clock::time_point deadline = Clock::time_point::max();
  Clock::time_point admitted;
  Clock::time_point first_token;

  int32_t output_tokens() const { return static_cast<int32_t>(tokens.size()) - prompt_tokens; }
  std::array<int32_t, 3> Position(int32_t token) const {
    if (token < static_cast<int32_t>(positions.positions.size())) {
      return positions.positions[static_cast<size_t>(token)];
    }
    const int32_t p = token + positions.delta;
    return {p, p, p};
  }
};

}  // namespace triaxial

#endif  // TRIAXIAL_ENGINE_REQUEST_STATE_H_
