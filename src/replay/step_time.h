// How long a step takes on a device, from what it reads and multiplies.
//
//   weights   = max(weight bytes / (bandwidth * share), 2 * weights * rows / (flops * share))
//   attention = max(sum over formats of KV bytes / (bandwidth * share of the format),
//                   4 * heads * head_dim * layers * sum over rows of their context / (flops * share))
//   step      = weights + attention + moved bytes / (bandwidth * share) + step_seconds
//
// A step without rows only moves blocks. Products and attention follow each other in every layer, so each has
// its own maximum. Weights are read once a step; a row whose next token is wanted adds lm_head, a picture's
// patches the products of the vision tower (its attention is left out). KV bytes are those that a row's
// sequence has stored: once per step and sequence.
#ifndef TRIAXIAL_REPLAY_STEP_TIME_H_
#define TRIAXIAL_REPLAY_STEP_TIME_H_

#include <array>
#include <cstdint>

#include "io/model_config.h"
#include "kv/format.h"
#include "replay/device.h"

namespace triaxial {

// Parameters of a model by where they are used, and what attention takes.
struct ModelCost {
  int64_t layer_weights = 0;     // of all decoder layers
  int64_t head_weights = 0;      // lm_head
  int64_t vision_weights = 0;    // that multiply patches
  int64_t total_weights = 0;     // held in memory, embeddings included
  double attention_flops = 0;    // per row and token of its context, all layers
  int64_t kv_bytes_per_row = 0;  // written per row, BF16
  int patches_per_token = 0;     // of a picture; 0: no vision

  int64_t weight_bytes() const { return 2 * total_weights; }
};
ModelCost CostOf(const ModelConfig& config);

// What a step does.
struct StepWork {
  int64_t rows = 0;
  int64_t logits_rows = 0;
  int64_t picture_tokens = 0;
  double contexts = 0;                       // sum over rows of the tokens that each attends to
  std::array<int64_t, kFormats> kv_bytes{};  // stored, that attention reads
  int64_t moved_bytes = 0;                   // read and written by conversions and compactions
};

double StepSeconds(const ModelCost& model, const DeviceSpec& device, const StepWork& work);

}  // namespace triaxial

#endif  // TRIAXIAL_REPLAY_STEP_TIME_H_
