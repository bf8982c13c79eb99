#include "model/vision_tower.h"

#include <algorithm>
#include <cmath>

#include "base/check.h"
#include "base/float16.h"
#include "base/parallel.h"
#include "ops/elementwise.h"

namespace triaxial {
namespace {

constexpr float kLayerNormEps = 1e-6f;
// Rows that go through the row-wise part of a block together: enough for full speed, and the workspace of a
// large image stays small.
constexpr int64_t kChunkRows = 512;

}  // namespace

Result<VisionTower::Norm> VisionTower::LoadNorm(const TensorSource& source, const std::string& name,
                                                int64_t width) {
  Norm norm;
  ASSIGN_OR_RETURN(norm.weight, source.GetF32(name + ".weight", {width}, Fill::kOne));
  ASSIGN_OR_RETURN(norm.bias, source.GetF32(name + ".bias", {width}, Fill::kZero));
  small_parameters_ += 2 * width;
  return norm;
}

Result<VisionTower::Merger> VisionTower::LoadMerger(const TensorSource& source, LinearLoader* loader,
                                                    const std::string& name, int64_t norm_width) {
  const int64_t merged =
      int64_t{config_.hidden_size} * config_.spatial_merge_size * config_.spatial_merge_size;
  Merger merger;
  ASSIGN_OR_RETURN(merger.norm, LoadNorm(source, name + ".norm", norm_width));
  ASSIGN_OR_RETURN(merger.fc1, loader->Load({{name + ".linear_fc1", merged}}, {merged}, element_,
                                            Epilogue::kGeluErf, true));
  ASSIGN_OR_RETURN(merger.fc2, loader->Load({{name + ".linear_fc2", config_.out_hidden_size}}, {merged},
                                            Element::kF32, Epilogue::kNone, true));
  return merger;
}

Result<std::unique_ptr<VisionTower>> VisionTower::Load(const VisionConfig& config, Element element,
                                                       const TensorSource& source, LinearLoader* loader) {
  const std::string prefix = "model.visual.";
  const int64_t hidden = config.hidden_size;
  const int64_t inner = config.intermediate_size;
  const int64_t merged = hidden * config.spatial_merge_size * config.spatial_merge_size;
  std::unique_ptr<VisionTower> tower(new VisionTower(config, element));
  ASSIGN_OR_RETURN(tower->patch_embed_, loader->Load({{prefix + "patch_embed.proj", hidden}},
                                                     {config.in_channels, config.temporal_patch_size,
                                                      config.patch_size, config.patch_size},
                                                     Element::kF32, Epilogue::kAdd, true));
  ASSIGN_OR_RETURN(
      tower->position_embeddings_,
      source.GetF32(prefix + "pos_embed.weight", {config.num_position_embeddings, hidden}, Fill::kNormal));
  tower->small_parameters_ += config.num_position_embeddings * hidden;
  for (int i = 0; i < config.depth; ++i) {
    const std::string name = prefix + "blocks." + std::to_string(i) + ".";
    Block block;
    ASSIGN_OR_RETURN(block.norm1, tower->LoadNorm(source, name + "norm1", hidden));
    ASSIGN_OR_RETURN(block.norm2, tower->LoadNorm(source, name + "norm2", hidden));
    ASSIGN_OR_RETURN(block.qkv, loader->Load({{name + "attn.qkv", 3 * hidden}}, {hidden}, Element::kF32,
                                             Epilogue::kNone, true));
    ASSIGN_OR_RETURN(block.proj, loader->Load({{name + "attn.proj", hidden}}, {hidden}, Element::kF32,
                                              Epilogue::kAdd, true));
    ASSIGN_OR_RETURN(block.fc1, loader->Load({{name + "mlp.linear_fc1", inner}}, {hidden}, element,
                                             Epilogue::kGeluTanh, true));
    ASSIGN_OR_RETURN(block.fc2, loader->Load({{name + "mlp.linear_fc2", hidden}}, {inner}, Element::kF32,
                                             Epilogue::kAdd, true));
    tower->blocks_.push_back(std::move(block));
  }
  ASSIGN_OR_RETURN(tower->merger_, tower->LoadMerger(source, loader, prefix + "merger", hidden));
  for (size_t j = 0; j < config.deepstack_visual_indexes.size(); ++j) {
    ASSIGN_OR_RETURN(
        Merger merger,
        tower->LoadMerger(source, loader, prefix + "deepstack_merger_list." + std::to_string(j), merged));
    tower->deepstack_.push_back(std::move(merger));
  }
  return tower;
}

void VisionTower::EmbedPositions(const ImagePatches& patches, const std::vector<GridPlace>& places,
                                 float* x) const {
  const int64_t hidden = config_.hidden_size;
  const int side = static_cast<int>(std::lround(std::sqrt(config_.num_position_embeddings)));
  ParallelFor(static_cast<int64_t>(places.size()), [&](int64_t p) {
    const GridPlace& place = places[static_cast<size_t>(p)];
    const GridCorners corners = CornersOf(place, patches.grid_h, patches.grid_w, side);
    const float* corner[4];
    float factor[4];
    for (int c = 0; c < 4; ++c) {
      corner[c] = position_embeddings_.data() + corners.corner[c] * hidden;
      factor[c] = corners.factor[c];
      // The reference rounds the factors to the model's type.
      if (element_ == Element::kBf16) factor[c] = Bf16ToFloat(FloatToBf16(factor[c]));
    }
    for (int64_t i = 0; i < hidden; ++i) {
      x[p * hidden + i] = corner[0][i] * factor[0] + corner[1][i] * factor[1] + corner[2][i] * factor[2] +
                          corner[3][i] * factor[3];
    }
  });
}

void VisionTower::RunBlock(const Block& block, int64_t rows, const float* cos, const float* sin, float* x) {
  const int64_t hidden = config_.hidden_size;
  const int heads = config_.num_heads;
  const int dim = config_.hidden_size / heads;
  const int64_t chunk = std::min(rows, kChunkRows);
  const auto size = static_cast<size_t>(ByteSize(element_));
  uint8_t* normed = normed_.Reserve(static_cast<size_t>(chunk * hidden) * size);
  auto* qkv = qkv_.Reserve<float>(chunk * 3 * hidden);
  uint8_t* heads_of[3] = {q_.Reserve(static_cast<size_t>(rows * hidden) * size),
                          k_.Reserve(static_cast<size_t>(rows * hidden) * size),
                          v_.Reserve(static_cast<size_t>(rows * hidden) * size)};
  uint8_t* attended = attended_.Reserve(static_cast<size_t>(rows * hidden) * size);
  uint8_t* inner = inner_.Reserve(static_cast<size_t>(chunk * config_.intermediate_size) * size);

  for (int64_t row = 0; row < rows; row += chunk) {
    const int64_t count = std::min(chunk, rows - row);
    LayerNorm(x + row * hidden, block.norm1.weight.data(), block.norm1.bias.data(), kLayerNormEps, count,
              hidden, element_, normed);
    block.qkv.Run(normed, count, qkv);
    ParallelFor(count, [&](int64_t i) {
      float* of_row = qkv + i * 3 * hidden;
      const int64_t r = row + i;
      // Queries and keys, which follow each other.
      NormRotate(of_row, 2 * heads, dim, nullptr, 0, cos + r * dim / 2, sin + r * dim / 2, of_row);
      for (int side = 0; side < 3; ++side) {
        const float factor = side == 0 ? 1.0f / std::sqrt(static_cast<float>(dim)) : 1.0f;
        for (int h = 0; h < heads; ++h) {
          Convert(of_row + side * hidden + h * dim, factor, dim, element_,
                  heads_of[side] + static_cast<size_t>((h * rows + r) * dim) * size);
        }
      }
    });
  }
  attention_.Run(rows, heads, dim, element_, heads_of[0], heads_of[1], heads_of[2], attended);
  block.proj.Run(attended, rows, x);
  for (int64_t row = 0; row < rows; row += chunk) {
    const int64_t count = std::min(chunk, rows - row);
    LayerNorm(x + row * hidden, block.norm2.weight.data(), block.norm2.bias.data(), kLayerNormEps, count,
              hidden, element_, normed);
    block.fc1.Run(normed, count, inner);
    block.fc2.Run(inner, count, x + row * hidden);
  }
}

void VisionTower::RunMerger(const Merger& merger, int64_t rows, const float* x, float* out) {
  const int64_t hidden = config_.hidden_size;
  const int64_t group = int64_t{config_.spatial_merge_size} * config_.spatial_merge_size;
  const int64_t merged = hidden * group;
  const int64_t norm_width = static_cast<int64_t>(merger.norm.weight.size());
  const int64_t tokens = rows / group;
  const int64_t chunk = std::min(tokens, kChunkRows);
  const auto size = static_cast<size_t>(ByteSize(element_));
  uint8_t* normed = normed_.Reserve(static_cast<size_t>(chunk * merged) * size);
  uint8_t* inner = inner_.Reserve(static_cast<size_t>(chunk * merged) * size);
  for (int64_t token = 0; token < tokens; token += chunk) {
    const int64_t count = std::min(chunk, tokens - token);
    // The patches of a token follow each other, so concatenating them is a matter of view.
    LayerNorm(x + token * merged, merger.norm.weight.data(), merger.norm.bias.data(), kLayerNormEps,
              count * merged / norm_width, norm_width, element_, normed);
    merger.fc1.Run(normed, count, inner);
    merger.fc2.Run(inner, count, out + token * config_.out_hidden_size);
  }
}

VisualFeatures VisionTower::Encode(const ImagePatches& patches, const PreprocessorConfig& preprocessor) {
  const int merge = config_.spatial_merge_size;
  const int64_t rows = int64_t{patches.grid_h} * patches.grid_w;
  const int64_t hidden = config_.hidden_size;
  const int64_t half = config_.hidden_size / config_.num_heads / 2;
  CHECK(rows > 0 && patches.grid_h % merge == 0 && patches.grid_w % merge == 0);

  const std::vector<GridPlace> places = PlacesOfPatches(patches.grid_h, patches.grid_w, merge);
  auto* cos = cos_.Reserve<float>(rows * half);
  auto* sin = sin_.Reserve<float>(rows * half);
  ParallelFor(rows, [&](int64_t r) {
    const GridPlace& place = places[static_cast<size_t>(r)];
    rope_.Angles(place.row, place.column, cos + r * half, sin + r * half);
  });

  auto* x = x_.Reserve<float>(rows * hidden);
  EmbedPositions(patches, places, x);
  const int64_t width = patch_embed_.shape().in;
  const int64_t chunk = std::min(rows, kChunkRows);
  auto* pixels_f32 = pixels_f32_.Reserve<float>(chunk * width);
  uint8_t* pixels = pixels_.Reserve(static_cast<size_t>(chunk * width * ByteSize(element_)));
  for (int64_t row = 0; row < rows; row += chunk) {
    const int64_t count = std::min(chunk, rows - row);
    NormalizePatches(patches, preprocessor, static_cast<int>(row), static_cast<int>(count), pixels_f32);
    Convert(pixels_f32, 1.0f, count * width, element_, pixels);
    patch_embed_.Run(pixels, count, x + row * hidden);
  }

  VisualFeatures features;
  features.tokens = static_cast<int32_t>(rows / (merge * merge));
  const size_t out_size = static_cast<size_t>(features.tokens) * static_cast<size_t>(config_.out_hidden_size);
  size_t tapped = 0;
  for (size_t i = 0; i < blocks_.size(); ++i) {
    RunBlock(blocks_[i], rows, cos, sin, x);
    if (tapped < deepstack_.size() && config_.deepstack_visual_indexes[tapped] == static_cast<int>(i)) {
      features.deepstack.emplace_back(out_size);
      RunMerger(deepstack_[tapped++], rows, x, features.deepstack.back().data());
    }
  }
  features.embeddings.resize(out_size);
  RunMerger(merger_, rows, x, features.embeddings.data());
  return features;
}

}  // namespace triaxial
