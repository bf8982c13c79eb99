// From a client's request to one that the engine can run: everything that needs no engine thread.
#ifndef TRIAXIAL_ENGINE_PREPARE_H_
#define TRIAXIAL_ENGINE_PREPARE_H_

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "base/status.h"
#include "engine/request_state.h"
#include "io/model_config.h"
#include "kv/calibration.h"
#include "kv/need.h"
#include "kv/policy.h"

namespace triaxial {

// What all requests share; constant once the engine runs.
struct EngineContext {
  ModelConfig config;
  KvGeometry geometry;
  PreprocessorConfig preprocessor;
  GenerationConfig generation;
  MarkupIds markup;
  Policy policy;
  TagNeeds needs;
  int32_t max_model_len = 0;
  int64_t total_rows = 0;  // of the arena
};

// The policy for a cache, except that 2-bit keys of the rotated codec need equalization factors: without them
// k2v2 becomes k4v2, and a warning says so. `budget_bits` as in ResolveNeeds.
TagNeeds NeedsOf(const Policy& policy, const KvGeometry& geometry, const KvCalibration& calibration,
                 bool dummy_weights, double budget_bits);

// Where the tokens of a prompt are for MRoPE, those of its pictures by their grids.
MropePositions PositionsOf(const Prompt& prompt, const PreprocessorConfig& preprocessor);

// Tags the prompt, computes its positions and what it will take of the arena. InvalidArgument names what is
// wrong with the prompt or the sampling; TooLarge if the arena is too small for it.
Result<std::unique_ptr<RequestState>> PrepareRequest(Request request, const EngineContext& context);

}  // namespace triaxial

#endif  // TRIAXIAL_ENGINE_PREPARE_H_
