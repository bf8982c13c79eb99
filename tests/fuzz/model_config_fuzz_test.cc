// Random values in every field of a checkpoint's JSON files: whatever is accepted must keep the promises of
// io/model_config.h that the rest of the program relies on.
#include <gtest/gtest.h>

#include <random>

#include "base/json.h"
#include "io/checkpoint_testing.h"
#include "io/model_config.h"

namespace triaxial {
namespace {

void ExpectPromises(const ModelConfig& model) {
  const TextConfig& text = model.text;
  EXPECT_TRUE(text.head_dim == 64 || text.head_dim == 128);
  EXPECT_GT(text.num_kv_heads, 0);
  EXPECT_EQ(text.num_heads % text.num_kv_heads, 0);
  EXPECT_EQ(text.mrope_section[0] + text.mrope_section[1] + text.mrope_section[2], text.head_dim / 2);
  for (const int size : {text.hidden_size, text.num_layers, text.intermediate_size, text.vocab_size,
                         text.max_position_embeddings}) {
    EXPECT_GT(size, 0);
  }
  EXPECT_GT(text.rms_norm_eps, 0);
  EXPECT_GE(text.rope_theta, 1);
  ASSERT_EQ(model.vision.has_value(), model.architecture == Architecture::kQwen3Vl);
  if (!model.vision) return;
  const VisionConfig& vision = *model.vision;
  EXPECT_EQ(vision.out_hidden_size, text.hidden_size);
  EXPECT_GT(vision.num_heads, 0);
  EXPECT_EQ(vision.hidden_size % (4 * vision.num_heads), 0);
  int previous = -1;
  for (const int index : vision.deepstack_visual_indexes) {
    EXPECT_GT(index, previous);
    EXPECT_LT(index, vision.depth);
    previous = index;
  }
  for (const int id : {model.image_token_id, model.vision_start_token_id, model.vision_end_token_id}) {
    EXPECT_GE(id, 0);
    EXPECT_LT(id, text.vocab_size);
  }
}

// Every value in the document, at any depth.
void CollectPointers(const Json& json, const std::string& path, std::vector<std::string>* out) {
  if (!path.empty()) out->push_back(path);
  if (!json.is_structured()) return;
  for (const auto& [key, value] : json.items()) CollectPointers(value, path + "/" + key, out);
}

class ConfigFuzz : public testing::Test {
 protected:
  template <typename T>
  const T& Pick(const std::vector<T>& from) {
    return from[std::uniform_int_distribution<size_t>(0, from.size() - 1)(random_)];
  }

  // Replaces one or two values by others.
  std::string Damage(const Json& good) {
    static const std::vector<Json> kValues = {nullptr,
                                              true,
                                              false,
                                              0,
                                              1,
                                              -1,
                                              2,
                                              3,
                                              7,
                                              64,
                                              128,
                                              2048,
                                              1 << 30,
                                              INT64_MAX,
                                              INT64_MIN,
                                              UINT64_MAX,
                                              0.5,
                                              1e300,
                                              "",
                                              "qwen3",
                                              "default",
                                              "silu",
                                              Json::array(),
                                              Json::object(),
                                              {1, 2, 3},
                                              {24, 20, 20},
                                              {{"rope_type", "default"}},
                                              {0, 0}};
    Json json = good;
    for (int edits = std::uniform_int_distribution<int>(1, 2)(random_); edits > 0; --edits) {
      std::vector<std::string> pointers;
      CollectPointers(json, "", &pointers);
      json[Json::json_pointer(Pick(pointers))] = Pick(kValues);
    }
    return json.dump();
  }

  std::mt19937 random_{4711};
};

TEST_F(ConfigFuzz, WhatIsAcceptedKeepsItsPromises) {
  const auto config = ReadJsonFile("models/pocket-agent/config.json");
  ASSERT_TRUE(config.ok()) << config.status().message();
  const auto text = ReadJsonFile("tests/data/configs/qwen3-text.configs.json");
  ASSERT_TRUE(text.ok()) << text.status().message();
  const TempDir dir;
  int accepted = 0;
  for (int i = 0; i < 6000; ++i) {
    dir.Write("config.json", Damage(i % 2 == 0 ? *config : (*text)["qwen3-4b"]));
    const auto model = LoadModelConfig(dir.path());
    if (model.ok()) {
      ++accepted;
      ExpectPromises(*model);
    } else {
      EXPECT_EQ(model.status().code(), Code::kInvalidArgument);
      EXPECT_LT(model.status().message().size(), 600u) << model.status().message();
    }
  }
  EXPECT_GT(accepted, 300);
  EXPECT_LT(accepted, 5000);
}

TEST_F(ConfigFuzz, OptionalFilesKeepTheirPromises) {
  const auto generation = ReadJsonFile("models/pocket-agent/generation_config.json");
  const auto preprocessor = ReadJsonFile("models/pocket-agent/preprocessor_config.json");
  ASSERT_TRUE(generation.ok() && preprocessor.ok());
  const TempDir dir;
  std::filesystem::copy_file("models/pocket-agent/config.json", dir.File("config.json"));
  for (int i = 0; i < 3000; ++i) {
    dir.Write("generation_config.json", Damage(*generation));
    if (const auto loaded = LoadGenerationConfig(dir.path()); loaded.ok()) {
      for (const int32_t id : loaded->eos_token_ids) EXPECT_TRUE(id >= 0 && id < 2048) << id;
      EXPECT_TRUE(loaded->temperature >= 0 && loaded->top_p > 0 && loaded->top_k >= 0);
    }
    dir.Write("preprocessor_config.json", Damage(*preprocessor));
    if (const auto loaded = LoadPreprocessorConfig(dir.path()); loaded.ok()) {
      EXPECT_TRUE(loaded->min_pixels > 0 && loaded->min_pixels <= loaded->max_pixels);
      EXPECT_EQ(loaded->patch_size, 16);
      for (const float std : loaded->image_std) EXPECT_GT(std, 0);
    }
  }
}

}  // namespace
}  // namespace triaxial
