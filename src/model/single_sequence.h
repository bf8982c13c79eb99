// Drives a model over one sequence through a cache of its own, without an engine: for golden tests,
// calibration and measurements.
#ifndef TRIAXIAL_MODEL_SINGLE_SEQUENCE_H_
#define TRIAXIAL_MODEL_SINGLE_SEQUENCE_H_

#include <array>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "base/status.h"
#include "kv/arena.h"
#include "kv/cache.h"
#include "model/batch.h"
#include "model/model.h"

namespace triaxial {

// Where an image's features replace token embeddings.
struct PlacedImage {
  int32_t begin = 0;  // first of features->tokens rows
  const VisualFeatures* features = nullptr;
};

class SingleSequence {
 public:
  // Room for max_tokens in BF16; every block takes `format`. The model must outlive it. Errors as
  // Model::AllocateKv.
  static Result<std::unique_ptr<SingleSequence>> Create(Model* model, Format format, int32_t max_tokens);

  // Appends tokens in steps of at most `chunk` rows. The images' begins count from the first of `tokens`.
  // Leaves [rows][vocab_size] logits of the last `logits_rows` tokens. ResourceExhausted if the cache is
  // full.
  Status Append(std::span<const int32_t> tokens, std::span<const std::array<int32_t, 3>> positions,
                std::span<const PlacedImage> images, int32_t chunk, int32_t logits_rows,
                std::vector<float>* logits);
  // Forgets all tokens.
  void Clear();
  KvUsage Usage() const { return cache_.Usage(); }
  int32_t length() const { return cache_.Length(id_); }

 private:
  SingleSequence(Model* model, Format format, std::unique_ptr<KvMemory> memory);

  Model* model_;
  std::unique_ptr<KvMemory> memory_;
  KvCache cache_;
  SequenceId id_;
  Batch batch_;
  KvAppend append_;
  std::vector<KvToken> tokens_;
};

}  // namespace triaxial

#endif  // TRIAXIAL_MODEL_SINGLE_SEQUENCE_H_
