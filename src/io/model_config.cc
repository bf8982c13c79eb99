#include "io/model_config.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <string_view>
#include <utility>

#include "base/json.h"
#include "io/json_fields.h"

namespace triaxial {
namespace {

constexpr size_t kMaxFileBytes = size_t{1} << 20;
constexpr int kMaxHeads = 1024;
constexpr int kMaxLayers = 1024;
constexpr int kMaxWidth = 1 << 20;  // hidden and intermediate sizes
constexpr int kMaxVocab = 1 << 22;
constexpr int kMaxPositions = 1 << 24;
constexpr double kTinyPositive = 1e-12;  // lower bound of numbers that must not be zero

// The JSON object in one file of a checkpoint directory.
Result<Json> ReadObject(const std::string& path) {
  ASSIGN_OR_RETURN(Json json, ReadJsonFile(path, kMaxFileBytes));
  if (!json.is_object()) return InvalidArgument(path + " must hold a JSON object, found " + json.type_name());
  return json;
}

std::string ConfigPath(const std::string& directory) { return directory + "/config.json"; }

// `key`, if present, must be `expected`: the program computes nothing else.
Status StringMustBe(const JsonFields& fields, const char* key, std::string_view expected) {
  std::string found(expected);
  RETURN_IF_ERROR(fields.String(key, &found, Presence::kOptional));
  return found == expected ? OkStatus() : fields.Wrong(key, '"' + std::string(expected) + '"');
}

Status BoolMustBe(const JsonFields& fields, const char* key, bool expected) {
  bool found = expected;
  RETURN_IF_ERROR(fields.Bool(key, &found, Presence::kOptional));
  return found == expected ? OkStatus() : fields.Wrong(key, expected ? "true" : "false");
}

Result<Architecture> ReadArchitecture(const JsonFields& config, const Json& json) {
  constexpr std::string_view kSupported =
      R"("qwen3_vl" (Qwen3VLForConditionalGeneration) or "qwen3" (Qwen3ForCausalLM))";
  std::string model_type;
  RETURN_IF_ERROR(config.String("model_type", &model_type, Presence::kOptional));
  std::string model_class;
  if (model_type == "qwen3_vl") {
    model_class = "Qwen3VLForConditionalGeneration";
  } else if (model_type == "qwen3") {
    model_class = "Qwen3ForCausalLM";
  } else {
    return config.Wrong("model_type", std::string(kSupported));
  }
  if (config.Has("architectures") && json["architectures"] != Json::array({model_class})) {
    return config.Wrong("architectures", "[\"" + model_class + "\"] for model_type \"" + model_type + '"');
  }
  return model_type == "qwen3_vl" ? Architecture::kQwen3Vl : Architecture::kQwen3;
}

// theta and sections stand in rope_parameters (transformers 5), or theta beside rope_scaling (before).
Status ReadRope(const JsonFields& fields, Architecture architecture, TextConfig* text) {
  const int half = text->head_dim / 2;
  text->mrope_section = {half, 0, 0};
  const char* key = fields.Has("rope_parameters") ? "rope_parameters" : "rope_scaling";
  RETURN_IF_ERROR(fields.Number("rope_theta", 1, 1e12, &text->rope_theta,
                                fields.Has(key) ? Presence::kOptional : Presence::kRequired));
  std::vector<int> section = {24, 20, 20};
  if (fields.Has(key)) {
    ASSIGN_OR_RETURN(const JsonFields rope, fields.Object(key));
    const Presence theta = fields.Has("rope_theta") ? Presence::kOptional : Presence::kRequired;
    RETURN_IF_ERROR(rope.Number("rope_theta", 1, 1e12, &text->rope_theta, theta));
    const char* type_key = rope.Has("rope_type") ? "rope_type" : "type";
    std::string type = "default";
    RETURN_IF_ERROR(rope.String(type_key, &type, Presence::kOptional));
    if (type != "default" && type != "mrope") {
      return rope.Wrong(type_key, "\"default\" or \"mrope\", since no other rope scaling is supported");
    }
    RETURN_IF_ERROR(BoolMustBe(rope, "mrope_interleaved", true));
    if (architecture == Architecture::kQwen3Vl) {
      RETURN_IF_ERROR(rope.Ints("mrope_section", 1, half, &section, Presence::kOptional));
      // Height takes every third frequency from the second on, width from the third on; all must exist.
      const bool fits = section.size() == 3 && section[0] + section[1] + section[2] == half &&
                        3 * section[1] - 2 < half && 3 * section[2] - 1 < half;
      if (!fits) {
        return rope.Wrong("mrope_section", "three integers for t, h, w that interleave and add up to " +
                                               std::to_string(half) + ", half of head_dim");
      }
    }
  }
  if (architecture == Architecture::kQwen3Vl) text->mrope_section = {section[0], section[1], section[2]};
  return OkStatus();
}

// Every layer attends to the whole context.
Status RefuseSlidingWindows(const JsonFields& fields, const Json& json) {
  RETURN_IF_ERROR(BoolMustBe(fields, "use_sliding_window", false));
  if (!fields.Has("layer_types")) return OkStatus();
  const Json& types = json["layer_types"];
  const bool full = types.is_array() && std::all_of(types.begin(), types.end(), [](const Json& type) {
                      return type == "full_attention";
                    });
  return full ? OkStatus() : fields.Wrong("layer_types", "\"full_attention\" in every layer");
}

Status ReadText(const JsonFields& fields, Architecture architecture, TextConfig* text) {
  RETURN_IF_ERROR(fields.Int("hidden_size", 1, kMaxWidth, &text->hidden_size));
  RETURN_IF_ERROR(fields.Int("num_hidden_layers", 1, kMaxLayers, &text->num_layers));
  RETURN_IF_ERROR(fields.Int("num_attention_heads", 1, kMaxHeads, &text->num_heads));
  RETURN_IF_ERROR(fields.Int("num_key_value_heads", 1, kMaxHeads, &text->num_kv_heads));
  if (text->num_heads % text->num_kv_heads != 0) {
    return fields.Wrong("num_key_value_heads",
                        "a divisor of num_attention_heads (" + std::to_string(text->num_heads) + ")");
  }
  text->head_dim = 128;  // the model family's default
  RETURN_IF_ERROR(fields.Int("head_dim", 1, kMaxWidth, &text->head_dim, Presence::kOptional));
  if (text->head_dim != 64 && text->head_dim != 128) return fields.Wrong("head_dim", "64 or 128");
  RETURN_IF_ERROR(fields.Int("intermediate_size", 1, kMaxWidth, &text->intermediate_size));
  RETURN_IF_ERROR(fields.Int("vocab_size", 1, kMaxVocab, &text->vocab_size));
  RETURN_IF_ERROR(fields.Int("max_position_embeddings", 1, kMaxPositions, &text->max_position_embeddings));
  RETURN_IF_ERROR(fields.Number("rms_norm_eps", kTinyPositive, 1, &text->rms_norm_eps, Presence::kOptional));
  RETURN_IF_ERROR(fields.Bool("tie_word_embeddings", &text->tie_word_embeddings, Presence::kOptional));
  RETURN_IF_ERROR(StringMustBe(fields, "hidden_act", "silu"));
  RETURN_IF_ERROR(BoolMustBe(fields, "attention_bias", false));
  return ReadRope(fields, architecture, text);
}

Status ReadVision(const JsonFields& fields, const TextConfig& text, VisionConfig* vision) {
  RETURN_IF_ERROR(fields.Int("depth", 1, kMaxLayers, &vision->depth));
  RETURN_IF_ERROR(fields.Int("hidden_size", 1, kMaxWidth, &vision->hidden_size));
  RETURN_IF_ERROR(fields.Int("num_heads", 1, kMaxHeads, &vision->num_heads));
  // Rotary positions split a head into rows and columns, each in pairs.
  if (vision->hidden_size % (4 * vision->num_heads) != 0) {
    return fields.Wrong("hidden_size",
                        "a multiple of 4 * num_heads (" + std::to_string(4 * vision->num_heads) + ")");
  }
  RETURN_IF_ERROR(fields.Int("intermediate_size", 1, kMaxWidth, &vision->intermediate_size));
  RETURN_IF_ERROR(StringMustBe(fields, "hidden_act", "gelu_pytorch_tanh"));
  RETURN_IF_ERROR(fields.Int("in_channels", 3, 3, &vision->in_channels, Presence::kOptional));
  RETURN_IF_ERROR(fields.Int("patch_size", 1, 128, &vision->patch_size));
  RETURN_IF_ERROR(fields.Int("temporal_patch_size", 1, 16, &vision->temporal_patch_size));
  RETURN_IF_ERROR(fields.Int("spatial_merge_size", 1, 16, &vision->spatial_merge_size));
  RETURN_IF_ERROR(fields.Int("num_position_embeddings", 1, kMaxWidth, &vision->num_position_embeddings));
  const int side = static_cast<int>(std::lround(std::sqrt(vision->num_position_embeddings)));
  if (side * side != vision->num_position_embeddings) {
    return fields.Wrong("num_position_embeddings", "a square number");
  }
  RETURN_IF_ERROR(fields.Int("out_hidden_size", 1, kMaxWidth, &vision->out_hidden_size));
  if (vision->out_hidden_size != text.hidden_size) {
    return fields.Wrong("out_hidden_size",
                        "equal to text_config.hidden_size (" + std::to_string(text.hidden_size) + ")");
  }
  std::vector<int>& indexes = vision->deepstack_visual_indexes;
  RETURN_IF_ERROR(fields.Ints("deepstack_visual_indexes", 0, vision->depth - 1, &indexes));
  if (std::adjacent_find(indexes.begin(), indexes.end(), std::greater_equal<>()) != indexes.end()) {
    return fields.Wrong("deepstack_visual_indexes", "increasing");
  }
  if (indexes.size() > static_cast<size_t>(text.num_layers)) {
    return fields.Wrong("deepstack_visual_indexes",
                        "at most one for each of the " + std::to_string(text.num_layers) + " decoder layers");
  }
  return OkStatus();
}

// An id or a list of ids; `ids` keeps its value when the field is absent.
Status ReadTokenIds(const JsonFields& fields, const Json& json, const char* key, int vocab_size,
                    std::vector<int32_t>* ids) {
  if (fields.Has(key) && json[key].is_array()) return fields.Ints(key, 0, vocab_size - 1, ids);
  int id = -1;
  RETURN_IF_ERROR(fields.Int(key, 0, vocab_size - 1, &id, Presence::kOptional));
  if (id >= 0) *ids = {id};
  return OkStatus();
}

}  // namespace

Result<ModelConfig> LoadModelConfig(const std::string& directory) {
  return LoadModelConfigFile(ConfigPath(directory));
}

Result<ModelConfig> LoadModelConfigFile(const std::string& path) {
  ASSIGN_OR_RETURN(const Json json, ReadObject(path));
  const JsonFields config(json, path);
  ModelConfig model;
  ASSIGN_OR_RETURN(model.architecture, ReadArchitecture(config, json));
  if (config.Has("quantization_config")) {
    return config.Wrong("quantization_config", "absent, since weights must be BF16, F16 or F32");
  }
  if (model.architecture == Architecture::kQwen3) {
    RETURN_IF_ERROR(RefuseSlidingWindows(config, json));
    RETURN_IF_ERROR(ReadText(config, model.architecture, &model.text));
    return model;
  }
  ASSIGN_OR_RETURN(const JsonFields text, config.Object("text_config"));
  RETURN_IF_ERROR(RefuseSlidingWindows(text, json["text_config"]));
  RETURN_IF_ERROR(ReadText(text, model.architecture, &model.text));
  // The outer field decides where both exist, as in the reference.
  RETURN_IF_ERROR(config.Bool("tie_word_embeddings", &model.text.tie_word_embeddings, Presence::kOptional));
  ASSIGN_OR_RETURN(const JsonFields vision, config.Object("vision_config"));
  model.vision.emplace();
  RETURN_IF_ERROR(ReadVision(vision, model.text, &*model.vision));
  const int last_id = model.text.vocab_size - 1;
  RETURN_IF_ERROR(config.Int("image_token_id", 0, last_id, &model.image_token_id));
  RETURN_IF_ERROR(config.Int("vision_start_token_id", 0, last_id, &model.vision_start_token_id));
  RETURN_IF_ERROR(config.Int("vision_end_token_id", 0, last_id, &model.vision_end_token_id));
  return model;
}

Result<GenerationConfig> LoadGenerationConfig(const std::string& directory) {
  ASSIGN_OR_RETURN(const ModelConfig model, LoadModelConfig(directory));
  ASSIGN_OR_RETURN(const Json config_json, ReadObject(ConfigPath(directory)));
  const int vocab_size = model.text.vocab_size;
  GenerationConfig generation;
  std::vector<int32_t>* eos = &generation.eos_token_ids;
  const JsonFields config(config_json, ConfigPath(directory));
  if (config.Has("text_config")) {
    ASSIGN_OR_RETURN(const JsonFields text, config.Object("text_config"));
    RETURN_IF_ERROR(ReadTokenIds(text, config_json["text_config"], "eos_token_id", vocab_size, eos));
  }
  RETURN_IF_ERROR(ReadTokenIds(config, config_json, "eos_token_id", vocab_size, eos));

  const std::string path = directory + "/generation_config.json";
  const Result<Json> json = ReadObject(path);
  if (!json.ok() && json.status().code() == Code::kNotFound) return generation;
  if (!json.ok()) return json.status();
  const JsonFields fields(*json, path);
  RETURN_IF_ERROR(ReadTokenIds(fields, *json, "eos_token_id", vocab_size, eos));
  RETURN_IF_ERROR(fields.Bool("do_sample", &generation.do_sample, Presence::kOptional));
  RETURN_IF_ERROR(fields.Number("temperature", 0, 100, &generation.temperature, Presence::kOptional));
  RETURN_IF_ERROR(fields.Number("top_p", kTinyPositive, 1, &generation.top_p, Presence::kOptional));
  RETURN_IF_ERROR(fields.Int("top_k", 0, kMaxVocab, &generation.top_k, Presence::kOptional));
  RETURN_IF_ERROR(fields.Number("repetition_penalty", kTinyPositive, 100, &generation.repetition_penalty,
                                Presence::kOptional));
  return generation;
}

Result<PreprocessorConfig> LoadPreprocessorConfig(const std::string& directory) {
  ASSIGN_OR_RETURN(const ModelConfig model, LoadModelConfig(directory));
  const VisionConfig vision = model.vision.value_or(VisionConfig{});
  PreprocessorConfig preprocessor;
  preprocessor.patch_size = vision.patch_size;
  preprocessor.temporal_patch_size = vision.temporal_patch_size;
  preprocessor.merge_size = vision.spatial_merge_size;

  const std::string path = directory + "/preprocessor_config.json";
  const Result<Json> json = ReadObject(path);
  if (!json.ok() && json.status().code() == Code::kNotFound) return preprocessor;
  if (!json.ok()) return json.status();
  const JsonFields fields(*json, path);
  // Patches must be cut as the vision tower reads them.
  const auto same = [&fields](const char* key, int expected) {
    int found = expected;
    return fields.Int(key, expected, expected, &found, Presence::kOptional);
  };
  RETURN_IF_ERROR(same("patch_size", vision.patch_size));
  RETURN_IF_ERROR(same("temporal_patch_size", vision.temporal_patch_size));
  RETURN_IF_ERROR(same("merge_size", vision.spatial_merge_size));
  for (const char* step : {"do_resize", "do_rescale", "do_normalize", "do_convert_rgb"}) {
    RETURN_IF_ERROR(BoolMustBe(fields, step, true));
  }
  double rescale = 1.0 / 255;
  RETURN_IF_ERROR(fields.Number("rescale_factor", 0, 1, &rescale, Presence::kOptional));
  if (std::fabs(rescale * 255 - 1) > 1e-4) return fields.Wrong("rescale_factor", "1/255");
  int bicubic = 3;
  RETURN_IF_ERROR(fields.Int("resample", bicubic, bicubic, &bicubic, Presence::kOptional));

  constexpr int64_t kMaxPixels = int64_t{1} << 31;
  int64_t* lo = &preprocessor.min_pixels;
  int64_t* hi = &preprocessor.max_pixels;
  if (fields.Has("size")) {
    ASSIGN_OR_RETURN(const JsonFields size, fields.Object("size"));
    RETURN_IF_ERROR(size.Int("shortest_edge", 1, kMaxPixels, lo, Presence::kOptional));
    RETURN_IF_ERROR(size.Int("longest_edge", 1, kMaxPixels, hi, Presence::kOptional));
  }
  // The older names of the same limits win where both exist, as in the reference.
  RETURN_IF_ERROR(fields.Int("min_pixels", 1, kMaxPixels, lo, Presence::kOptional));
  RETURN_IF_ERROR(fields.Int("max_pixels", 1, kMaxPixels, hi, Presence::kOptional));
  const int64_t side = int64_t{preprocessor.patch_size} * preprocessor.merge_size;
  if (*hi < *lo || *hi < side * side) {
    return InvalidArgument(
        path + ": the largest picture (size.longest_edge or max_pixels, an area) must hold at least " +
        std::to_string(std::max(*lo, side * side)) + " pixels, found " + std::to_string(*hi));
  }
  RETURN_IF_ERROR(fields.Triple("image_mean", -10, 10, &preprocessor.image_mean, Presence::kOptional));
  RETURN_IF_ERROR(fields.Triple("image_std", 1e-6, 10, &preprocessor.image_std, Presence::kOptional));
  return preprocessor;
}

}  // namespace triaxial
