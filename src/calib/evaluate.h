// `triaxial eval`: recorded conversations under several KV policies, scored against a BF16 cache.
#ifndef TRIAXIAL_CALIB_EVALUATE_H_
#define TRIAXIAL_CALIB_EVALUATE_H_

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "base/status.h"
#include "calib/eval_policy.h"
#include "calib/fidelity.h"
#include "calib/output_error.h"
#include "calib/recorded_steps.h"
#include "calib/replay.h"
#include "kv/policy.h"
#include "model/model.h"
#include "serve/served_model.h"

namespace triaxial {

struct EvalOptions {
  ModelOptions model;  // its codec is not read
  ReplayOptions replay;
  int64_t kv_memory =
      0;              // bytes of the caches of policies that run side by side; 0: a quarter of the machine's
  uint64_t seed = 1;  // of the bootstrap
  // Called before each conversation.
  std::function<void(size_t conversation, size_t conversations)> progress;
};

struct PolicyScores {
  EvalPolicy policy;
  KvGeometry geometry;
  std::vector<StepScore> steps;
  std::vector<std::vector<Format>> blocks;  // [steps] of the conversation's cache when the answer ends
  Fidelity fidelity;
  OutputErrors outputs;  // without layers on a GPU, where nobody sees them
};

struct Evaluation {
  std::vector<std::string> conversations;  // ids
  std::vector<PolicyScores> policies;      // those asked for, `bf16` in front if it was not among them
  std::vector<int> layers;                 // of PolicyScores::outputs
};

// Loads the model once for each codec. All policies see the same prompts and the same recorded tokens; the
// divergences are from `bf16` in the codec of the first policy.
Result<Evaluation> Evaluate(const ServedModel& model, const RecordedFile& recorded,
                            const std::vector<EvalPolicy>& policies, const EvalOptions& options);

}  // namespace triaxial

#endif  // TRIAXIAL_CALIB_EVALUATE_H_
