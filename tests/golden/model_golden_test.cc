// The model against transformers on the pocket agent: vision tower, logits at every position, greedy
// continuations through the real cache. tests/data/model/README.md describes the data.
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "base/file.h"
#include "base/json.h"
#include "model/model.h"
#include "model/single_sequence.h"
#ifdef TRIAXIAL_CUDA
#include "ops/cuda/device.h"
#endif

namespace triaxial {
namespace {

const std::string kModel = "models/pocket-agent";
const std::string kData = "tests/data/model/";
constexpr int32_t kImagePad = 2012;
constexpr int kVocab = 2048;

// An array of a packed run; tools/reference/convert_goldens.py writes them.
struct Array {
  std::vector<uint32_t> shape;
  std::vector<int32_t> ints;
  std::vector<float> floats;
};

struct Golden {
  std::string name;
  int32_t rope_delta = 0;
  std::vector<std::string> images;
  std::map<std::string, Array> arrays;

  const std::vector<int32_t>& ints(const std::string& key) const { return arrays.at(key).ints; }
  const std::vector<float>& floats(const std::string& key) const { return arrays.at(key).floats; }
};

std::map<std::string, Array> Unpack(const std::string& bytes) {
  std::map<std::string, Array> arrays;
  size_t at = 8;
  EXPECT_EQ(bytes.substr(0, at), std::string("TXGOLD1\0", 8));
  const auto take = [&](void* to, size_t n) {
    EXPECT_LE(at + n, bytes.size());
    std::memcpy(to, bytes.data() + at, n);
    at += n;
  };
  while (at < bytes.size()) {
    uint8_t length = 0;
    uint8_t kind = 0;
    uint8_t dimensions = 0;
    take(&length, 1);
    std::string name(length, ' ');
    take(name.data(), length);
    take(&kind, 1);
    take(&dimensions, 1);
    Array& array = arrays[name];
    size_t count = 1;
    for (int i = 0; i < dimensions; ++i) {
      take(&array.shape.emplace_back(), 4);
      count *= array.shape.back();
    }
    if (kind == 1) {
      array.floats.resize(count);
      take(array.floats.data(), count * 4);
    } else {
      array.ints.resize(count);
      take(array.ints.data(), count * 4);
    }
  }
  return arrays;
}

std::vector<Golden> LoadGoldens() {
  std::vector<Golden> goldens;
  Result<Json> prompts = ReadJsonFile(kData + "prompts.json");
  EXPECT_TRUE(prompts.ok()) << prompts.status().message();
  for (const Json& prompt : *prompts) {
    Golden golden{prompt["name"], prompt["rope_delta"], prompt["images"], {}};
    Result<std::string> bytes = ReadFile(kData + golden.name + ".golden", size_t{64} << 20);
    EXPECT_TRUE(bytes.ok()) << bytes.status().message();
    golden.arrays = Unpack(*bytes);
    goldens.push_back(std::move(golden));
  }
  EXPECT_EQ(goldens.size(), 12u);
  return goldens;
}

const std::vector<Golden>& Goldens() {
  static const auto* goldens = new std::vector<Golden>(LoadGoldens());
  return *goldens;
}

std::unique_ptr<Model> LoadModel(Precision precision, Codec codec = Codec::kRotated,
                                 Device device = Device::kCpu) {
  Result<std::unique_ptr<Model>> model =
      Model::Load(kModel, {.device = device, .precision = precision, .dummy_weights = false, .codec = codec});
  EXPECT_TRUE(model.ok()) << model.status().message();
  return model.ok() ? *std::move(model) : nullptr;
}

// A golden prompt, ready to run: its images encoded by the model.
struct Prepared {
  std::vector<VisualFeatures> features;
  std::vector<PlacedImage> images;
  MropePositions positions;
};

Prepared Prepare(const Golden& golden, Model* model) {
  Prepared p;
  Result<PreprocessorConfig> config = LoadPreprocessorConfig(kModel);
  EXPECT_TRUE(config.ok()) << config.status().message();
  const std::vector<int32_t>& tokens = golden.ints("input_ids");
  std::vector<ImageRun> runs;
  p.features.reserve(golden.images.size());
  int32_t at = 0;
  for (const std::string& path : golden.images) {
    Result<std::string> bytes = ReadFile(kData + "images/" + path, size_t{1} << 20);
    EXPECT_TRUE(bytes.ok()) << bytes.status().message();
    Result<ImagePatches> patches = PreprocessImage(*bytes, ImageLimits(), *config);
    EXPECT_TRUE(patches.ok()) << patches.status().message();
    p.features.push_back(model->Encode(*patches, *config));
    at = static_cast<int32_t>(std::find(tokens.begin() + at, tokens.end(), kImagePad) - tokens.begin());
    runs.push_back({at, patches->grid_h / config->merge_size, patches->grid_w / config->merge_size});
    p.images.push_back({at, &p.features.back()});
    at += p.features.back().tokens;
  }
  p.positions = ComputePositions(static_cast<int32_t>(tokens.size()), runs);
  return p;
}

int ArgMax(const float* logits) {
  return static_cast<int>(std::max_element(logits, logits + kVocab) - logits);
}

// Logits of every position of a golden prompt, prefilled in chunks into a BF16 cache, then the greedy
// continuation.
struct Replay {
  std::vector<float> logits;
  std::vector<int32_t> greedy;
};

Replay RunGolden(const Golden& golden, Model* model, int32_t chunk) {
  const Prepared p = Prepare(golden, model);
  const std::vector<int32_t>& tokens = golden.ints("input_ids");
  const std::vector<int32_t>& expected = golden.ints("greedy_ids");
  const auto n = static_cast<int32_t>(tokens.size());
  const auto steps = static_cast<int32_t>(expected.size());
  Result<std::unique_ptr<SingleSequence>> sequence = SingleSequence::Create(model, Format::kBf16, n + steps);
  EXPECT_TRUE(sequence.ok()) << sequence.status().message();
  Replay run;
  Status status = (*sequence)->Append(tokens, p.positions.positions, p.images, chunk, n, &run.logits);
  EXPECT_TRUE(status.ok()) << status.message();
  run.greedy.push_back(ArgMax(run.logits.data() + int64_t{n - 1} * kVocab));
  std::vector<float> logits;
  while (static_cast<int32_t>(run.greedy.size()) < steps) {
    const int32_t position = n + static_cast<int32_t>(run.greedy.size()) - 1 + p.positions.delta;
    const std::array<int32_t, 3> axes = {position, position, position};
    status = (*sequence)->Append({&run.greedy.back(), 1}, {&axes, 1}, {}, 1, 1, &logits);
    EXPECT_TRUE(status.ok()) << status.message();
    run.greedy.push_back(ArgMax(logits.data()));
  }
  return run;
}

double LargestDifference(const std::vector<float>& expected, const float* found) {
  double largest = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    largest = std::max(largest, std::abs(double{expected[i]} - found[i]));
  }
  return largest;
}

TEST(ModelGolden, PositionsOfPrompts) {
  const std::unique_ptr<Model> model = LoadModel(Precision::kF32);
  for (const Golden& golden : Goldens()) {
    SCOPED_TRACE(golden.name);
    const Prepared p = Prepare(golden, model.get());
    const std::vector<int32_t>& expected = golden.ints("position_ids");  // [3][n]
    const size_t n = golden.ints("input_ids").size();
    EXPECT_EQ(p.positions.delta, golden.rope_delta);
    for (size_t i = 0; i < n; ++i) {
      for (size_t axis = 0; axis < 3; ++axis) {
        ASSERT_EQ(p.positions.positions[i][axis], expected[axis * n + i]) << "token " << i;
      }
    }
  }
}

TEST(ModelGolden, VisionTowerInF32) {
  const std::unique_ptr<Model> model = LoadModel(Precision::kF32);
  int images = 0;
  for (const Golden& golden : Goldens()) {
    if (golden.images.empty()) continue;
    SCOPED_TRACE(golden.name);
    const Prepared p = Prepare(golden, model.get());
    ++images;
    const auto check = [&](const std::string& key, const std::vector<float>& found) {
      const std::vector<float>& expected = golden.floats(key);
      const auto [low, high] = std::minmax_element(expected.begin(), expected.end());
      const double relative = LargestDifference(expected, found.data()) / (*high - *low);
      EXPECT_LT(relative, 1e-4) << key;
    };
    check("vision_merged_first", p.features[0].embeddings);
    check("deepstack_0_first8", p.features[0].deepstack[0]);
    check("deepstack_1_first8", p.features[0].deepstack[1]);
  }
  EXPECT_EQ(images, 9);
}

// What a run differs by from the reference.
struct Difference {
  double logits = 0;  // largest, of the last position's and of all top-5 logits, as a share of the range
  int64_t positions = 0;
  int64_t first_choices_equal = 0;
  int continuations_equal = 0;
};

Difference Compare(Model* model, int32_t chunk) {
  Difference d;
  for (const Golden& golden : Goldens()) {
    const Replay run = RunGolden(golden, model, chunk);
    const size_t n = golden.ints("input_ids").size();
    const std::vector<float>& last = golden.floats("last_logits");
    const auto [low, high] = std::minmax_element(last.begin(), last.end());
    const double range = *high - *low;
    d.logits = std::max(d.logits, LargestDifference(last, run.logits.data() + (n - 1) * kVocab) / range);
    const std::vector<int32_t>& top = golden.ints("top5_ids");
    const std::vector<float>& top_logits = golden.floats("top5_logits");
    for (size_t i = 0; i < n; ++i) {
      const float* logits = run.logits.data() + i * kVocab;
      ++d.positions;
      d.first_choices_equal += ArgMax(logits) == top[i * 5];
      for (size_t j = 0; j < 5; ++j) {
        d.logits =
            std::max(d.logits, std::abs(double{logits[top[i * 5 + j]]} - top_logits[i * 5 + j]) / range);
      }
    }
    d.continuations_equal += run.greedy == golden.ints("greedy_ids");
  }
  std::printf("logits differ by at most %.1e of their range; first choice equal at %lld of %lld positions\n",
              d.logits, static_cast<long long>(d.first_choices_equal), static_cast<long long>(d.positions));
  EXPECT_GT(d.positions, 10000);
  return d;
}

// Nothing is read from the cache while the prompt runs; the continuation reads BF16 keys and values.
TEST(ModelGolden, LogitsAndGreedyInF32) {
  const Difference d = Compare(LoadModel(Precision::kF32).get(), 1 << 20);
  EXPECT_LT(d.logits, 1e-4);
  EXPECT_EQ(d.first_choices_equal, d.positions);
  EXPECT_EQ(d.continuations_equal, 12);
}

// Later chunks read earlier ones as BF16, which the reference keeps in F32: ties within that rounding may
// turn.
TEST(ModelGolden, LogitsAndGreedyInF32InChunks) {
  const Difference d = Compare(LoadModel(Precision::kF32).get(), 200);
  EXPECT_LT(d.logits, 1e-2);
  EXPECT_GE(static_cast<double>(d.first_choices_equal), 0.999 * static_cast<double>(d.positions));
  EXPECT_EQ(d.continuations_equal, 12);
}

TEST(ModelGolden, LogitsAndGreedyInF32WithThePaperCodec) {
  const Difference d = Compare(LoadModel(Precision::kF32, Codec::kPaper).get(), 512);
  EXPECT_LT(d.logits, 1e-2);
  EXPECT_GE(static_cast<double>(d.first_choices_equal), 0.999 * static_cast<double>(d.positions));
  EXPECT_EQ(d.continuations_equal, 12);
}

TEST(ModelGolden, Bf16AgreesOnTheFirstChoice) {
  const Difference d = Compare(LoadModel(Precision::kBf16).get(), 512);
  EXPECT_GE(static_cast<double>(d.first_choices_equal), 0.99 * static_cast<double>(d.positions));
}

// Mean square by which logits at all positions of a prompt differ from those of a model that reads nothing
// back, if everything older than `chunk` rows is read back in `format`.
double QuantizationError(const Golden& golden, Model* model, Format format, int32_t chunk) {
  const Prepared p = Prepare(golden, model);
  const std::vector<int32_t>& tokens = golden.ints("input_ids");
  const auto n = static_cast<int32_t>(tokens.size());
  std::vector<float> logits[2];
  for (const bool quantized : {false, true}) {
    auto sequence = SingleSequence::Create(model, format, n);
    EXPECT_TRUE(sequence.ok()) << sequence.status().message();
    const Status status = (*sequence)->Append(tokens, p.positions.positions, p.images, quantized ? chunk : n,
                                              n, &logits[quantized]);
    EXPECT_TRUE(status.ok()) << status.message();
  }
  double sum = 0;
  for (size_t i = 0; i < logits[0].size(); ++i) {
    sum += std::pow(double{logits[0][i]} - logits[1][i], 2);
  }
  return sum / static_cast<double>(logits[0].size());
}

// Of F32 at 2 bits.
double TwoBitError(const Golden& golden, const KvCalibration& calibration) {
  Result<std::unique_ptr<Model>> model =
      Model::Load(kModel, {.precision = Precision::kF32, .calibration = calibration});
  EXPECT_TRUE(model.ok()) << model.status().message();
  return QuantizationError(golden, model->get(), Format::kK2V2, 64);
}

TEST(ModelGolden, CalibrationMakesTwoBitsBetter) {
  const Result<KvCalibration> calibration = LoadKvCalibration(kModel, 6, 2, 128);
  ASSERT_TRUE(calibration.ok()) << calibration.status().message();
  EXPECT_TRUE(calibration->calibrated);
  double with = 0;
  double without = 0;
  for (const Golden& golden : Goldens()) {
    if (!golden.name.starts_with("many")) continue;
    with += TwoBitError(golden, *calibration);
    without += TwoBitError(golden, KvCalibration());
  }
  std::printf("mean square error of logits: %.4f with the calibration, %.4f without\n", with / 4,
              without / 4);
  EXPECT_LT(with, 0.8 * without);
}

#ifdef TRIAXIAL_CUDA

// On a machine with a GPU. Without one there is nothing to compare, unless it is said that there must be one.
class GpuModelGolden : public testing::Test {
 protected:
  void SetUp() override {
    std::string why;
    if (cuda::FindDevice(&why)) return;
    if (std::getenv("TRIAXIAL_REQUIRE_GPU") != nullptr) FAIL() << why;
    GTEST_SKIP() << why;
  }
  static std::unique_ptr<Model> Load(Codec codec = Codec::kRotated) {
    return LoadModel(Precision::kBf16, codec, Device::kCuda);
  }
};

// The tolerances of BF16; the CPU's tower in BF16 differs from the reference by as much.
TEST_F(GpuModelGolden, VisionTower) {
  const std::unique_ptr<Model> model = Load();
  int images = 0;
  for (const Golden& golden : Goldens()) {
    if (golden.images.empty()) continue;
    SCOPED_TRACE(golden.name);
    const Prepared p = Prepare(golden, model.get());
    ++images;
    const VisualFeatures& features = p.features[0];
    const size_t size = static_cast<size_t>(features.tokens) * 320;
    std::vector<float> found(size * 3);
    ASSERT_EQ(features.device_deepstack, 2);
    ASSERT_EQ(
        cudaMemcpy(found.data(), features.device.get(), found.size() * sizeof(float), cudaMemcpyDeviceToHost),
        cudaSuccess);
    const auto check = [&](const std::string& key, const float* values) {
      const std::vector<float>& expected = golden.floats(key);
      double error = 0, square = 0;
      for (size_t i = 0; i < expected.size(); ++i) {
        error += std::pow(double{expected[i]} - values[i], 2);
        square += std::pow(double{expected[i]}, 2);
      }
      EXPECT_LT(std::sqrt(error / square), 2e-2) << key;
    };
    check("vision_merged_first", found.data());
    check("deepstack_0_first8", found.data() + size);
    check("deepstack_1_first8", found.data() + 2 * size);
  }
  EXPECT_EQ(images, 9);
}

TEST_F(GpuModelGolden, AgreesOnTheFirstChoice) {
  for (const Codec codec : {Codec::kRotated, Codec::kPaper}) {
    for (const int32_t chunk : {512, 100}) {
      const Difference d = Compare(Load(codec).get(), chunk);
      EXPECT_GE(static_cast<double>(d.first_choices_equal), 0.99 * static_cast<double>(d.positions));
      std::printf("%d of 12 continuations equal\n", d.continuations_equal);
      EXPECT_GE(d.continuations_equal, 11);
    }
  }
}

// What quantization costs is what it costs on the CPU: prompts in chunks (prefill over compressed blocks),
// then token by token (decode over them).
TEST_F(GpuModelGolden, QuantizationCostsWhatItCostsOnTheCpu) {
  for (const Codec codec : {Codec::kRotated, Codec::kPaper}) {
    const std::unique_ptr<Model> cpu = LoadModel(Precision::kF32, codec), gpu = Load(codec);
    for (const Golden& golden : Goldens()) {
      if (golden.name != "many-00" && golden.name != "text-00") continue;
      for (int f = 0; f < kFormats; ++f) {
        const auto format = static_cast<Format>(f);
        if (format == Format::kBf16) continue;
        const double expected = QuantizationError(golden, cpu.get(), format, 64);
        for (const int32_t chunk : {64, 1}) {
          if (chunk == 1 && golden.name != "text-00") continue;
          const double found = QuantizationError(golden, gpu.get(), format, chunk);
          std::printf("%s, chunks of %d: mean square error %.4f on the CPU, %.4f on the GPU\n",
                      std::string(Name(format)).c_str(), chunk, expected, found);
          EXPECT_LT(found, 1.3 * expected + 0.02);
          if (chunk == 64) {
            EXPECT_GT(found, 0.7 * expected);
          }
        }
      }
    }
  }
}

#endif  // TRIAXIAL_CUDA

}  // namespace
}  // namespace triaxial
