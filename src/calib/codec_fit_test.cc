#include "calib/codec_fit.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <fstream>
#include <string>
#include <string_view>
#include <vector>

#include "base/temp_dir_testing.h"
#include "calib/hard_checkpoint.h"

namespace triaxial {
namespace {

constexpr const char* kModel = "models/pocket-agent";

// Two conversations of some 300 tokens, in a file in `directory`.
Trajectories ShortConversations(const TempDir& directory) {
  const std::string path = directory.path() + "/short.jsonl";
  std::ofstream file(path);
  for (const char* subject : {"memo", "mail"}) {
    file << R"({"messages": [{"role": "user", "content": "Open the )" << subject << R"( in the window."},)"
         << R"({"role": "assistant", "content": ")";
    for (int i = 0; i < 40; ++i) file << "Spot " << i * 37 % 101 << " is the " << subject << ". ";
    file << "\"}]}\n";
  }
  file.close();
  auto trajectories = Trajectories::Open({path});
  EXPECT_TRUE(trajectories.ok()) << trajectories.status().message();
  return *std::move(trajectories);
}

KvCalibration Fitted(const std::string& directory, const CodecFitOptions& options) {
  const auto model = LoadServedModel(directory, "");
  EXPECT_TRUE(model.ok()) << model.status().message();
  const TempDir conversations;
  auto calibration = FitCodec(*model, ShortConversations(conversations), options);
  EXPECT_TRUE(calibration.ok()) << calibration.status().message();
  return calibration.ok() ? *std::move(calibration) : KvCalibration();
}

// What was multiplied into weights, the factors find: they take it out again.
TEST(CodecFit, FactorsUndoLoudChannels) {
  constexpr size_t kLoud = 5;  // a RoPE pair of each layer
  const TempDir hard;
  Hardening hardening{.key_scale = 32, .value_scale = 32};
  hardening.key_channels.assign(6, {kLoud});
  ASSERT_TRUE(HardenCheckpoint(kModel, hard.path(), hardening).ok());
  const CodecFitOptions options{.factor_conversations = 1, .level_conversations = 0};
  const KvCalibration before = Fitted(kModel, options), after = Fitted(hard.path(), options);
  ASSERT_TRUE(before.calibrated && after.calibrated);
  ASSERT_EQ(before.key_equalization.size(), 6u);
  ASSERT_EQ(after.key_equalization.size(), 6u);
  for (size_t layer = 0; layer < 6; ++layer) {
    const std::vector<float>& k = before.key_equalization[layer];
    const std::vector<float>& loud = after.key_equalization[layer];
    EXPECT_NEAR(loud[kLoud] / loud[0] / (k[kLoud] / k[0]), 32, 0.1);
    EXPECT_NEAR(loud[1] / loud[0] / (k[1] / k[0]), 1, 0.003);
    const std::vector<float>& v = before.value_equalization[layer];
    const std::vector<float>& loud_v = after.value_equalization[layer];
    ASSERT_EQ(v.size(), loud_v.size());
    size_t scaled = 0;
    for (size_t c = 0; c < v.size(); ++c) {
      scaled += loud_v[c] == 32 * v[c] ? 1 : 0;
      EXPECT_TRUE(loud_v[c] == v[c] || loud_v[c] == 32 * v[c]) << layer << ", " << c;
    }
    EXPECT_EQ(scaled, v.size() / 128 * 4);  // of each KV head
  }
  EXPECT_EQ(before.clip.v2, 1);  // without conversations for them
}

TEST(CodecFit, ChoosesTheLevelsThatLeadTheLeastAway) {
  std::vector<double> divergences;  // nine choices for values, then nine for keys
  double last_progress = 0;
  CodecFitOptions options{.factor_conversations = 1, .level_conversations = 1, .equalize_values = false};
  options.notice = [&](const std::string& line) {
    constexpr std::string_view kBefore = "from a bf16 cache ";
    if (const size_t at = line.find(kBefore); at != std::string::npos) {
      divergences.push_back(std::stod(line.substr(at + kBefore.size())));
    }
  };
  options.progress = [&](double fraction) {
    EXPECT_GT(fraction, last_progress);
    last_progress = fraction;
    return true;
  };
  const KvCalibration calibration = Fitted(kModel, options);
  EXPECT_EQ(last_progress, 1);
  EXPECT_TRUE(calibration.value_equalization.empty());
  ASSERT_EQ(divergences.size(), 18u);
  // With 2-bit values a clip and a gain pay, and keys are fitted beside the values' choice.
  const auto half = divergences.begin() + 9;
  EXPECT_LT(*std::min_element(divergences.begin(), half), divergences.front());
  EXPECT_LT(calibration.clip.v2, 1);
  EXPECT_GT(calibration.clip.v2, 0.5);
  EXPECT_GE(calibration.clip.v2_gain, 1);
  EXPECT_LT(*std::min_element(half, divergences.end()), *half);
}

TEST(CodecFit, CanBeInterruptedAndNeedsAConversation) {
  const auto model = LoadServedModel(kModel, "");
  ASSERT_TRUE(model.ok());
  CodecFitOptions options{.factor_conversations = 2, .level_conversations = 0};
  options.progress = [](double) { return false; };
  const TempDir conversations;
  EXPECT_EQ(FitCodec(*model, ShortConversations(conversations), options).status().code(), Code::kCancelled);
  EXPECT_EQ(FitCodec(*model, Trajectories(), {}).status().code(), Code::kInvalidArgument);
}

}  // namespace
}  // namespace triaxial
