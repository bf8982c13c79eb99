#include "model/model.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "base/float16.h"
#include "base/json.h"
#include "io/checkpoint_testing.h"
#include "io/safetensors.h"
#include "model/single_sequence.h"

namespace triaxial {
namespace {

constexpr int kHidden = 32;
constexpr int kHeads = 4;
constexpr int kKvHeads = 2;
constexpr int kDim = 64;
constexpr int kInner = 48;
constexpr int kVocab = 50;
constexpr int kLayers = 2;

struct Values {
  std::vector<int64_t> shape;
  std::vector<float> data;
};
using Weights = std::map<std::string, Values>;

// A text-only Qwen3 with weights that every dtype holds exactly.
Weights RandomWeights(bool tied) {
  std::mt19937 random(1);
  std::uniform_int_distribution<int> step(-16, 16);
  Weights weights;
  const auto add = [&](const std::string& name, std::vector<int64_t> shape, float offset) {
    Values& v = weights[name];
    int64_t n = 1;
    for (const int64_t d : shape) n *= d;
    v.shape = std::move(shape);
    for (int64_t i = 0; i < n; ++i) v.data.push_back(static_cast<float>(step(random)) / 64 + offset);
  };
  add("model.embed_tokens.weight", {kVocab, kHidden}, 0);
  add("model.norm.weight", {kHidden}, 1);
  if (!tied) add("lm_head.weight", {kVocab, kHidden}, 0);
  for (int i = 0; i < kLayers; ++i) {
    const std::string layer = "model.layers." + std::to_string(i) + ".";
    add(layer + "input_layernorm.weight", {kHidden}, 1);
    add(layer + "post_attention_layernorm.weight", {kHidden}, 1);
    add(layer + "self_attn.q_norm.weight", {kDim}, 1);
    add(layer + "self_attn.k_norm.weight", {kDim}, 1);
    add(layer + "self_attn.q_proj.weight", {kHeads * kDim, kHidden}, 0);
    add(layer + "self_attn.k_proj.weight", {kKvHeads * kDim, kHidden}, 0);
    add(layer + "self_attn.v_proj.weight", {kKvHeads * kDim, kHidden}, 0);
    add(layer + "self_attn.o_proj.weight", {kHidden, kHeads * kDim}, 0);
    add(layer + "mlp.gate_proj.weight", {kInner, kHidden}, 0);
    add(layer + "mlp.up_proj.weight", {kInner, kHidden}, 0);
    add(layer + "mlp.down_proj.weight", {kHidden, kInner}, 0);
  }
  return weights;
}

void WriteConfig(const TempDir& dir, bool tied) {
  dir.Write("config.json", Json{{"architectures", {"Qwen3ForCausalLM"}},
                                {"model_type", "qwen3"},
                                {"hidden_size", kHidden},
                                {"num_hidden_layers", kLayers},
                                {"num_attention_heads", kHeads},
                                {"num_key_value_heads", kKvHeads},
                                {"head_dim", kDim},
                                {"intermediate_size", kInner},
                                {"vocab_size", kVocab},
                                {"max_position_embeddings", 1024},
                                {"rms_norm_eps", 1e-6},
                                {"rope_theta", 10000.0},
                                {"hidden_act", "silu"},
                                {"eos_token_id", 1},
                                {"tie_word_embeddings", tied}}
                               .dump());
}

void WriteWeights(const TempDir& dir, const Weights& weights, DType dtype) {
  Json header;
  std::string data;
  for (const auto& [name, values] : weights) {
    const size_t begin = data.size();
    for (const float v : values.data) {
      if (dtype == DType::kF32) {
        data.append(reinterpret_cast<const char*>(&v), 4);
      } else {
        const uint16_t half = dtype == DType::kBf16 ? FloatToBf16(v) : FloatToFp16(v);
        data.append(reinterpret_cast<const char*>(&half), 2);
      }
    }
    header[name] = {
        {"dtype", std::string(Name(dtype))}, {"shape", values.shape}, {"data_offsets", {begin, data.size()}}};
  }
  dir.Write("model.safetensors", SafetensorsFile(header.dump(), data));
}

// The decoder of SPEC in doubles, one token at a time: logits of every token.
class Oracle {
 public:
  Oracle(const Weights& weights, bool tied) : w_(weights), tied_(tied) {}

  std::vector<double> Logits(const std::vector<int32_t>& tokens) const {
    std::vector<std::vector<double>> x;
    for (const int32_t t : tokens) {
      const float* row = w_.at("model.embed_tokens.weight").data.data() + t * kHidden;
      x.emplace_back(row, row + kHidden);
    }
    for (int layer = 0; layer < kLayers; ++layer) RunLayer("model.layers." + std::to_string(layer) + ".", &x);
    std::vector<double> logits;
    for (const std::vector<double>& row : x) {
      const std::vector<double> y =
          Product(tied_ ? "model.embed_tokens" : "lm_head", Norm(row, "model.norm", 0, kHidden));
      logits.insert(logits.end(), y.begin(), y.end());
    }
    return logits;
  }

 private:
  std::vector<double> Product(const std::string& name, const std::vector<double>& x) const {
    const Values& w = w_.at(name + ".weight");
    std::vector<double> y(static_cast<size_t>(w.shape[0]));
    for (size_t o = 0; o < y.size(); ++o) {
      for (size_t i = 0; i < x.size(); ++i) y[o] += w.data[o * x.size() + i] * x[i];
    }
    return y;
  }
  std::vector<double> Norm(const std::vector<double>& x, const std::string& name, int begin, int n) const {
    double sum = 0;
    for (int i = 0; i < n; ++i) sum += x[begin + i] * x[begin + i];
    std::vector<double> y;
    const std::vector<float>& weight = w_.at(name + ".weight").data;
    for (int i = 0; i < n; ++i) y.push_back(x[begin + i] / std::sqrt(sum / n + 1e-6) * weight[i]);
    return y;
  }
  // Normalized and rotated head.
  std::vector<double> Head(const std::vector<double>& x, const std::string& norm, int head,
                           size_t position) const {
    std::vector<double> y = Norm(x, norm, head * kDim, kDim);
    for (int k = 0; k < kDim / 2; ++k) {
      const double angle = static_cast<double>(position) * std::pow(10000.0, -2.0 * k / kDim);
      const double a = y[k];
      const double b = y[k + kDim / 2];
      y[k] = a * std::cos(angle) - b * std::sin(angle);
      y[k + kDim / 2] = b * std::cos(angle) + a * std::sin(angle);
    }
    return y;
  }
  void RunLayer(const std::string& name, std::vector<std::vector<double>>* x) const {
    const std::string attention = name + "self_attn.";
    std::vector<std::vector<double>> keys, values;
    for (size_t t = 0; t < x->size(); ++t) {
      std::vector<double>& row = (*x)[t];
      const std::vector<double> in = Norm(row, name + "input_layernorm", 0, kHidden);
      const std::vector<double> q = Product(attention + "q_proj", in);
      const std::vector<double> k = Product(attention + "k_proj", in);
      values.push_back(Product(attention + "v_proj", in));
      keys.emplace_back();
      for (int h = 0; h < kKvHeads; ++h) {
        const std::vector<double> key = Head(k, attention + "k_norm", h, t);
        keys.back().insert(keys.back().end(), key.begin(), key.end());
      }
      std::vector<double> attended(kHeads * kDim);
      for (int h = 0; h < kHeads; ++h) {
        const int kv = h / (kHeads / kKvHeads);
        const std::vector<double> query = Head(q, attention + "q_norm", h, t);
        double sum = 0;
        for (size_t s = 0; s <= t; ++s) {
          double score = 0;
          for (int c = 0; c < kDim; ++c) score += query[c] * keys[s][kv * kDim + c];
          const double p = std::exp(score / 8);
          sum += p;
          for (int c = 0; c < kDim; ++c) attended[h * kDim + c] += p * values[s][kv * kDim + c];
        }
        for (int c = 0; c < kDim; ++c) attended[h * kDim + c] /= sum;
      }
      const std::vector<double> o = Product(attention + "o_proj", attended);
      for (int i = 0; i < kHidden; ++i) row[i] += o[i];
      const std::vector<double> mlp_in = Norm(row, name + "post_attention_layernorm", 0, kHidden);
      std::vector<double> gate = Product(name + "mlp.gate_proj", mlp_in);
      const std::vector<double> up = Product(name + "mlp.up_proj", mlp_in);
      for (int i = 0; i < kInner; ++i) gate[i] *= up[i] / (1 + std::exp(-gate[i]));
      const std::vector<double> down = Product(name + "mlp.down_proj", gate);
      for (int i = 0; i < kHidden; ++i) row[i] += down[i];
    }
  }

  const Weights& w_;
  bool tied_;
};

std::vector<int32_t> SomeTokens(int n) {
  std::vector<int32_t> tokens;
  for (int i = 0; i < n; ++i) tokens.push_back((i * 13 + 5) % kVocab);
  return tokens;
}

std::vector<float> RunAll(Model* model, const std::vector<int32_t>& tokens, int32_t chunk,
                          Format format = Format::kBf16) {
  const auto n = static_cast<int32_t>(tokens.size());
  auto sequence = SingleSequence::Create(model, format, n);
  EXPECT_TRUE(sequence.ok()) << sequence.status().message();
  std::vector<float> logits;
  const Status status = (*sequence)->Append(tokens, ComputePositions(n, {}).positions, {}, chunk, n, &logits);
  EXPECT_TRUE(status.ok()) << status.message();
  return logits;
}

void ExpectNear(const std::vector<double>& expected, const std::vector<float>& found, double tolerance) {
  ASSERT_EQ(expected.size(), found.size());
  for (size_t i = 0; i < expected.size(); ++i) ASSERT_NEAR(expected[i], found[i], tolerance) << "at " << i;
}

TEST(Model, TextOnlyCheckpointsOfEveryDtypeEqualTheDefinition) {
  const std::vector<int32_t> tokens = SomeTokens(90);
  for (const bool tied : {true, false}) {
    const Weights weights = RandomWeights(tied);
    const std::vector<double> expected = Oracle(weights, tied).Logits(tokens);
    const TempDir dir;
    WriteConfig(dir, tied);
    for (const DType dtype : {DType::kF32, DType::kBf16, DType::kF16}) {
      SCOPED_TRACE(Name(dtype));
      WriteWeights(dir, weights, dtype);
      for (const Codec codec : {Codec::kRotated, Codec::kPaper}) {
        auto model = Model::Load(dir.path(), {.precision = Precision::kF32, .codec = codec});
        ASSERT_TRUE(model.ok()) << model.status().message();
        ExpectNear(expected, RunAll(model->get(), tokens, 1000), 2e-4);
        // From the second step on, keys and values are read back as BF16.
        ExpectNear(expected, RunAll(model->get(), tokens, 7), 0.1);
      }
    }
    auto model = Model::Load(dir.path(), {.precision = Precision::kBf16});
    ASSERT_TRUE(model.ok()) << model.status().message();
    ExpectNear(expected, RunAll(model->get(), tokens, 1000), 0.3);
  }
}

TEST(Model, Fp8IsRefusedWithoutAGpu) {
  const TempDir dir;
  WriteConfig(dir, true);
  WriteWeights(dir, RandomWeights(true), DType::kF32);
  const auto model = Model::Load(dir.path(), {.device = Device::kCpu, .precision = Precision::kFp8});
  ASSERT_FALSE(model.ok());
  EXPECT_NE(model.status().message().find("--dtype bf16"), std::string::npos) << model.status().message();
}

TEST(Model, CountsParametersAndBytes) {
  const TempDir dir;
  for (const bool tied : {true, false}) {
    WriteConfig(dir, tied);
    const Weights weights = RandomWeights(tied);
    WriteWeights(dir, weights, DType::kF32);
    int64_t parameters = 0;
    for (const auto& [name, values] : weights) parameters += static_cast<int64_t>(values.data.size());
    auto model = Model::Load(dir.path(), {.precision = Precision::kF32});
    ASSERT_TRUE(model.ok()) << model.status().message();
    EXPECT_EQ((*model)->parameters(), parameters);
    // An untied embedding is looked up, not streamed; packing may round widths up.
    const int64_t streamed = 4 * (parameters - (tied ? 0 : kVocab * kHidden));
    EXPECT_GE((*model)->decode_weight_bytes(), streamed);
    EXPECT_LE((*model)->decode_weight_bytes(), 2 * streamed);
  }
  auto agent = Model::Load("models/pocket-agent", {});
  ASSERT_TRUE(agent.ok()) << agent.status().message();
  EXPECT_EQ((*agent)->parameters(), 14698560);
}

TEST(Model, EqualizationLeavesTheFunctionUnchanged) {
  const Weights weights = RandomWeights(true);
  const TempDir dir;
  WriteConfig(dir, true);
  WriteWeights(dir, weights, DType::kF32);
  KvCalibration calibration;
  calibration.calibrated = true;
  std::mt19937 random(1);
  std::uniform_real_distribution<float> exponent(-3, 3);
  for (int i = 0; i < kLayers; ++i) {
    std::vector<float>& factors = calibration.key_equalization.emplace_back();
    for (int c = 0; c < kDim / 2; ++c) factors.push_back(std::exp2(exponent(random)));
    std::vector<float>& values = calibration.value_equalization.emplace_back();
    for (int c = 0; c < kKvHeads * kDim; ++c) values.push_back(std::exp2(std::round(exponent(random))));
  }
  auto model = Model::Load(dir.path(), {.precision = Precision::kF32, .calibration = calibration});
  ASSERT_TRUE(model.ok()) << model.status().message();
  const std::vector<int32_t> tokens = SomeTokens(90);
  ExpectNear(Oracle(weights, true).Logits(tokens), RunAll(model->get(), tokens, 1000), 5e-4);
}

// A checkpoint with loud value channels and the factors that quieten them is, weight by weight, the one
// without: its cache holds the same bits, at any precision, and it says the same.
TEST(Model, FactorsOfTwoUndoLoudValueChannelsExactly) {
  const Weights weights = RandomWeights(true);
  Weights loud = weights;
  KvCalibration calibration;
  std::mt19937 random(2);
  for (int layer = 0; layer < kLayers; ++layer) {
    const std::string attention = "model.layers." + std::to_string(layer) + ".self_attn.";
    std::vector<float>& v = loud.at(attention + "v_proj.weight").data;
    std::vector<float>& o = loud.at(attention + "o_proj.weight").data;
    std::vector<float>& factors = calibration.value_equalization.emplace_back();
    for (int c = 0; c < kKvHeads * kDim; ++c) {
      const float factor = std::exp2(static_cast<float>(random() % 11) - 5);
      factors.push_back(factor);
      for (int i = 0; i < kHidden; ++i) v[static_cast<size_t>(c * kHidden + i)] *= factor;
      const int group = kHeads / kKvHeads;
      for (int head = c / kDim * group; head < (c / kDim + 1) * group; ++head) {
        for (int i = 0; i < kHidden; ++i)
          o[static_cast<size_t>((i * kHeads + head) * kDim + c % kDim)] /= factor;
      }
    }
  }
  for (const Precision precision : {Precision::kF32, Precision::kBf16}) {
    const TempDir dir;
    WriteConfig(dir, true);
    const DType dtype = precision == Precision::kF32 ? DType::kF32 : DType::kBf16;
    WriteWeights(dir, weights, dtype);
    auto plain = Model::Load(dir.path(), {.precision = precision});
    ASSERT_TRUE(plain.ok()) << plain.status().message();
    const TempDir loud_dir;
    WriteConfig(loud_dir, true);
    WriteWeights(loud_dir, loud, dtype);
    auto undone = Model::Load(loud_dir.path(), {.precision = precision, .calibration = calibration});
    ASSERT_TRUE(undone.ok()) << undone.status().message();
    auto left = Model::Load(loud_dir.path(), {.precision = precision});
    ASSERT_TRUE(left.ok()) << left.status().message();
    const std::vector<int32_t> tokens = SomeTokens(200);
    const std::vector<float> logits = RunAll(plain->get(), tokens, 7, Format::kK4V2);
    EXPECT_EQ(RunAll(undone->get(), tokens, 7, Format::kK4V2), logits);
    EXPECT_NE(RunAll(left->get(), tokens, 7, Format::kK4V2), logits);
  }
}

TEST(Model, DecodesSequencesTogetherAsAlone) {
  const TempDir dir;
  WriteConfig(dir, true);
  auto loaded = Model::Load(dir.path(), {.precision = Precision::kF32, .dummy_weights = true});
  ASSERT_TRUE(loaded.ok()) << loaded.status().message();
  Model* model = loaded->get();
  EXPECT_TRUE(model->dummy_weights());
  const std::vector<int32_t> a = SomeTokens(70);
  const std::vector<int32_t> b(a.rbegin(), a.rbegin() + 9);
  const std::vector<float> alone_a = RunAll(model, a, 1000);
  const std::vector<float> alone_b = RunAll(model, b, 1000);
  EXPECT_GT(*std::max_element(alone_a.begin(), alone_a.end()), 0);

  // Both prompts in one step without their last tokens, then both last tokens in another.
  auto arena = KvArena::Create(model->geometry(), 8 * BlockBytes(model->geometry(), Format::kBf16));
  ASSERT_TRUE(arena.ok());
  KvCache cache(model->geometry(), arena->total_rows(), TagNeeds::Uniform(Format::kBf16));
  const SequenceId ids[] = {cache.CreateSequence(), cache.CreateSequence()};
  const std::vector<int32_t>* prompts[] = {&a, &b};
  std::vector<float> logits(2 * kVocab);
  for (const bool last : {false, true}) {
    Batch batch;
    KvAppend append;
    for (int s = 0; s < 2; ++s) {
      const auto length = static_cast<int32_t>(prompts[s]->size());
      const int32_t begin = last ? length - 1 : 0;
      const int32_t end = last ? length : length - 1;
      const int32_t row = batch.rows();
      for (int32_t i = begin; i < end; ++i) {
        batch.tokens.push_back((*prompts[s])[static_cast<size_t>(i)]);
        batch.positions.push_back({i, i, i});
      }
      const std::vector<KvToken> tokens(static_cast<size_t>(end - begin));
      ASSERT_TRUE(cache.Append(ids[s], tokens, &append).ok());
      for (KvStore store : append.stores) {
        store.row_begin += row;
        batch.stores.push_back(store);
      }
      batch.sequences.push_back({row, end - begin, cache.View(ids[s])});
      batch.logits_rows.push_back(batch.rows() - 1);
    }
    model->Forward(batch, &*arena, logits.data());
    cache.FinishStep();
  }
  for (int i = 0; i < kVocab; ++i) {
    EXPECT_NEAR(logits[static_cast<size_t>(i)], alone_a[69 * kVocab + static_cast<size_t>(i)], 2e-3);
    EXPECT_NEAR(logits[static_cast<size_t>(kVocab + i)], alone_b[8 * kVocab + static_cast<size_t>(i)], 2e-3);
  }
}

TEST(Model, ErrorsNameTensorExpectedAndFound) {
  const TempDir dir;
  WriteConfig(dir, true);
  Weights weights = RandomWeights(true);
  weights["model.layers.1.mlp.up_proj.weight"].shape = {kHidden, kInner};
  WriteWeights(dir, weights, DType::kF32);
  std::string message = Model::Load(dir.path(), {}).status().message();
  for (const char* part : {"model.safetensors", "model.layers.1.mlp.up_proj.weight", "48", "32"}) {
    EXPECT_NE(message.find(part), std::string::npos) << message;
  }
  weights.erase("model.layers.1.mlp.up_proj.weight");
  WriteWeights(dir, weights, DType::kF32);
  const auto missing = Model::Load(dir.path(), {});
  EXPECT_EQ(missing.status().code(), Code::kNotFound);
  EXPECT_NE(missing.status().message().find("model.layers.1.mlp.up_proj.weight"), std::string::npos);
}

}  // namespace
}  // namespace triaxial
