// The decoder on the GPU: the same function as model/decoder.h with BF16 products. Steps in which every
// sequence has one row run as CUDA graphs, two for each number of rows (rounded up to a few sizes): the first
// layers, then the others, because launching them all takes the host longer than the device takes for the
// first. All other steps run kernel by kernel.
#ifndef TRIAXIAL_MODEL_CUDA_DECODER_H_
#define TRIAXIAL_MODEL_CUDA_DECODER_H_

#include <array>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <vector>

#include "base/status.h"
#include "io/model_config.h"
#include "kv/calibration.h"
#include "model/batch.h"
#include "model/cuda/weights.h"
#include "ops/cuda/attention.h"
#include "ops/cuda/kv_memory.h"
#include "ops/cuda/kv_store.h"
#include "ops/cuda/linear.h"
#include "ops/token_draw.h"

namespace triaxial::cuda {

// Not thread-safe: keeps its workspace between calls. Throws CudaError.
class Decoder {
 public:
  // With `fp8`, the layers' products are in FP8 (not the one for logits). Errors as TensorSource::Get and
  // DeviceWeights::ToFp8. All pointers must outlive it.
  static Result<std::unique_ptr<Decoder>> Load(const ModelConfig& config, Codec codec,
                                               const KvCalibration& calibration, bool fp8,
                                               DeviceWeights* weights, LinearRunner* linears,
                                               cudaStream_t stream);
  ~Decoder();

  // See Model::Forward and Model::ForwardAndSample: tokens[i] and, where a draw asks for them, logits
  // [i][vocab_size] of batch.logits_rows[i]. Without draws all logits come to the host. Calls `meanwhile`
  // when all is enqueued, and returns when all is there.
  void Forward(const Batch& batch, const CudaKvMemory& memory, std::span<const TokenDraw> draws,
               int32_t* tokens, float* logits, const std::function<void()>& meanwhile);

  const KvGeometry& geometry() const { return geometry_; }
  int64_t weight_bytes() const;  // read by one decode step

 private:
  struct Layer {
    const float* input_norm = nullptr;
    const float* post_attention_norm = nullptr;
    const float* q_norm = nullptr;
    const float* k_norm = nullptr;
    LinearWeights qkv, o, gate_up, down;
  };
  // What a step needs to know, on the device.
  struct Inputs {
    int32_t* tokens = nullptr;
    int32_t* positions = nullptr;
    RowPlace* places = nullptr;
    KvStore* stores = nullptr;
    int32_t* groups = nullptr;
    KvConvert* converts = nullptr;
    int32_t* convert_count = nullptr;
    int32_t* logits_rows = nullptr;
    TokenDraw* draws = nullptr;
  };
  // How many of each; a graph's inputs have room for what a step of its rows may need.
  struct Sizes {
    int64_t rows = 0;
    int64_t stores = 0;
    int64_t groups = 0;
    int64_t converts = 0;
    int64_t logits = 0;
  };

  Decoder(const TextConfig& config, Codec codec, const ClipRatios& clip, LinearRunner* linears,
          cudaStream_t stream);
  // Whether every sequence has one row, and nothing else is asked that a graph cannot do.
  static bool IsDecode(const Batch& batch);
  // Both enqueue everything; sampled tokens go to download_, by row and by logits row.
  void Decode(const Batch& batch, const CudaKvMemory& memory, std::span<const TokenDraw> draws,
              float* logits);
  void Prefill(const Batch& batch, const CudaKvMemory& memory, std::span<const TokenDraw> draws,
               float* logits);
  // Lays out the inputs in pinned memory and says where they will be on the device.
  Inputs LayOut(const Sizes& sizes, bool on_device);
  void Upload();
  void Reserve(int64_t rows, int64_t logits_rows);
  void PlanAttention(const Batch& batch);
  void Tune(int64_t rows);
  // Layers [begin, end), from hidden_ to hidden_.
  void RunLayers(size_t begin, size_t end, const CudaKvMemory& memory, const Inputs& in, int64_t rows,
                 const Batch* prefill);
  void DropGraphs();
  using Graphs = std::array<cudaGraphExec_t, 2>;  // in the order of their launch; null: not there (yet)
  void EnqueueDecode(size_t part, const CudaKvMemory& memory, const Inputs& in, int64_t rows);
  const Graphs& GraphsOf(int64_t rows, const CudaKvMemory& memory);

  TextConfig config_;
  KvGeometry geometry_;
  ClipRatios clip_;
  LinearRunner* linears_;
  cudaStream_t stream_;
  const uint16_t* embedding_ = nullptr;
  const float* frequencies_ = nullptr;
  const uint8_t* axes_ = nullptr;
  std::vector<Layer> layers_;
  const float* final_norm_ = nullptr;
  LinearWeights lm_head_;

  std::unique_ptr<Attention> attention_;
  AttentionLimits limits_;
  PinnedBuffer upload_, download_;
  DeviceBuffer inputs_;
  size_t input_bytes_ = 0;
  int64_t reserved_rows_ = 0;
  int64_t reserved_logits_ = 0;
  DeviceBuffer hidden_, cos_, sin_, normed_, qkv_, heads_, attended_, gate_up_, inner_, logits_, sampled_;
  StoreList stores_;                  // keeps its memory between steps
  std::map<int64_t, Graphs> graphs_;  // by rows
  std::map<int64_t, int> seen_;       // steps by rows, until products have been timed for them
  CacheRegion graph_region_;          // the cache that they work on
};

}  // namespace triaxial::cuda

#endif  // TRIAXIAL_MODEL_CUDA_DECODER_H_
