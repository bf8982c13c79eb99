#include "model/cuda/vision_tower.h"

#include <algorithm>
#include <cmath>

#include "base/check.h"
#include "base/float16.h"
#include "model/rope.h"
#include "ops/cuda/elementwise.h"

namespace triaxial::cuda {
namespace {

constexpr float kLayerNormEps = 1e-6f;

// Copies host values into a buffer of the device, in order with the stream.
template <typename T>
T* Put(const std::vector<T>& values, DeviceBuffer* buffer, cudaStream_t stream) {
  T* to = buffer->Reserve<T>(static_cast<int64_t>(values.size()));
  CUDA_OK(cudaMemcpyAsync(to, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice, stream));
  return to;
}

}  // namespace

Result<VisionTower::Norm> VisionTower::LoadNorm(DeviceWeights* weights, const std::string& name,
                                                int64_t width) {
  Norm norm;
  norm.width = width;
  ASSIGN_OR_RETURN(norm.weight, weights->LoadVector(name + ".weight", width, Fill::kOne));
  ASSIGN_OR_RETURN(norm.bias, weights->LoadVector(name + ".bias", width, Fill::kZero));
  return norm;
}

Result<VisionTower::Merger> VisionTower::LoadMerger(DeviceWeights* weights, const std::string& name,
                                                    int64_t norm_width) const {
  const int64_t merged =
      int64_t{config_.hidden_size} * config_.spatial_merge_size * config_.spatial_merge_size;
  Merger merger;
  ASSIGN_OR_RETURN(merger.norm, LoadNorm(weights, name + ".norm", norm_width));
  ASSIGN_OR_RETURN(merger.fc1, weights->Load({{name + ".linear_fc1", merged}}, {merged}, Element::kBf16,
                                             Epilogue::kNone, true));
  ASSIGN_OR_RETURN(merger.fc2, weights->Load({{name + ".linear_fc2", config_.out_hidden_size}}, {merged},
                                             Element::kF32, Epilogue::kNone, true));
  return merger;
}

Result<std::unique_ptr<VisionTower>> VisionTower::Load(const VisionConfig& config, DeviceWeights* weights,
                                                       LinearRunner* linears, cudaStream_t stream) {
  const std::string prefix = "model.visual.";
  const int64_t hidden = config.hidden_size;
  const int64_t inner = config.intermediate_size;
  const int64_t merged = hidden * config.spatial_merge_size * config.spatial_merge_size;
  std::unique_ptr<VisionTower> tower(new VisionTower(config, linears, stream));
  ASSIGN_OR_RETURN(tower->patch_embed_, weights->Load({{prefix + "patch_embed.proj", hidden}},
                                                      {config.in_channels, config.temporal_patch_size,
                                                       config.patch_size, config.patch_size},
                                                      Element::kF32, Epilogue::kAdd, true));
  ASSIGN_OR_RETURN(tower->position_embeddings_,
                   weights->LoadTable(prefix + "pos_embed.weight", config.num_position_embeddings, hidden));
  for (int i = 0; i < config.depth; ++i) {
    const std::string name = prefix + "blocks." + std::to_string(i) + ".";
    Block block;
    ASSIGN_OR_RETURN(block.norm1, LoadNorm(weights, name + "norm1", hidden));
    ASSIGN_OR_RETURN(block.norm2, LoadNorm(weights, name + "norm2", hidden));
    ASSIGN_OR_RETURN(block.qkv, weights->Load({{name + "attn.qkv", 3 * hidden}}, {hidden}, Element::kBf16,
                                              Epilogue::kNone, true));
    ASSIGN_OR_RETURN(block.proj, weights->Load({{name + "attn.proj", hidden}}, {hidden}, Element::kF32,
                                               Epilogue::kAdd, true));
    ASSIGN_OR_RETURN(block.fc1, weights->Load({{name + "mlp.linear_fc1", inner}}, {hidden}, Element::kBf16,
                                              Epilogue::kGeluTanh, true));
    ASSIGN_OR_RETURN(block.fc2, weights->Load({{name + "mlp.linear_fc2", hidden}}, {inner}, Element::kF32,
                                              Epilogue::kAdd, true));
    tower->blocks_.push_back(block);
  }
  ASSIGN_OR_RETURN(tower->merger_, tower->LoadMerger(weights, prefix + "merger", hidden));
  for (size_t j = 0; j < config.deepstack_visual_indexes.size(); ++j) {
    ASSIGN_OR_RETURN(
        const Merger merger,
        tower->LoadMerger(weights, prefix + "deepstack_merger_list." + std::to_string(j), merged));
    tower->deepstack_.push_back(merger);
  }
  return tower;
}

void VisionTower::RunBlock(const Block& block, int64_t rows) {
  const int64_t hidden = config_.hidden_size;
  const int heads = config_.num_heads;
  const int dim = config_.hidden_size / heads;
  auto* x = x_.data<float>();
  auto* normed = normed_.data<uint16_t>();
  auto* qkv = qkv_.data<uint16_t>();
  LayerNorm(x, block.norm1.weight, block.norm1.bias, kLayerNormEps, rows, hidden, normed, stream_);
  linears_->Run(block.qkv, normed, rows, qkv, stream_);
  RotateGrid(places_.data<PatchPlace>(), cos_.data<float>(), sin_.data<float>(), rows, heads, dim, qkv,
             stream_);
  FullAttention(qkv, rows, heads, dim, 1.0f / std::sqrt(static_cast<float>(dim)), attended_.data<uint16_t>(),
                stream_);
  linears_->Run(block.proj, attended_.data(), rows, x, stream_);
  LayerNorm(x, block.norm2.weight, block.norm2.bias, kLayerNormEps, rows, hidden, normed, stream_);
  linears_->Run(block.fc1, normed, rows, inner_.data(), stream_);
  linears_->Run(block.fc2, inner_.data(), rows, x, stream_);
}

void VisionTower::RunMerger(const Merger& merger, int64_t rows, float* out) {
  const int64_t group = int64_t{config_.spatial_merge_size} * config_.spatial_merge_size;
  const int64_t merged = config_.hidden_size * group;
  const int64_t tokens = rows / group;
  // The patches of a token follow each other, so concatenating them is a matter of view.
  LayerNorm(x_.data<float>(), merger.norm.weight, merger.norm.bias, kLayerNormEps,
            tokens * merged / merger.norm.width, merger.norm.width, normed_.data<uint16_t>(), stream_);
  linears_->Run(merger.fc1, normed_.data(), tokens, inner_.data(), stream_);
  GeluErf(inner_.data<uint16_t>(), tokens * merged, stream_);
  linears_->Run(merger.fc2, inner_.data(), tokens, out, stream_);
}

VisualFeatures VisionTower::Encode(const ImagePatches& patches, const PreprocessorConfig& preprocessor) {
  const int merge = config_.spatial_merge_size;
  const int64_t rows = int64_t{patches.grid_h} * patches.grid_w;
  const int64_t hidden = config_.hidden_size;
  const int dim = config_.hidden_size / config_.num_heads;
  CHECK(rows > 0 && patches.grid_h % merge == 0 && patches.grid_w % merge == 0);

  const int side = static_cast<int>(std::lround(std::sqrt(config_.num_position_embeddings)));
  std::vector<PatchPlace> places;
  places.reserve(static_cast<size_t>(rows));
  for (const GridPlace& place : PlacesOfPatches(patches.grid_h, patches.grid_w, merge)) {
    const GridCorners corners = CornersOf(place, patches.grid_h, patches.grid_w, side);
    PatchPlace& to = places.emplace_back();
    to.row = place.row;
    to.column = place.column;
    for (int c = 0; c < 4; ++c) {
      to.corner[c] = corners.corner[c];
      // The reference rounds the factors to the model's type.
      to.factor[c] = Bf16ToFloat(FloatToBf16(corners.factor[c]));
    }
  }
  const int positions = std::max(patches.grid_h, patches.grid_w);
  std::vector<float> cos(static_cast<size_t>(positions * dim / 4)), sin(cos.size());
  const GridRope rope(dim);
  for (int i = 0; i < positions; ++i) rope.AxisAngles(i, cos.data() + i * dim / 4, sin.data() + i * dim / 4);
  std::vector<float> values;
  for (size_t c = 0; c < 3; ++c) {
    for (int v = 0; v < 256; ++v) {
      values.push_back((static_cast<float>(v) / 255.0f - preprocessor.image_mean[c]) /
                       preprocessor.image_std[c]);
    }
  }
  Put(places, &places_, stream_);
  Put(cos, &cos_, stream_);
  Put(sin, &sin_, stream_);
  Put(values, &values_, stream_);
  Put(patches.samples, &samples_, stream_);

  const int plane = config_.patch_size * config_.patch_size;
  const int64_t merged = hidden * merge * merge;
  auto* x = x_.Reserve<float>(rows * hidden);
  pixels_.Reserve<uint16_t>(rows * patch_embed_.shape.in);
  normed_.Reserve<uint16_t>(rows * hidden);
  qkv_.Reserve<uint16_t>(rows * 3 * hidden);
  attended_.Reserve<uint16_t>(rows * hidden);
  inner_.Reserve<uint16_t>(std::max(rows * config_.intermediate_size, rows / (merge * merge) * merged));
  NormalizePixels(samples_.data(), values_.data<float>(), rows, config_.temporal_patch_size, plane,
                  pixels_.data<uint16_t>(), stream_);
  EmbedPatchPositions(places_.data<PatchPlace>(), position_embeddings_, rows, hidden, x, stream_);
  linears_->Run(patch_embed_, pixels_.data(), rows, x, stream_);

  VisualFeatures features;
  features.tokens = static_cast<int32_t>(rows / (merge * merge));
  features.device_deepstack = static_cast<int32_t>(deepstack_.size());
  const int64_t size = int64_t{features.tokens} * config_.out_hidden_size;
  void* memory = nullptr;
  CUDA_OK(
      cudaMallocAsync(&memory, static_cast<size_t>(size) * (1 + deepstack_.size()) * sizeof(float), stream_));
  auto* out = static_cast<float*>(memory);
  features.device = std::shared_ptr<const float>(
      out, [stream = stream_](const float* p) { cudaFreeAsync(const_cast<float*>(p), stream); });
  size_t tapped = 0;
  for (size_t i = 0; i < blocks_.size(); ++i) {
    RunBlock(blocks_[i], rows);
    if (tapped < deepstack_.size() && config_.deepstack_visual_indexes[tapped] == static_cast<int>(i)) {
      RunMerger(deepstack_[tapped], rows, out + size * static_cast<int64_t>(tapped + 1));
      ++tapped;
    }
  }
  RunMerger(merger_, rows, out);
  // What was copied from the vectors above has been copied when the stream has come here.
  CUDA_OK(cudaStreamSynchronize(stream_));
  return features;
}

}  // namespace triaxial::cuda
