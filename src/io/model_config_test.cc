#include "io/model_config.h"

#include <gtest/gtest.h>

#include "base/json.h"
#include "io/checkpoint_testing.h"

namespace triaxial {
namespace {

Json ReadData(const std::string& name) {
  auto json = ReadJsonFile("tests/data/configs/" + name);
  EXPECT_TRUE(json.ok()) << json.status().message();
  return std::move(json).value();
}

Result<ModelConfig> Load(const Json& config) {
  const TempDir dir;
  dir.Write("config.json", config.dump());
  return LoadModelConfig(dir.path());
}

TEST(ModelConfig, ReadsThePocketAgent) {
  const auto model = LoadModelConfig("models/pocket-agent");
  ASSERT_TRUE(model.ok()) << model.status().message();
  EXPECT_EQ(model->architecture, Architecture::kQwen3Vl);
  const TextConfig& text = model->text;
  EXPECT_EQ(text.hidden_size, 320);
  EXPECT_EQ(text.num_layers, 6);
  EXPECT_EQ(text.num_heads, 8);
  EXPECT_EQ(text.num_kv_heads, 2);
  EXPECT_EQ(text.head_dim, 128);
  EXPECT_EQ(text.intermediate_size, 768);
  EXPECT_EQ(text.vocab_size, 2048);
  EXPECT_EQ(text.max_position_embeddings, 32768);
  EXPECT_FLOAT_EQ(text.rms_norm_eps, 1e-6f);
  EXPECT_EQ(text.rope_theta, 5e6);
  EXPECT_EQ(text.mrope_section, (std::array<int, 3>{24, 20, 20}));
  EXPECT_TRUE(text.tie_word_embeddings);
  ASSERT_TRUE(model->vision.has_value());
  const VisionConfig& vision = *model->vision;
  EXPECT_EQ(vision.depth, 4);
  EXPECT_EQ(vision.hidden_size, 192);
  EXPECT_EQ(vision.num_heads, 3);
  EXPECT_EQ(vision.intermediate_size, 768);
  EXPECT_EQ(vision.num_position_embeddings, 576);
  EXPECT_EQ(vision.out_hidden_size, 320);
  EXPECT_EQ(vision.deepstack_visual_indexes, (std::vector<int>{1, 2}));
  EXPECT_EQ(model->image_token_id, 2012);
  EXPECT_EQ(model->vision_start_token_id, 2009);
  EXPECT_EQ(model->vision_end_token_id, 2010);
}

TEST(ModelConfig, ReadsEveryPublishedVisionLanguageSize) {
  const struct {
    const char* name;
    int hidden, layers, vision_depth, last_deepstack;
    int64_t kv_bytes;
    bool tied;
  } sizes[] = {{"2b", 2048, 28, 24, 17, 114688, true},
               {"4b", 2560, 36, 24, 17, 147456, true},
               {"8b", 4096, 36, 27, 24, 147456, false},
               {"32b", 5120, 64, 27, 24, 262144, false}};
  for (const auto& size : sizes) {
    const auto model = Load(ReadData("qwen3-vl-" + std::string(size.name) + ".config.json"));
    ASSERT_TRUE(model.ok()) << model.status().message();
    EXPECT_EQ(model->text.hidden_size, size.hidden);
    EXPECT_EQ(model->text.num_layers, size.layers);
    EXPECT_EQ(model->text.tie_word_embeddings, size.tied);
    EXPECT_EQ(model->vision->depth, size.vision_depth);
    EXPECT_EQ(model->vision->deepstack_visual_indexes.back(), size.last_deepstack);
    EXPECT_EQ(Bf16KvBytesPerToken(model->text), size.kv_bytes);
  }
}

TEST(ModelConfig, ReadsEveryPublishedTextSize) {
  const Json configs = ReadData("qwen3-text.configs.json");
  ASSERT_EQ(configs.size(), 6u);
  for (const auto& [name, config] : configs.items()) {
    const auto model = Load(config);
    ASSERT_TRUE(model.ok()) << model.status().message();
    EXPECT_EQ(model->architecture, Architecture::kQwen3);
    EXPECT_FALSE(model->vision.has_value());
    EXPECT_EQ(model->text.hidden_size, config["hidden_size"].get<int>());
    EXPECT_EQ(model->text.tie_word_embeddings, config["tie_word_embeddings"].get<bool>());
    EXPECT_EQ(model->text.rope_theta, 1e6);
    EXPECT_EQ(model->text.mrope_section, (std::array<int, 3>{64, 0, 0}));
  }
}

// Writers of different years put the same facts in different places.
TEST(ModelConfig, UnderstandsOldAndNewFieldNames) {
  const Json original = ReadData("qwen3-vl-4b.config.json");
  Json newer = original;
  newer["dtype"] = "bfloat16";
  newer["text_config"].erase("rope_theta");
  newer["text_config"].erase("rope_scaling");
  newer["text_config"]["rope_parameters"] = {{"mrope_interleaved", true},
                                             {"mrope_section", {24, 20, 20}},
                                             {"rope_theta", 5000000},
                                             {"rope_type", "default"}};
  newer["text_config"]["rope_scaling"] = nullptr;
  Json older = original;
  older["torch_dtype"] = "bfloat16";
  older["text_config"]["rope_scaling"] = {{"type", "mrope"}, {"mrope_section", {24, 20, 20}}};
  Json inner_scaling = original;
  inner_scaling["text_config"].erase("rope_theta");
  inner_scaling["text_config"]["rope_scaling"]["rope_theta"] = 5e6;
  for (const Json& config : {original, newer, older, inner_scaling}) {
    const auto model = Load(config);
    ASSERT_TRUE(model.ok()) << model.status().message();
    EXPECT_EQ(model->text.rope_theta, 5e6);
    EXPECT_EQ(model->text.mrope_section, (std::array<int, 3>{24, 20, 20}));
  }

  Json text = ReadData("qwen3-text.configs.json")["qwen3-8b"];
  text.erase("rope_theta");
  text["rope_parameters"] = {{"rope_theta", 1000000}, {"rope_type", "default"}};
  text["use_sliding_window"] = false;
  text["layer_types"] = Json::array({"full_attention", "full_attention"});
  const auto model = Load(text);
  ASSERT_TRUE(model.ok()) << model.status().message();
  EXPECT_EQ(model->text.rope_theta, 1e6);
}

TEST(ModelConfig, TiedEmbeddingsMayBeSaidOutsideOrInside) {
  Json config = ReadData("qwen3-vl-4b.config.json");
  config.erase("tie_word_embeddings");
  EXPECT_TRUE(Load(config)->text.tie_word_embeddings);
  config["tie_word_embeddings"] = false;
  EXPECT_FALSE(Load(config)->text.tie_word_embeddings);
  config["tie_word_embeddings"] = true;
  config["text_config"].erase("tie_word_embeddings");
  EXPECT_TRUE(Load(config)->text.tie_word_embeddings);
  config.erase("tie_word_embeddings");
  EXPECT_FALSE(Load(config)->text.tie_word_embeddings);
}

// A change to a good file and what the error must say behind the file's name; a null value removes the field.
struct Mistake {
  const char* pointer;
  Json value;
  const char* message;
};

TEST(ModelConfig, NamesFieldExpectedAndFound) {
  const Mistake mistakes[] = {
      {"/model_type", "llama",
       R"(model_type must be "qwen3_vl" (Qwen3VLForConditionalGeneration) or "qwen3" (Qwen3ForCausalLM), found "llama")"},
      {"/model_type", nullptr,
       R"(model_type must be "qwen3_vl" (Qwen3VLForConditionalGeneration) or "qwen3" (Qwen3ForCausalLM), found nothing)"},
      {"/model_type", 3, "model_type must be a string, found 3"},
      {"/architectures",
       {"Qwen3VLMoeForConditionalGeneration"},
       R"(architectures must be ["Qwen3VLForConditionalGeneration"] for model_type "qwen3_vl", found ["Qwen3VLMoeForConditionalGeneration"])"},
      {"/quantization_config",
       {{"quant_method", "fp8"}},
       R"(quantization_config must be absent, since weights must be BF16, F16 or F32, found {"quant_method": "fp8"})"},
      {"/text_config", nullptr, "text_config must be an object, found nothing"},
      {"/vision_config", 7, "vision_config must be an object, found 7"},
      {"/tie_word_embeddings", "yes", R"(tie_word_embeddings must be true or false, found "yes")"},
      {"/image_token_id", 151936, "image_token_id must be an integer from 0 to 151935, found 151936"},
      {"/vision_start_token_id", -1, "vision_start_token_id must be an integer from 0 to 151935, found -1"},
      {"/vision_end_token_id", nullptr,
       "vision_end_token_id must be an integer from 0 to 151935, found nothing"},
      {"/text_config/hidden_size", 0,
       "text_config.hidden_size must be an integer from 1 to 1048576, found 0"},
      {"/text_config/hidden_size", 2560.5,
       "text_config.hidden_size must be an integer from 1 to 1048576, found 2560.5"},
      {"/text_config/hidden_size", 18446744073709551615u,
       "text_config.hidden_size must be an integer from 1 to 1048576, found 18446744073709551615"},
      {"/text_config/num_hidden_layers", nullptr,
       "text_config.num_hidden_layers must be an integer from 1 to 1024, found nothing"},
      {"/text_config/num_attention_heads", true,
       "text_config.num_attention_heads must be an integer from 1 to 1024, found true"},
      {"/text_config/num_key_value_heads", 5,
       "text_config.num_key_value_heads must be a divisor of num_attention_heads (32), found 5"},
      {"/text_config/head_dim", 96, "text_config.head_dim must be 64 or 128, found 96"},
      {"/text_config/intermediate_size", -4,
       "text_config.intermediate_size must be an integer from 1 to 1048576, found -4"},
      {"/text_config/vocab_size", 5000000,
       "text_config.vocab_size must be an integer from 1 to 4194304, found 5000000"},
      {"/text_config/max_position_embeddings", "long",
       R"(text_config.max_position_embeddings must be an integer from 1 to 16777216, found "long")"},
      {"/text_config/rms_norm_eps", 0,
       "text_config.rms_norm_eps must be a number from 1e-12 to 1.0, found 0"},
      {"/text_config/hidden_act", "gelu", R"(text_config.hidden_act must be "silu", found "gelu")"},
      {"/text_config/attention_bias", true, "text_config.attention_bias must be false, found true"},
      {"/text_config/use_sliding_window", true, "text_config.use_sliding_window must be false, found true"},
      {"/text_config/layer_types",
       {"full_attention", "sliding_attention"},
       R"(text_config.layer_types must be "full_attention" in every layer, found ["full_attention", "sliding_attention"])"},
      {"/text_config/rope_theta", 0,
       "text_config.rope_theta must be a number from 1.0 to 1000000000000.0, found 0"},
      {"/text_config/rope_theta", nullptr,
       "text_config.rope_scaling.rope_theta must be a number from 1.0 to 1000000000000.0, found nothing"},
      {"/text_config/rope_scaling/rope_type", "yarn",
       R"(text_config.rope_scaling.rope_type must be "default" or "mrope", since no other rope scaling is supported, found "yarn")"},
      {"/text_config/rope_scaling",
       {{"type", "linear"}, {"factor", 2}},
       R"(text_config.rope_scaling.type must be "default" or "mrope", since no other rope scaling is supported, found "linear")"},
      {"/text_config/rope_scaling/mrope_interleaved", false,
       "text_config.rope_scaling.mrope_interleaved must be true, found false"},
      {"/text_config/rope_scaling/mrope_section",
       {16, 24, 24},
       "text_config.rope_scaling.mrope_section must be three integers for t, h, w that interleave and add up "
       "to 64, half of head_dim, found [16, 24, 24]"},
      {"/text_config/rope_scaling/mrope_section",
       {24, 20, 21},
       "text_config.rope_scaling.mrope_section must be three integers for t, h, w that interleave and add up "
       "to 64, half of head_dim, found [24, 20, 21]"},
      {"/text_config/rope_scaling/mrope_section",
       {32, 32},
       "text_config.rope_scaling.mrope_section must be three integers for t, h, w that interleave and add up "
       "to 64, half of head_dim, found [32, 32]"},
      {"/text_config/rope_scaling/mrope_section",
       {24, -20, 60},
       "text_config.rope_scaling.mrope_section must be a list of integers from 1 to 64, found [24, -20, 60]"},
      {"/vision_config/depth", 0, "vision_config.depth must be an integer from 1 to 1024, found 0"},
      {"/vision_config/num_heads", 15,
       "vision_config.hidden_size must be a multiple of 4 * num_heads (60), found 1024"},
      {"/vision_config/hidden_act", "silu",
       R"(vision_config.hidden_act must be "gelu_pytorch_tanh", found "silu")"},
      {"/vision_config/in_channels", 4, "vision_config.in_channels must be 3, found 4"},
      {"/vision_config/patch_size", 129,
       "vision_config.patch_size must be an integer from 1 to 128, found 129"},
      {"/vision_config/num_position_embeddings", 2305,
       "vision_config.num_position_embeddings must be a square number, found 2305"},
      {"/vision_config/out_hidden_size", 2048,
       "vision_config.out_hidden_size must be equal to text_config.hidden_size (2560), found 2048"},
      {"/vision_config/deepstack_visual_indexes",
       {5, 11, 11},
       "vision_config.deepstack_visual_indexes must be increasing, found [5, 11, 11]"},
      {"/vision_config/deepstack_visual_indexes",
       {5, 11, 24},
       "vision_config.deepstack_visual_indexes must be a list of integers from 0 to 23, found [5, 11, 24]"},
      {"/text_config/num_hidden_layers", 2,
       "vision_config.deepstack_visual_indexes must be at most one for each of the 2 decoder layers, found "
       "[5, 11, 17]"},
  };
  const Json good = ReadData("qwen3-vl-4b.config.json");
  for (const Mistake& mistake : mistakes) {
    Json config = good;
    config[Json::json_pointer(mistake.pointer)] = mistake.value;
    const TempDir dir;
    dir.Write("config.json", config.dump());
    const auto model = LoadModelConfig(dir.path());
    ASSERT_FALSE(model.ok()) << mistake.pointer;
    EXPECT_EQ(model.status().code(), Code::kInvalidArgument) << mistake.pointer;
    EXPECT_EQ(model.status().message(), dir.File("config.json") + ": " + mistake.message);
  }
}

TEST(ModelConfig, SaysWhatIsWrongWithTheFileItself) {
  const TempDir dir;
  EXPECT_EQ(LoadModelConfig(dir.path()).status().code(), Code::kNotFound);
  EXPECT_EQ(LoadModelConfig(dir.path()).status().message(),
            "cannot open " + dir.File("config.json") + ": No such file or directory");
  dir.Write("config.json", "[1]");
  EXPECT_EQ(LoadModelConfig(dir.path()).status().message(),
            dir.File("config.json") + " must hold a JSON object, found array");
  dir.Write("config.json", "{\"model_type\": ");
  EXPECT_EQ(LoadModelConfig(dir.path()).status().code(), Code::kInvalidArgument);
  dir.Write("config.json", std::string(2 << 20, ' '));
  EXPECT_EQ(LoadModelConfig(dir.path()).status().code(), Code::kTooLarge);
}

class CheckpointFiles : public testing::Test {
 protected:
  CheckpointFiles() { WriteModel(ReadData("qwen3-vl-4b.config.json")); }
  void WriteModel(const Json& config) { dir_.Write("config.json", config.dump()); }
  Result<GenerationConfig> Generation(const Json& json) {
    dir_.Write("generation_config.json", json.dump());
    return LoadGenerationConfig(dir_.path());
  }
  Result<PreprocessorConfig> Preprocessor(const Json& json) {
    dir_.Write("preprocessor_config.json", json.dump());
    return LoadPreprocessorConfig(dir_.path());
  }
  TempDir dir_;
};

TEST_F(CheckpointFiles, GenerationSettingsComeFromTheirFile) {
  const auto generation = Generation(ReadData("generation_config.json")["instruct"]);
  ASSERT_TRUE(generation.ok()) << generation.status().message();
  EXPECT_EQ(generation->eos_token_ids, (std::vector<int32_t>{151645, 151643}));
  EXPECT_TRUE(generation->do_sample);
  EXPECT_FLOAT_EQ(generation->temperature, 0.7f);
  EXPECT_FLOAT_EQ(generation->top_p, 0.8f);
  EXPECT_EQ(generation->top_k, 20);
  EXPECT_FLOAT_EQ(generation->repetition_penalty, 1.0f);
}

TEST_F(CheckpointFiles, EosComesFromConfigWithoutAGenerationFile) {
  auto generation = LoadGenerationConfig(dir_.path());
  ASSERT_TRUE(generation.ok()) << generation.status().message();
  EXPECT_EQ(generation->eos_token_ids, std::vector<int32_t>{151645});
  EXPECT_FALSE(generation->do_sample);
  Json text = ReadData("qwen3-text.configs.json")["qwen3-8b"];
  text["eos_token_id"] = {151645, 151643};
  WriteModel(text);
  generation = LoadGenerationConfig(dir_.path());
  ASSERT_TRUE(generation.ok()) << generation.status().message();
  EXPECT_EQ(generation->eos_token_ids, (std::vector<int32_t>{151645, 151643}));
  EXPECT_EQ(Generation({{"eos_token_id", 7}})->eos_token_ids, std::vector<int32_t>{7});
  EXPECT_EQ(Generation({{"temperature", nullptr}})->temperature, 1.0f);
}

TEST_F(CheckpointFiles, GenerationMistakesAreNamed) {
  const Mistake mistakes[] = {
      {"/eos_token_id", 151936, "eos_token_id must be an integer from 0 to 151935, found 151936"},
      {"/eos_token_id", {1, -1}, "eos_token_id must be a list of integers from 0 to 151935, found [1, -1]"},
      {"/temperature", -0.5, "temperature must be a number from 0.0 to 100.0, found -0.5"},
      {"/top_p", 0, "top_p must be a number from 1e-12 to 1.0, found 0"},
      {"/top_k", -1, "top_k must be an integer from 0 to 4194304, found -1"},
      {"/do_sample", 1, "do_sample must be true or false, found 1"},
      {"/repetition_penalty", "x", R"(repetition_penalty must be a number from 1e-12 to 100.0, found "x")"},
  };
  for (const Mistake& mistake : mistakes) {
    Json json = ReadData("generation_config.json")["instruct"];
    json[Json::json_pointer(mistake.pointer)] = mistake.value;
    const auto generation = Generation(json);
    ASSERT_FALSE(generation.ok()) << mistake.pointer;
    EXPECT_EQ(generation.status().message(), dir_.File("generation_config.json") + ": " + mistake.message);
  }
}

TEST_F(CheckpointFiles, PixelLimitsHaveTwoNames) {
  auto preprocessor = Preprocessor(ReadData("preprocessor_config.json"));
  ASSERT_TRUE(preprocessor.ok()) << preprocessor.status().message();
  EXPECT_EQ(preprocessor->min_pixels, 65536);
  EXPECT_EQ(preprocessor->max_pixels, 16777216);
  EXPECT_EQ(preprocessor->image_mean, (std::array<float, 3>{0.5f, 0.5f, 0.5f}));
  preprocessor = Preprocessor({{"min_pixels", 3136}, {"max_pixels", 1003520}, {"resample", 3}});
  ASSERT_TRUE(preprocessor.ok()) << preprocessor.status().message();
  EXPECT_EQ(preprocessor->min_pixels, 3136);
  EXPECT_EQ(preprocessor->max_pixels, 1003520);
  EXPECT_EQ(LoadPreprocessorConfig("models/pocket-agent")->min_pixels, 1024);
}

TEST_F(CheckpointFiles, PatchesAreThoseOfTheVisionTower) {
  Json config = ReadData("qwen3-vl-4b.config.json");
  config["vision_config"]["patch_size"] = 14;
  WriteModel(config);
  EXPECT_EQ(LoadPreprocessorConfig(dir_.path())->patch_size, 14);
  EXPECT_EQ(Preprocessor({{"patch_size", 16}}).status().message(),
            dir_.File("preprocessor_config.json") + ": patch_size must be 14, found 16");
}

TEST_F(CheckpointFiles, PreprocessorMistakesAreNamed) {
  const Mistake mistakes[] = {
      {"/merge_size", 4, ": merge_size must be 2, found 4"},
      {"/size", 1024, ": size must be an object, found 1024"},
      {"/size/shortest_edge", 0, ": size.shortest_edge must be an integer from 1 to 2147483648, found 0"},
      {"/size/longest_edge", 65535,
       ": the largest picture (size.longest_edge or max_pixels, an area) must hold at least 65536 pixels, "
       "found 65535"},
      {"/image_std",
       {0.5, 0, 0.5},
       ": image_std must be three numbers from 1e-06 to 10.0, found [0.5, 0, 0.5]"},
      {"/image_mean", {0.5}, ": image_mean must be three numbers from -10.0 to 10.0, found [0.5]"},
      {"/do_normalize", false, ": do_normalize must be true, found false"},
      {"/rescale_factor", 0.5, ": rescale_factor must be 1/255, found 0.5"},
      {"/resample", 2, ": resample must be 3, found 2"},
  };
  for (const Mistake& mistake : mistakes) {
    Json json = ReadData("preprocessor_config.json");
    json[Json::json_pointer(mistake.pointer)] = mistake.value;
    const auto preprocessor = Preprocessor(json);
    ASSERT_FALSE(preprocessor.ok()) << mistake.pointer;
    EXPECT_EQ(preprocessor.status().message(), dir_.File("preprocessor_config.json") + mistake.message);
  }
}

}  // namespace
}  // namespace triaxial
