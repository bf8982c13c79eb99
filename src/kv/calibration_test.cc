#include "kv/calibration.h"

#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <random>
#include <string>

namespace triaxial {
namespace {

class CalibrationTest : public testing::Test {
 protected:
  void SetUp() override {
    const auto* info = testing::UnitTest::GetInstance()->current_test_info();
    directory_ = std::filesystem::temp_directory_path() / (std::string("triaxial_") + info->name());
    std::filesystem::remove_all(directory_);
    std::filesystem::create_directories(directory_);
  }
  void TearDown() override { std::filesystem::remove_all(directory_); }
  std::string path() const { return (directory_ / "kv_calibration.json").string(); }
  Result<KvCalibration> Load(int layers, int head_dim) {
    return LoadKvCalibration(directory_.string(), layers, /*num_kv_heads=*/2, head_dim);
  }
  // A file for one layer of head_dim 4 with one part of the text replaced.
  std::string ErrorAfter(const std::string& from, const std::string& to) {
    std::string text =
        R"({"version": 1, "head_dim": 4, "key_equalization": [[1.5, 2]], "clip_k2": 0.9, "clip_v2": 1})";
    if (!from.empty()) text.replace(text.find(from), from.size(), to);
    std::ofstream(path()) << text;
    const auto result = Load(1, 4);
    if (result.ok()) return "";
    EXPECT_EQ(result.status().code(), Code::kInvalidArgument);
    EXPECT_NE(result.status().message().find("kv_calibration.json"), std::string::npos);
    return result.status().message();
  }
  std::filesystem::path directory_;
};

TEST_F(CalibrationTest, MissingFileIsTheIdentity) {
  const auto calibration = Load(2, 128);
  ASSERT_TRUE(calibration.ok());
  EXPECT_FALSE(calibration->calibrated);
  EXPECT_TRUE(calibration->key_equalization.empty());
  EXPECT_EQ(calibration->clip, ClipRatios{});
}

TEST_F(CalibrationTest, SavedFloatsComeBackExactly) {
  std::mt19937 rng(1);
  std::uniform_real_distribution<float> exponent(-15.9f, 15.9f);
  KvCalibration calibration;
  calibration.clip = {0.9f, 0.96f, 1.15f, 1.0f};
  for (int layer = 0; layer < 20; ++layer) {
    auto& factors = calibration.key_equalization.emplace_back();
    for (int i = 0; i < 64; ++i) factors.push_back(std::exp2(exponent(rng)));
    auto& values = calibration.value_equalization.emplace_back();
    for (int i = 0; i < 256; ++i) values.push_back(std::exp2(std::round(exponent(rng))));
  }
  ASSERT_TRUE(SaveKvCalibration(path(), calibration, 128).ok());
  const auto loaded = Load(20, 128);
  ASSERT_TRUE(loaded.ok()) << loaded.status().message();
  EXPECT_TRUE(loaded->calibrated);
  EXPECT_EQ(loaded->key_equalization, calibration.key_equalization);
  EXPECT_EQ(loaded->value_equalization, calibration.value_equalization);
  EXPECT_EQ(loaded->clip, calibration.clip);
}

TEST_F(CalibrationTest, ReadsAHandWrittenFile) {
  EXPECT_EQ(ErrorAfter("", ""), "");
  const auto calibration = Load(1, 4);
  ASSERT_TRUE(calibration.ok());
  EXPECT_EQ(calibration->key_equalization, (std::vector<std::vector<float>>{{1.5f, 2.0f}}));
  EXPECT_EQ(calibration->clip, (ClipRatios{0.9f, 1.0f}));
  EXPECT_TRUE(calibration->value_equalization.empty());
}

TEST_F(CalibrationTest, EachMistakeIsNamed) {
  const struct {
    const char *from, *to, *field, *expected, *found;
  } kMistakes[] = {
      {"\"version\": 1", "\"version\": 2", "'version'", "expected 1", "found 2"},
      {"\"version\": 1", "\"version\": \"1\"", "'version'", "expected 1", "found \"1\""},
      {"\"head_dim\": 4", "\"head_dim\": 128", "'head_dim'", "expected 4", "found 128"},
      {"\"clip_k2\": 0.9, ", "", "'clip_k2'", "missing", ""},
      {"\"clip_k2\": 0.9", "\"clip_k2\": 0.4", "'clip_k2'", "from 0.5 to 1", "found 0.4"},
      {"\"clip_v2\": 1", "\"clip_v2\": 1.01", "'clip_v2'", "from 0.5 to 1", "found 1.01"},
      {"\"clip_v2\": 1", "\"clip_v2\": null", "'clip_v2'", "a number", "found null"},
      {"[[1.5, 2]]", "[[1.5, 2], [1, 1]]", "'key_equalization'", "1 layers", "found 2 layers"},
      {"[[1.5, 2]]", "7", "'key_equalization'", "1 layers", "found 7"},
      {"[[1.5, 2]]", "[[1.5]]", "'key_equalization[0]'", "2 factors", "found 1 factors"},
      {"[[1.5, 2]]", "[{}]", "'key_equalization[0]'", "2 factors", "found {}"},
      {"1.5, 2]", "1.5, 0]", "'key_equalization[0][1]'", "a number from", "found 0"},
      {"1.5, 2]", "-1.5, 2]", "'key_equalization[0][0]'", "a number from", "found -1.5"},
      {"1.5, 2]", "1.5, 1e300]", "'key_equalization[0][1]'", "a number from", "found 1e+300"},
      {"\"clip_v2\"", "\"value_equalization\": [], \"clip_v2\"", "'value_equalization'", "1 layers",
       "found 0"},
      {"\"clip_v2\"", "\"value_equalization\": [[1, 2]], \"clip_v2\"", "'value_equalization[0]'", "8 factors",
       "found 2"},
      {"\"clip_v2\"", "\"value_equalization\": [[1, 2, 4, 8, 1, 1, 3, 1]], \"clip_v2\"",
       "'value_equalization[0][6]'", "a power of two", "found 3"},
      {"\"clip_v2\"", "\"value_equalization\": [[1, 2, 4, 8, 1, 1, 1, -2]], \"clip_v2\"",
       "'value_equalization[0][7]'", "a number from", "found -2"},
      {"\"clip_v2\"", "\"clip\": 1, \"clip_v2\"", "'clip'", "unknown", "remove"},
  };
  for (const auto& mistake : kMistakes) {
    const std::string error = ErrorAfter(mistake.from, mistake.to);
    for (const char* part : {mistake.field, mistake.expected, mistake.found}) {
      EXPECT_NE(error.find(part), std::string::npos) << mistake.to << " -> " << error;
    }
  }
  EXPECT_NE(ErrorAfter("\"clip_v2\": 1}", "\"clip_v2\": 1"), "");  // cut off
  std::ofstream(path()) << "[1, 2]";
  EXPECT_NE(Load(1, 4).status().message().find("expected an object"), std::string::npos);
}

TEST_F(CalibrationTest, UnreadableFileIsNotTheIdentity) {
  std::filesystem::create_directory(path());
  EXPECT_FALSE(Load(1, 4).ok());
}

}  // namespace
}  // namespace triaxial
