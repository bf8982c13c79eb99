// The vision tower of Qwen3-VL: patches of one image in, merged tokens and DeepStack features out.
#ifndef TRIAXIAL_MODEL_VISION_TOWER_H_
#define TRIAXIAL_MODEL_VISION_TOWER_H_

#include <memory>
#include <string>
#include <vector>

#include "base/status.h"
#include "io/image_processor.h"
#include "io/model_config.h"
#include "model/batch.h"
#include "model/rope.h"
#include "model/vision_grid.h"
#include "model/weights.h"
#include "ops/buffer.h"
#include "ops/full_attention.h"
#include "ops/linear.h"

namespace triaxial {

// Not thread-safe: keeps its workspace between calls.
class VisionTower {
 public:
  // Errors as TensorSource::Get. Weights come through `loader`, whose cache must outlive the tower.
  static Result<std::unique_ptr<VisionTower>> Load(const VisionConfig& config, Element element,
                                                   const TensorSource& source, LinearLoader* loader);

  VisualFeatures Encode(const ImagePatches& patches, const PreprocessorConfig& preprocessor);
  // Of norms and position embeddings; those of products are counted by the loader.
  int64_t small_parameters() const { return small_parameters_; }

 private:
  struct Norm {
    std::vector<float> weight, bias;
  };
  struct Block {
    Norm norm1, norm2;
    Linear qkv, proj, fc1, fc2;
  };
  struct Merger {
    Norm norm;
    Linear fc1, fc2;
  };

  VisionTower(const VisionConfig& config, Element element)
      : config_(config), element_(element), rope_(config.hidden_size / config.num_heads) {}
  Result<Norm> LoadNorm(const TensorSource& source, const std::string& name, int64_t width);
  Result<Merger> LoadMerger(const TensorSource& source, LinearLoader* loader, const std::string& name,
                            int64_t norm_width);
  // Interpolated position embeddings of every patch into x [patches][hidden].
  void EmbedPositions(const ImagePatches& patches, const std::vector<GridPlace>& places, float* x) const;
  void RunBlock(const Block& block, int64_t rows, const float* cos, const float* sin, float* x);
  void RunMerger(const Merger& merger, int64_t rows, const float* x, float* out);

  VisionConfig config_;
  Element element_;
  GridRope rope_;
  Linear patch_embed_;
  std::vector<float> position_embeddings_;  // [side * side][hidden]
  std::vector<Block> blocks_;
  Merger merger_;
  std::vector<Merger> deepstack_;
  int64_t small_parameters_ = 0;

  FullAttention attention_;
  Buffer x_, cos_, sin_, pixels_f32_, pixels_, normed_, qkv_, q_, k_, v_, attended_, inner_;
};

}  // namespace triaxial

#endif  // TRIAXIAL_MODEL_VISION_TOWER_H_
