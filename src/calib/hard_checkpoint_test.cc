#include "calib/hard_checkpoint.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <filesystem>
#include <memory>
#include <vector>

#include "base/float16.h"
#include "io/safetensors.h"
#include "model/model.h"
#include "model/single_sequence.h"

namespace triaxial {
namespace {

const std::string kModel = "models/pocket-agent";

// A directory that goes with the test.
class Directory {
 public:
  explicit Directory(const std::string& name)
      : path_((std::filesystem::temp_directory_path() / ("triaxial_" + name)).string()) {
    std::filesystem::remove_all(path_);
  }
  ~Directory() { std::filesystem::remove_all(path_); }
  const std::string& path() const { return path_; }

 private:
  std::string path_;
};

// Logits after each of some tokens, with a cache of `format`.
std::vector<float> Logits(const std::string& model, Format format) {
  constexpr int kTokens = 200;
  auto loaded = Model::Load(model, {.precision = Precision::kF32, .codec = Codec::kPaper});
  EXPECT_TRUE(loaded.ok()) << loaded.status().message();
  auto sequence = SingleSequence::Create(loaded->get(), format, kTokens);
  EXPECT_TRUE(sequence.ok()) << sequence.status().message();
  std::vector<int32_t> tokens;
  std::vector<std::array<int32_t, 3>> positions;
  for (int32_t i = 0; i < kTokens; ++i) {
    tokens.push_back(i * 37 % 1900);
    positions.push_back({i, i, i});
  }
  std::vector<float> logits;
  EXPECT_TRUE((*sequence)->Append(tokens, positions, {}, 64, kTokens, &logits).ok());
  return logits;
}

double LargestDifference(const std::vector<float>& a, const std::vector<float>& b) {
  double largest = 0;
  for (size_t i = 0; i < a.size(); ++i) largest = std::max(largest, std::abs(double{a[i]} - b[i]));
  return largest;
}

double MeanSquare(const std::vector<float>& a, const std::vector<float>& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += std::pow(double{a[i]} - b[i], 2);
  return sum / static_cast<double>(a.size());
}

TEST(HardCheckpoint, KeepsTheFunctionAndBreaksFourBitKeys) {
  const Directory hard("hard_checkpoint");
  ASSERT_TRUE(HardenCheckpoint(kModel, hard.path(), {.key_scale = 32, .value_scale = 8}).ok());
  const std::vector<float> plain = Logits(kModel, Format::kBf16);
  EXPECT_LT(LargestDifference(plain, Logits(hard.path(), Format::kBf16)), 1e-3);
  const double before = LargestDifference(plain, Logits(kModel, Format::kK4V4));
  const double after = LargestDifference(plain, Logits(hard.path(), Format::kK4V4));
  EXPECT_GT(after, 5 * before);
}

// Directions that no channel is: four-bit values break all the same, and the function stays up to the
// rounding of weights.
TEST(HardCheckpoint, DenseValuesKeepTheFunctionAndBreakFourBitValues) {
  const Directory hard("hard_checkpoint_dense");
  ASSERT_TRUE(
      HardenCheckpoint(kModel, hard.path(), {.key_scale = 1, .value_scale = 64, .dense_values = true}).ok());
  const std::vector<float> plain = Logits(kModel, Format::kBf16);
  const double kept = MeanSquare(plain, Logits(hard.path(), Format::kBf16));
  const double before = MeanSquare(plain, Logits(kModel, Format::kK4V4));
  const double after = MeanSquare(plain, Logits(hard.path(), Format::kK4V4));
  EXPECT_LT(kept, before);
  EXPECT_GT(after, 5 * before);
  const Checkpoint from = std::move(Checkpoint::Open(kModel)).value();
  const Checkpoint to = std::move(Checkpoint::Open(hard.path())).value();
  const std::string name = "model.language_model.layers.0.self_attn.v_proj.weight";
  const TensorView& view = from.tensors().at(name);
  std::vector<float> a(static_cast<size_t>(view.elements)), b(a.size());
  CopyToF32(view, a.data());
  CopyToF32(to.tensors().at(name), b.data());
  // Every row is louder than it was, not four of them alone.
  const int64_t width = view.shape[1];
  for (int64_t r = 0; r < view.shape[0]; ++r) {
    double grown = 0, was = 0;
    for (int64_t i = r * width; i < (r + 1) * width; ++i) {
      grown += std::pow(b[static_cast<size_t>(i)], 2);
      was += std::pow(a[static_cast<size_t>(i)], 2);
    }
    EXPECT_GT(grown, 1.2 * was) << r;
  }
}

TEST(HardCheckpoint, TakesChannelsThatAreNamed) {
  const Directory hard("hard_checkpoint_named");
  const std::vector<std::vector<int>> channels = {{1}, {2}, {3}, {4}, {5}, {63}};
  ASSERT_TRUE(HardenCheckpoint(kModel, hard.path(), {.key_scale = 4, .key_channels = channels}).ok());
  const Checkpoint before = std::move(Checkpoint::Open(kModel)).value();
  const Checkpoint after = std::move(Checkpoint::Open(hard.path())).value();
  for (size_t layer = 0; layer < channels.size(); ++layer) {
    const std::string name =
        "model.language_model.layers." + std::to_string(layer) + ".self_attn.k_norm.weight";
    const auto* old_weights = reinterpret_cast<const uint16_t*>(before.tensors().at(name).data);
    const auto* new_weights = reinterpret_cast<const uint16_t*>(after.tensors().at(name).data);
    for (int c = 0; c < 128; ++c) {
      const float scale = c % 64 == channels[layer][0] ? 4.0f : 1.0f;
      EXPECT_EQ(Bf16ToFloat(new_weights[c]), scale * Bf16ToFloat(old_weights[c])) << layer << " " << c;
    }
  }
  for (const std::vector<std::vector<int>>& bad : {std::vector<std::vector<int>>{{1}},
                                                   {{1}, {2}, {3}, {4}, {5}, {64}},
                                                   {{1}, {2}, {3}, {4}, {5}, {6, 6}}}) {
    EXPECT_EQ(HardenCheckpoint(kModel, hard.path(), {.key_channels = bad}).code(), Code::kInvalidArgument);
  }
}

TEST(HardCheckpoint, ChangesWhatItSaysAndNothingElse) {
  const Directory hard("hard_checkpoint_tensors");
  ASSERT_TRUE(HardenCheckpoint(kModel, hard.path(), {.key_scale = 8, .key_pairs = 3, .seed = 5}).ok());
  const Checkpoint before = std::move(Checkpoint::Open(kModel)).value();
  const Checkpoint after = std::move(Checkpoint::Open(hard.path())).value();
  ASSERT_EQ(before.tensors().size(), after.tensors().size());
  for (const auto& [name, view] : before.tensors()) {
    const TensorView& other = after.tensors().at(name);
    ASSERT_EQ(view.shape, other.shape) << name;
    std::vector<float> a(static_cast<size_t>(view.elements)), b(a.size());
    CopyToF32(view, a.data());
    CopyToF32(other, b.data());
    const float scale = name.ends_with("k_norm.weight")   ? 8.0f
                        : name.ends_with("q_norm.weight") ? 0.125f
                                                          : 1.0f;
    std::vector<size_t> changed;
    for (size_t i = 0; i < a.size(); ++i) {
      if (a[i] == b[i]) continue;
      changed.push_back(i);
      EXPECT_EQ(b[i], a[i] * scale) << name << " " << i;
    }
    EXPECT_EQ(changed.size(), scale == 1.0f ? 0u : 6u) << name;
    for (const size_t i : changed) {
      EXPECT_TRUE(std::find(changed.begin(), changed.end(), (i + 64) % 128) != changed.end()) << name;
    }
  }
  EXPECT_FALSE(std::filesystem::exists(hard.path() + "/kv_calibration.json"));
  EXPECT_TRUE(std::filesystem::exists(hard.path() + "/tokenizer.json"));
}

TEST(HardCheckpoint, RefusesWhatItCannotDo) {
  const Directory hard("hard_checkpoint_errors");
  const auto message = [&](const Hardening& hardening) {
    return HardenCheckpoint(kModel, hard.path(), hardening).message();
  };
  EXPECT_NE(message({.key_scale = 3}).find("power of two"), std::string::npos);
  EXPECT_NE(message({.key_scale = 0}).find("power of two"), std::string::npos);
  EXPECT_NE(message({.key_pairs = 65}).find("a head has 64"), std::string::npos);
  EXPECT_NE(message({.value_channels = -1}).find("a head has 128"), std::string::npos);
  EXPECT_FALSE(HardenCheckpoint("models/none", hard.path(), {}).ok());
  EXPECT_NE(HardenCheckpoint(kModel, kModel, {}).message().find("itself"), std::string::npos);
}

}  // namespace
}  // namespace triaxial
