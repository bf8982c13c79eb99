#include "replay/step_time.h"

#include <algorithm>

namespace triaxial {
namespace {

int64_t VisionWeights(const VisionConfig& v) {
  const int64_t hidden = v.hidden_size;
  const int64_t layer = 4 * hidden * hidden + 2 * hidden * v.intermediate_size;
  const int64_t patch = int64_t{v.in_channels} * v.temporal_patch_size * v.patch_size * v.patch_size * hidden;
  return v.depth * layer + patch;
}

// The merger and its likes for deepstack multiply merged patches: merge^2 of them make one row.
int64_t MergerWeights(const VisionConfig& v) {
  const int64_t merged = int64_t{v.hidden_size} * v.spatial_merge_size * v.spatial_merge_size;
  const auto mergers = static_cast<int64_t>(1 + v.deepstack_visual_indexes.size());
  return mergers * (merged * merged + merged * v.out_hidden_size);
}

}  // namespace

ModelCost CostOf(const ModelConfig& config) {
  const TextConfig& t = config.text;
  const int64_t hidden = t.hidden_size;
  const int64_t queries = int64_t{t.num_heads} * t.head_dim;
  const int64_t keys = int64_t{t.num_kv_heads} * t.head_dim;
  ModelCost cost;
  cost.layer_weights =
      t.num_layers * (2 * hidden * queries + 2 * hidden * keys + 3 * hidden * t.intermediate_size);
  cost.head_weights = int64_t{t.vocab_size} * hidden;
  cost.total_weights = cost.layer_weights + cost.head_weights * (t.tie_word_embeddings ? 1 : 2);
  cost.attention_flops = 4.0 * static_cast<double>(queries) * t.num_layers;
  cost.kv_bytes_per_row = Bf16KvBytesPerToken(t);
  if (config.vision) {
    const int merge = config.vision->spatial_merge_size;
    cost.patches_per_token = merge * merge;
    cost.vision_weights =
        VisionWeights(*config.vision) + MergerWeights(*config.vision) / cost.patches_per_token;
    cost.total_weights += VisionWeights(*config.vision) + MergerWeights(*config.vision);
  }
  return cost;
}

double StepSeconds(const ModelCost& model, const DeviceSpec& device, const StepWork& work) {
  const double bandwidth = device.bandwidth * device.bandwidth_share;
  const double flops = device.flops * device.flops_share;

  const double moved = static_cast<double>(work.moved_bytes) / bandwidth + device.step_seconds;
  if (work.rows == 0) return moved;

  double weights = static_cast<double>(model.layer_weights);
  double products = weights * static_cast<double>(work.rows);
  if (work.logits_rows > 0) {
    weights += static_cast<double>(model.head_weights);
    products += static_cast<double>(model.head_weights) * static_cast<double>(work.logits_rows);
  }
  if (work.picture_tokens > 0) {
    weights += static_cast<double>(model.vision_weights);
    products += static_cast<double>(model.vision_weights) *
                static_cast<double>(work.picture_tokens * model.patches_per_token);
  }

  double reads =
      static_cast<double>(work.rows * model.kv_bytes_per_row) / bandwidth;  // the rows' own, written
  for (int f = 0; f < kFormats; ++f) {
    reads += static_cast<double>(work.kv_bytes[static_cast<size_t>(f)]) /
             (device.bandwidth * device.KvShare(static_cast<Format>(f)));
  }
  return std::max(2 * weights / bandwidth, 2 * products / flops) +
         std::max(reads, model.attention_flops * work.contexts / flops) + moved;
}

}  // namespace triaxial
