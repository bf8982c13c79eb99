// Calibration end to end on the pocket agent, and what it answers to inputs that are not as hoped.
#include "calib/calibrate.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstdio>
#include <filesystem>
#include <fstream>

#include "calib/allocate.h"
#include "calib/compare.h"

namespace triaxial {
namespace {

constexpr const char* kModel = "models/pocket-agent";
constexpr const char* kEpisodes = "models/pocket-agent/episodes/heldout.jsonl";

class CalibrateTest : public testing::Test {
 protected:
  static void SetUpTestSuite() {
    Result<ServedModel> model = LoadServedModel(kModel, "");
    ASSERT_TRUE(model.ok()) << model.status().message();
    model_ = new ServedModel(std::move(*model));
  }
  static void TearDownTestSuite() {
    delete model_;
    model_ = nullptr;
  }
  void TearDown() override {
    for (const std::string& path : files_) std::remove(path.c_str());
  }

  std::string Write(const std::string& name, const std::string& text) {
    files_.push_back(testing::TempDir() + "/triaxial_calibrate_" + name);
    std::ofstream(files_.back(), std::ios::binary) << text;
    return files_.back();
  }
  static std::unique_ptr<SensitivityMeter> Meter(const SensitivityOptions& options) {
    auto meter =
        SensitivityMeter::Create(kModel, {.precision = Precision::kF32}, model_->preprocessor, options);
    EXPECT_TRUE(meter.ok()) << meter.status().message();
    return meter.ok() ? std::move(*meter) : nullptr;
  }
  static Result<SensitivityProfile> Measure(const std::string& path, const CalibrationOptions& options,
                                            SensitivityMeter* meter) {
    ASSIGN_OR_RETURN(const Trajectories trajectories, Trajectories::Open({path}));
    ASSIGN_OR_RETURN(const Json provenance, ProvenanceOf(*model_, *meter, {path}, options));
    return Calibrate(*model_, trajectories, provenance, options, meter);
  }
  static std::string TextConversation(const std::string& text) {
    return Json{{"messages", Json::array({Json{{"role", "user"}, {"content", text}}})}}.dump() + "\n";
  }

  static inline ServedModel* model_ = nullptr;
  std::vector<std::string> files_;
};

size_t Index(Format format) { return static_cast<size_t>(format); }

TEST_F(CalibrateTest, InterruptedAndResumedIsTheSameAsInOneGo) {
  SensitivityOptions method;
  method.layers = {2};
  const auto meter = Meter(method);
  ASSERT_NE(meter, nullptr);
  CalibrationOptions options;
  options.max_conversations = 3;
  options.max_tokens = 300;
  options.seed = 5;
  const Result<SensitivityProfile> whole = Measure(kEpisodes, options, meter.get());
  ASSERT_TRUE(whole.ok()) << whole.status().message();
  EXPECT_EQ(whole->conversations, 3);
  EXPECT_EQ(whole->length, 900);

  options.checkpoint = Write("resume.partial", "");
  std::remove(options.checkpoint.c_str());
  options.progress = [](double fraction) { return fraction < 0.6; };
  const Result<SensitivityProfile> interrupted = Measure(kEpisodes, options, meter.get());
  ASSERT_FALSE(interrupted.ok());
  EXPECT_EQ(interrupted.status().code(), Code::kCancelled);
  ASSERT_TRUE(std::filesystem::exists(options.checkpoint));

  options.resume = true;
  double first = -1;
  options.progress = [&](double fraction) {
    if (first < 0) first = fraction;
    return true;
  };
  CalibrationOptions other = options;
  other.seed = 6;
  const Result<SensitivityProfile> mixed = Measure(kEpisodes, other, meter.get());
  ASSERT_FALSE(mixed.ok());
  EXPECT_NE(mixed.status().message().find("another seed"), std::string::npos) << mixed.status().message();

  const Result<SensitivityProfile> resumed = Measure(kEpisodes, options, meter.get());
  ASSERT_TRUE(resumed.ok()) << resumed.status().message();
  EXPECT_GT(first, 0.3) << "what was done is not done again";
  EXPECT_EQ(*resumed, *whole);
  EXPECT_FALSE(std::filesystem::exists(options.checkpoint));
}

TEST_F(CalibrateTest, PoliciesSayWhatWasMeasured) {
  const auto meter = Meter({});
  ASSERT_NE(meter, nullptr);
  EXPECT_EQ(meter->options().layers, (std::vector<int>{0, 1, 2, 3, 4, 5}));
  CalibrationOptions options;
  options.max_conversations = 2;
  options.max_tokens = 700;
  const Result<SensitivityProfile> profile = Measure(kEpisodes, options, meter.get());
  ASSERT_TRUE(profile.ok()) << profile.status().message();
  const Result<Json> provenance = ProvenanceOf(*model_, *meter, {kEpisodes}, options);
  ASSERT_TRUE(provenance.ok());
  const Result<Policy> policy = MakePricedPolicy(*profile, "mine", 2.8, *provenance);
  ASSERT_TRUE(policy.ok()) << policy.status().message();
  const Result<Policy> again = ParsePolicy(PolicyToJson(*policy), "mine");
  ASSERT_TRUE(again.ok()) << again.status().message();
  EXPECT_EQ(again->distortion, policy->distortion);
  EXPECT_EQ(again->provenance["model"], "pocket-agent");
  EXPECT_EQ(again->provenance["conversations"], 2);
  EXPECT_EQ(again->provenance["data_hash"].get<std::string>().size(), 32u);

  // 4 bits lose less than 2 wherever there is something to lose, and counts times losses are the measured
  // means.
  double predicted = 0;
  double measured = 0;
  for (size_t t = 0; t < kTags; ++t) {
    if (profile->tokens[t] <= 0) continue;
    EXPECT_LT(policy->distortion[t][Index(Format::kK4V4)], policy->distortion[t][Index(Format::kK2V2)])
        << Name(Tag::FromIndex(static_cast<int>(t)));
    predicted += policy->counts[t] * policy->distortion[t][Index(Format::kK4V4)];
    measured += profile->loss[t][Index(Format::kK4V4)] / profile->conversations;
  }
  EXPECT_NEAR(predicted, measured, 1e-5 * measured);
  EXPECT_GT(again->provenance["unmeasured"].size(), 20u);
  EXPECT_EQ(again->provenance["unmeasured"]["older/image/inst"], "mean");

  // Calibrated on the same data again, nothing has moved.
  const Result<Drift> drift = MeasureDrift(*policy, *profile, meter->model().geometry());
  ASSERT_TRUE(drift.ok()) << drift.status().message();
  EXPECT_NEAR(drift->median_ratio, 1, 1e-6);
  EXPECT_NEAR(drift->rank_correlation, 1, 1e-9);
  EXPECT_FALSE(MeasureDrift(*LoadPolicy("paper"), *profile, meter->model().geometry()).ok());

  const std::array<Format, kTags> rest = FormatsAtRest(*policy, meter->model().geometry());
  const Policy fixed = MakeFixedPolicy(*policy, rest);
  EXPECT_EQ(fixed.table, rest);
  EXPECT_EQ(ParsePolicy(PolicyToJson(fixed), "fixed")->table, rest);
}

// Against tools/reference/calibration_reference.py (float64, o_proj read from the checkpoint), which checked
// a dump of this conversation: --max-conversations 1 --max-tokens 400 --layers 2 --metric output.
TEST_F(CalibrateTest, ErrorsBehindTheOutputProjectionEqualTheReference) {
  SensitivityOptions method;
  method.layers = {1, 4};
  method.metric = Metric::kOutput;
  method.aggregate = Aggregate::kMean;
  method.tags_at = TagTime::kTurn;
  const auto meter = Meter(method);
  ASSERT_NE(meter, nullptr);
  CalibrationOptions options;
  options.max_conversations = 1;
  options.max_tokens = 400;
  options.seed = 1;
  const Result<SensitivityProfile> profile =
      Measure("models/pocket-agent/trajectories/calibration.jsonl", options, meter.get());
  ASSERT_TRUE(profile.ok()) << profile.status().message();
  const auto expect = [&](Semantic semantic, Format format, double loss) {
    const Tag tag{Temporal::kCurrent, Modal::kText, semantic};
    EXPECT_NEAR(profile->loss[static_cast<size_t>(tag.index())][Index(format)], loss, 0.01 * loss)
        << Name(tag) << " " << Name(format);
  };
  expect(Semantic::kDelim, Format::kK2V2, 1.192883e-02);
  expect(Semantic::kDelim, Format::kK4V2, 7.097618e-03);
  expect(Semantic::kDelim, Format::kK4V4, 6.656706e-04);
  expect(Semantic::kInst, Format::kK2V2, 6.640450e-01);
  expect(Semantic::kInst, Format::kK4V2, 2.105344e-01);
  expect(Semantic::kInst, Format::kK4V4, 3.748941e-02);
}

TEST_F(CalibrateTest, DivergenceOfPredictionsAgreesOnWhatMatters) {
  SensitivityOptions options;
  options.metric = Metric::kKl;
  const auto meter = Meter(options);
  ASSERT_NE(meter, nullptr);
  const std::string path = Write("kl.jsonl", TextConversation("open the window and close it"));
  const Result<SensitivityProfile> profile = Measure(path, {}, meter.get());
  ASSERT_TRUE(profile.ok()) << profile.status().message();
  double least = 0;
  double most = 0;
  for (size_t t = 0; t < kTags; ++t) {
    least += profile->loss[t][Index(Format::kK4V4)];
    most += profile->loss[t][Index(Format::kK2V2)];
    EXPECT_EQ(profile->loss[t][Index(Format::kBf16)], 0);
  }
  EXPECT_GT(most, 2 * least);
  EXPECT_GT(least, 0);
  options.tags_at = TagTime::kTurn;
  const auto refused = SensitivityMeter::Create(kModel, {}, model_->preprocessor, options);
  ASSERT_FALSE(refused.ok());
  EXPECT_NE(refused.status().message().find("once for each tag"), std::string::npos);
}

TEST_F(CalibrateTest, ConversationsLongerThanTheModelAreCutWithANotice) {
  SensitivityOptions method;
  method.layers = {0};
  const auto meter = Meter(method);
  ASSERT_NE(meter, nullptr);
  CalibrationOptions options;
  options.max_conversations = 1;
  options.max_tokens = 120;
  std::vector<std::string> notices;
  options.notice = [&](const std::string& notice) { notices.push_back(notice); };
  const Result<SensitivityProfile> profile = Measure(kEpisodes, options, meter.get());
  ASSERT_TRUE(profile.ok());
  EXPECT_LE(profile->length, 120);
  ASSERT_EQ(notices.size(), 1u);
  EXPECT_NE(notices[0].find("only the first"), std::string::npos) << notices[0];
}

TEST_F(CalibrateTest, PromptsAreCutBeforeAPictureThatDoesNotFit) {
  Prompt prompt;
  prompt.tokens.assign(100, 1);
  prompt.spans = {{0, 30, 0, 0}, {30, 90, 0, 0, Modal::kImage, Semantic::kObs}, {90, 100, 0, 1}};
  prompt.images.push_back({30, 60, nullptr});
  Prompt cut = prompt;
  EXPECT_FALSE(CutPrompt(100, &cut));
  EXPECT_TRUE(CutPrompt(95, &cut));
  EXPECT_EQ(cut.tokens.size(), 95u);
  EXPECT_EQ(cut.spans.back().end, 95);
  EXPECT_EQ(cut.images.size(), 1u);
  EXPECT_TRUE(CutPrompt(60, &cut));
  EXPECT_EQ(cut.tokens.size(), 30u);
  EXPECT_EQ(cut.spans.size(), 1u);
  EXPECT_TRUE(cut.images.empty());
}

TEST_F(CalibrateTest, FilesWithoutConversationsAreSaidToBe) {
  const auto error = [](const std::string& path) {
    const Result<Trajectories> trajectories = Trajectories::Open({path});
    EXPECT_FALSE(trajectories.ok());
    return trajectories.ok() ? "" : trajectories.status().message();
  };
  EXPECT_NE(error(Write("empty.jsonl", "")).find("holds no conversation"), std::string::npos);
  EXPECT_NE(error(Write("blank.jsonl", "\n  \n\r\n")).find("holds no conversation"), std::string::npos);
  EXPECT_NE(error("/nonexistent.jsonl").find("cannot open"), std::string::npos);
  EXPECT_NE(error(testing::TempDir()).find("cannot open"), std::string::npos);
  for (
      const auto& [line, says] : std::vector<std::pair<std::string, std::string>>{
          {"{", "line 3"},
          {"[]", "messages is missing"},
          {"7", "no list of messages"},
          {R"({"messages": []})", "line 3"},
          {R"({"messages": [{"role": "king", "content": "x"}]})", "role"},
          {R"({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "no.png"}}]}]})",
           "no.png"}}) {
    const Result<Trajectories> trajectories =
        Trajectories::Open({Write("bad.jsonl", TextConversation("hi") + "\n" + line + "\n")});
    ASSERT_TRUE(trajectories.ok());
    ASSERT_EQ(trajectories->size(), 2u);
    EXPECT_TRUE(trajectories->Read(0, *model_).ok());
    const Result<Prompt> prompt = trajectories->Read(1, *model_);
    ASSERT_FALSE(prompt.ok()) << line;
    EXPECT_NE(prompt.status().message().find(says), std::string::npos) << prompt.status().message();
    EXPECT_NE(prompt.status().message().find("line 3"), std::string::npos) << prompt.status().message();
  }
}

TEST_F(CalibrateTest, CheckpointsThatAreNoneAreRefused) {
  SensitivityOptions method;
  method.layers = {0};
  const auto meter = Meter(method);
  ASSERT_NE(meter, nullptr);
  CalibrationOptions options;
  options.resume = true;
  for (const char* text : {"", "{}", "[1]", R"({"provenance": {}, "profile": {}, "done": 99})"}) {
    options.checkpoint = Write("bad.partial", text);
    const Result<SensitivityProfile> profile = Measure(kEpisodes, options, meter.get());
    ASSERT_FALSE(profile.ok()) << text;
    EXPECT_NE(profile.status().message().find("bad.partial"), std::string::npos)
        << profile.status().message();
  }
}

TEST(ConversationsTest, AreChosenByTheSeedAlone) {
  const std::vector<size_t> all = ChooseConversations(50, 0, 3);
  EXPECT_EQ(std::vector<size_t>(all.begin(), all.begin() + 10), ChooseConversations(50, 10, 3));
  EXPECT_NE(all, ChooseConversations(50, 0, 4));
  std::vector<size_t> sorted = all;
  std::sort(sorted.begin(), sorted.end());
  for (size_t i = 0; i < 50; ++i) EXPECT_EQ(sorted[i], i);
}

TEST(LayersTest, AreSpreadEvenly) {
  EXPECT_EQ(SpreadLayers(6, 0).size(), 6u);
  EXPECT_EQ(SpreadLayers(64, 0), (std::vector<int>{8, 24, 40, 56}));
  EXPECT_EQ(SpreadLayers(6, 2), (std::vector<int>{1, 4}));
  EXPECT_EQ(SpreadLayers(3, 9).size(), 3u);
}

TEST(LossTableTest, TagsNeverSeenTakeTheNearestThenTheMean) {
  SensitivityProfile profile;
  const auto set = [&](Temporal age, Semantic semantic, double tokens, double loss) {
    const auto t = static_cast<size_t>(Tag{age, Modal::kText, semantic}.index());
    profile.tokens[t] = tokens;
    profile.loss[t] = {};
    for (int f = 0; f < kFormats - 1; ++f) profile.loss[t][static_cast<size_t>(f)] = loss / (1 + f);
  };
  set(Temporal::kCurrent, Semantic::kObs, 10, 50);
  set(Temporal::kM2, Semantic::kObs, 30, 30);
  // A format that loses more than one of fewer bits.
  const auto odd = static_cast<size_t>(Tag{Temporal::kCurrent, Modal::kText, Semantic::kObs}.index());
  profile.loss[odd][Index(Format::kK4V2)] = 60;
  profile.conversations = 1;
  const Result<LossTable> table = MakeLossTable(profile);
  ASSERT_TRUE(table.ok());
  const auto loss = [&](Temporal age, Modal modal, Semantic semantic) {
    return table->per_token[static_cast<size_t>(Tag{age, modal, semantic}.index())][0];
  };
  EXPECT_EQ(loss(Temporal::kM1, Modal::kText, Semantic::kObs), 5) << "of two as near, the more recent";
  EXPECT_EQ(loss(Temporal::kOlder, Modal::kText, Semantic::kObs), 1);
  EXPECT_EQ(loss(Temporal::kM1, Modal::kImage, Semantic::kObs), 2) << "80 over 40 tokens";
  EXPECT_EQ(table->fallbacks.size(), static_cast<size_t>(kTags) - 2);
  ASSERT_EQ(table->not_falling.size(), 1u);
  EXPECT_EQ(table->not_falling[0], static_cast<int>(odd));
  EXPECT_EQ(table->per_token[odd][Index(Format::kK4V2)], 5);
  EXPECT_FALSE(MakeLossTable({}).ok());
}

TEST(RankCorrelationTest, CountsOrderOnly) {
  EXPECT_DOUBLE_EQ(RankCorrelation({1, 2, 3, 4}, {10, 100, 1000, 1e6}), 1);
  EXPECT_DOUBLE_EQ(RankCorrelation({1, 2, 3, 4}, {4, 3, 2, 1}), -1);
  EXPECT_DOUBLE_EQ(RankCorrelation({1, 2, 3}, {1, 1, 1}), 1) << "nothing to rank";
  EXPECT_NEAR(RankCorrelation({1, 2, 3, 4}, {1, 3, 2, 4}), 0.8, 1e-12);
}

TEST(FormatsAtRestTest, ABudgetTooSmallTakesTheFewestBits) {
  const Result<Json> json = ParseJson(R"({"version": 1, "name": "a", "distortion": {"*/*/*": {"k2v2": 1}},
      "counts": {"older/text/obs": 1}, "budget_bits": 1.5, "pins": [{"match": "*/*/inst", "format": "k4v4"}]})",
                                      "a");
  const Result<Policy> policy = ParsePolicy(*json, "a");
  ASSERT_TRUE(policy.ok()) << policy.status().message();
  const auto formats = FormatsAtRest(*policy, GeometryOf(*policy));
  EXPECT_EQ(formats[0], Format::kK4V4) << "current/text/inst is pinned";
  EXPECT_EQ(formats[static_cast<size_t>(Tag{Temporal::kOlder, Modal::kText, Semantic::kObs}.index())],
            Format::kK2V2);
}

}  // namespace
}  // namespace triaxial
