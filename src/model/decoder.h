// The decoder of Qwen3 and Qwen3-VL: token rows in, cache written, logits out.
#ifndef TRIAXIAL_MODEL_DECODER_H_
#define TRIAXIAL_MODEL_DECODER_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/status.h"
#include "io/model_config.h"
#include "kv/arena.h"
#include "kv/calibration.h"
#include "model/batch.h"
#include "model/model.h"
#include "model/rope.h"
#include "model/weights.h"
#include "ops/attention.h"
#include "ops/buffer.h"
#include "ops/linear.h"

namespace triaxial {

// Not thread-safe: keeps its workspace between calls.
class Decoder {
 public:
  // Errors as TensorSource::Get. `source` and the loader's cache must outlive the decoder: rows of the token
  // embedding are read from the source as they are needed, so that a tied table is in memory once, packed for
  // the product.
  static Result<std::unique_ptr<Decoder>> Load(const ModelConfig& config, Element element, Codec codec,
                                               const KvCalibration& calibration, const TensorSource& source,
                                               LinearLoader* loader);

  void set_observer(AttentionObserver observer) { observer_ = std::move(observer); }
  void set_output_observer(OutputObserver observer) { output_observer_ = std::move(observer); }
  // See Model::Forward.
  void Forward(const Batch& batch, KvArena* arena, float* logits);

  const KvGeometry& geometry() const { return geometry_; }
  // Of norms and an untied embedding; those of products are counted by the loader.
  int64_t small_parameters() const { return small_parameters_; }
  int64_t weight_bytes() const;  // read by one decode step

 private:
  struct Layer {
    std::vector<float> input_norm, post_attention_norm, q_norm, k_norm;
    Linear qkv, o, gate_up, down;
    std::vector<float> output_factors;  // that o's columns were multiplied by; empty: none
  };

  Decoder(const TextConfig& config, Element element, Codec codec, const ClipRatios& clip);
  void Embed(const Batch& batch, float* hidden) const;
  // Queries, keys and values of all heads from rows of the fused product, as the cache wants them.
  void SplitHeads(const Layer& layer, int64_t rows, const float* qkv, const float* cos, const float* sin,
                  float* q, float* k, float* v) const;
  // Attention output back to the model's basis and to the type of the next product.
  void JoinHeads(int64_t rows, float* attended, void* out) const;
  void ShowOutputs(int index, int64_t rows, const float* attended);

  TextConfig config_;
  Element element_;
  KvGeometry geometry_;
  ClipRatios clip_;
  Mrope rope_;
  Tensor embedding_;
  std::vector<Layer> layers_;
  std::vector<float> final_norm_;
  Linear lm_head_;
  int64_t small_parameters_ = 0;
  AttentionObserver observer_;
  OutputObserver output_observer_;

  Attention attention_;
  Buffer hidden_, cos_, sin_, normed_, qkv_, q_, k_, v_, attended_, joined_, gate_up_, inner_;
};

}  // namespace triaxial

#endif  // TRIAXIAL_MODEL_DECODER_H_
