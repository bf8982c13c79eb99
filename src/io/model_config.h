// What a Hugging Face checkpoint directory says about its model, read from its JSON files and validated:
// every number here is in a range that the rest of the program can rely on.
#ifndef TRIAXIAL_IO_MODEL_CONFIG_H_
#define TRIAXIAL_IO_MODEL_CONFIG_H_

#include <array>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "base/status.h"

namespace triaxial {

enum class Architecture { kQwen3Vl, kQwen3 };

struct TextConfig {
  int hidden_size = 0;
  int num_layers = 0;
  int num_heads = 0;     // query heads
  int num_kv_heads = 0;  // divides num_heads
  int head_dim = 0;      // 64 or 128
  int intermediate_size = 0;
  int vocab_size = 0;
  int max_position_embeddings = 0;
  float rms_norm_eps = 1e-6f;
  double rope_theta = 1e6;
  // Frequencies per axis (t, h, w) of interleaved MRoPE; {head_dim / 2, 0, 0} for text-only models, which is
  // plain RoPE.
  std::array<int, 3> mrope_section = {0, 0, 0};
  bool tie_word_embeddings = false;
};

struct VisionConfig {
  int depth = 0;
  int hidden_size = 0;
  int num_heads = 0;
  int intermediate_size = 0;
  int in_channels = 3;
  int patch_size = 16;
  int temporal_patch_size = 2;
  int spatial_merge_size = 2;
  int num_position_embeddings = 0;            // a square: side * side
  int out_hidden_size = 0;                    // equals TextConfig::hidden_size
  std::vector<int> deepstack_visual_indexes;  // increasing, each < depth
};

struct ModelConfig {
  Architecture architecture = Architecture::kQwen3;
  TextConfig text;
  std::optional<VisionConfig> vision;  // present for kQwen3Vl
  int image_token_id = -1;
  int vision_start_token_id = -1;
  int vision_end_token_id = -1;
};

// generation_config.json; values that are absent keep these defaults.
struct GenerationConfig {
  std::vector<int32_t> eos_token_ids;
  bool do_sample = false;
  float temperature = 1.0f;
  float top_p = 1.0f;
  int top_k = 0;  // 0: off
  float repetition_penalty = 1.0f;
};

// preprocessor_config.json. Pixel limits are areas in pixels (the file calls them edges).
struct PreprocessorConfig {
  int64_t min_pixels = 65536;
  int64_t max_pixels = 16777216;
  int patch_size = 16;
  int temporal_patch_size = 2;
  int merge_size = 2;
  std::array<float, 3> image_mean = {0.5f, 0.5f, 0.5f};
  std::array<float, 3> image_std = {0.5f, 0.5f, 0.5f};
};

// From config.json, generation_config.json and preprocessor_config.json of `directory`. Errors name the file,
// the field, what was expected and what was found: NotFound, InvalidArgument. The two optional files yield
// their defaults when they do not exist; eos ids then come from config.json. The last two functions read
// config.json as well, because token ids must be in its vocabulary and patches those of its vision tower.
Result<ModelConfig> LoadModelConfig(const std::string& directory);
Result<ModelConfig> LoadModelConfigFile(const std::string& path);  // config.json under any name
Result<GenerationConfig> LoadGenerationConfig(const std::string& directory);
Result<PreprocessorConfig> LoadPreprocessorConfig(const std::string& directory);

// Bytes of keys and values per token in BF16 over all layers.
inline int64_t Bf16KvBytesPerToken(const TextConfig& c) {
  return int64_t{2} * 2 * c.num_layers * c.num_kv_heads * c.head_dim;
}

}  // namespace triaxial

#endif  // TRIAXIAL_IO_MODEL_CONFIG_H_
