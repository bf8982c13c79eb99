// From an allocated step to logits: images, batch, model.
#ifndef TRIAXIAL_ENGINE_EXECUTOR_H_
#define TRIAXIAL_ENGINE_EXECUTOR_H_

#include <functional>
#include <optional>
#include <span>
#include <vector>

#include "engine/request_state.h"
#include "io/model_config.h"
#include "kv/arena.h"
#include "model/model.h"

namespace triaxial {

// Throws what the model throws (std::bad_alloc above all).
class Executor {
 public:
  // `model` and `memory` must outlive it.
  Executor(Model* model, KvMemory* memory, const PreprocessorConfig& preprocessor)
      : model_(model), memory_(memory), preprocessor_(preprocessor) {}

  // Runs the vision tower on the images that tokens [begin, begin + count) of a prompt reach. Each image is
  // encoded once, when the prefill reaches it (again after a preemption), and its features go when it has
  // passed, so that a prompt with many pictures holds those of one chunk.
  void EncodeImages(RequestState* request, int32_t begin, int32_t count);

  // Runs the model on a step; `meanwhile` as in Model::ForwardAndSample, and never where the model does not
  // sample, because it computes on the caller's thread.
  void Run(const Step& step, const std::function<void()>& meanwhile);

  // Next-token logits of a step's item, for items that end at their sequence's last token; else empty.
  std::span<float> Logits(size_t item);
  // The next token of such an item if the model has chosen it (-1: no finite logits). It chooses for requests
  // that ask for nothing that takes logits on the host: no penalties, no log-probabilities.
  std::optional<int32_t> Sampled(size_t item) const;

 private:
  static void DropPassedImages(RequestState* request);
  void AddVisualRows(const RequestState& request, const Step::Item& item);

  Model* model_;
  KvMemory* memory_;
  PreprocessorConfig preprocessor_;
  Batch batch_;
  std::vector<float> logits_;       // [batch_.logits_rows.size()][vocab]
  std::vector<int32_t> logits_of_;  // [items] row of logits_, or -1
  std::vector<TokenDraw> draws_;    // [rows of logits_] if the model samples, likewise sampled_
  std::vector<int32_t> sampled_;
};

}  // namespace triaxial

#endif  // TRIAXIAL_ENGINE_EXECUTOR_H_
