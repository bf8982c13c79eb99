// The vision tower on the GPU: the same function as model/vision_tower.h with BF16 products.
#ifndef TRIAXIAL_MODEL_CUDA_VISION_TOWER_H_
#define TRIAXIAL_MODEL_CUDA_VISION_TOWER_H_

#include <memory>
#include <string>
#include <vector>

#include "base/status.h"
#include "io/image_processor.h"
#include "io/model_config.h"
#include "model/batch.h"
#include "model/cuda/weights.h"
#include "model/vision_grid.h"
#include "ops/cuda/linear.h"
#include "ops/cuda/vision.h"

namespace triaxial::cuda {

// Not thread-safe: keeps its workspace between calls. Throws CudaError.
class VisionTower {
 public:
  // Errors as TensorSource::Get. All pointers must outlive it.
  static Result<std::unique_ptr<VisionTower>> Load(const VisionConfig& config, DeviceWeights* weights,
                                                   LinearRunner* linears, cudaStream_t stream);
  // Features in device memory, complete for what follows on the stream.
  VisualFeatures Encode(const ImagePatches& patches, const PreprocessorConfig& preprocessor);

 private:
  struct Norm {
    const float* weight = nullptr;
    const float* bias = nullptr;
    int64_t width = 0;
  };
  struct Block {
    Norm norm1, norm2;
    LinearWeights qkv, proj, fc1, fc2;
  };
  struct Merger {
    Norm norm;
    LinearWeights fc1, fc2;
  };

  VisionTower(const VisionConfig& config, LinearRunner* linears, cudaStream_t stream)
      : config_(config), linears_(linears), stream_(stream) {}
  static Result<Norm> LoadNorm(DeviceWeights* weights, const std::string& name, int64_t width);
  Result<Merger> LoadMerger(DeviceWeights* weights, const std::string& name, int64_t norm_width) const;
  void RunBlock(const Block& block, int64_t rows);
  void RunMerger(const Merger& merger, int64_t rows, float* out);

  VisionConfig config_;
  LinearRunner* linears_;
  cudaStream_t stream_;
  LinearWeights patch_embed_;
  const float* position_embeddings_ = nullptr;  // [side * side][hidden]
  std::vector<Block> blocks_;
  Merger merger_;
  std::vector<Merger> deepstack_;

  DeviceBuffer samples_, values_, places_, cos_, sin_, pixels_, x_, normed_, qkv_, attended_, inner_;
};

}  // namespace triaxial::cuda

#endif  // TRIAXIAL_MODEL_CUDA_VISION_TOWER_H_
