// The engine with the pocket agent, from conversations to text: alone, batched, quantized.
// tests/data/e2e/README.md describes the data.
#include <gtest/gtest.h>

#include <cstdlib>
#include <future>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "base/file.h"
#include "base/json.h"
#include "engine/engine.h"
#include "kv/policy.h"
#include "serve/served_model.h"
#ifdef TRIAXIAL_CUDA
#include "ops/cuda/device.h"
#endif

namespace triaxial {
namespace {

const std::string kModel = "models/pocket-agent";
const std::string kData = "tests/data/e2e/";
constexpr int kMaxTokens = 64;  // of the recorded continuations

struct Case {
  std::string name;
  std::string greedy_text;
  int n_tokens = 0;
  Prompt prompt;
  bool starts_in_thought = false;
};

struct Answer {
  std::string text;
  RequestStats stats;
};

const ServedModel& Served() {
  static const ServedModel* model = [] {
    Result<ServedModel> loaded = LoadServedModel(kModel, "");
    EXPECT_TRUE(loaded.ok()) << loaded.status().message();
    return new ServedModel(std::move(loaded).value());
  }();
  return *model;
}

std::vector<Case> LoadCases() {
  std::vector<Case> cases;
  Result<std::string> lines = ReadFile(kData + "pocket_greedy.jsonl", size_t{1} << 24);
  EXPECT_TRUE(lines.ok()) << lines.status().message();
  std::istringstream stream(*lines);
  for (std::string line; std::getline(stream, line);) {
    const Json json = ParseJson(line, "a line of pocket_greedy.jsonl").value();
    Result<Conversation> conversation = ParseConversation(json["messages"], json["tools"]);
    EXPECT_TRUE(conversation.ok()) << conversation.status().message();
    const TemplateOptions options;
    Result<Prompt> prompt = BuildChatPrompt(Served(), *conversation, options, ImageFromFiles(kData));
    EXPECT_TRUE(prompt.ok()) << prompt.status().message();
    cases.push_back({json["name"], json["greedy_text"], json["n_tokens"], *prompt,
                     Served().chat_template->GenerationStartsInThought(options)});
  }
  EXPECT_EQ(cases.size(), 12u);
  return cases;
}

const std::vector<Case>& Cases() {
  static const auto* cases = new std::vector<Case>(LoadCases());
  return *cases;
}

std::unique_ptr<Engine> Start(const std::string& policy, Precision precision, Codec codec,
                              int max_step_tokens, Device device = Device::kCpu) {
  Result<std::unique_ptr<Model>> model =
      Model::Load(kModel, {.device = device, .precision = precision, .dummy_weights = false, .codec = codec});
  EXPECT_TRUE(model.ok()) << model.status().message();
  EngineOptions options;
  options.policy = LoadPolicy(policy).value();
  options.kv_memory = int64_t{256} << 20;
  options.max_step_tokens = max_step_tokens;
  Result<std::unique_ptr<Engine>> engine = Engine::Create(std::move(model).value(), Served().preprocessor,
                                                          Served().generation, Served().markup, options);
  EXPECT_TRUE(engine.ok()) << engine.status().message();
  return std::move(engine).value();
}

std::future<Answer> Ask(Engine* engine, const Case& c) {
  struct State {
    std::vector<int32_t> tokens;
    std::promise<Answer> answer;
  };
  auto state = std::make_shared<State>();
  Request request;
  request.prompt = c.prompt;
  request.starts_in_thought = c.starts_in_thought;
  request.sampling.max_tokens = kMaxTokens;
  request.on_event = [state](TokenEvent&& event) {
    if (event.token >= 0) state->tokens.push_back(event.token);
    if (event.finish == FinishReason::kNone) return;
    EXPECT_TRUE(event.error.ok()) << event.error.message();
    state->answer.set_value({Served().tokenizer->Decode(state->tokens, /*skip_special=*/false), event.stats});
  };
  std::future<Answer> answer = state->answer.get_future();
  const Result<RequestId> id = engine->Submit(std::move(request));
  EXPECT_TRUE(id.ok()) << id.status().message();
  return answer;
}

std::vector<Answer> AskAll(Engine* engine, bool together) {
  std::vector<Answer> answers;
  std::vector<std::future<Answer>> pending;
  for (const Case& c : Cases()) {
    pending.push_back(Ask(engine, c));
    if (!together) pending.back().wait();
  }
  for (std::future<Answer>& answer : pending) answers.push_back(answer.get());
  engine->Drain(10);
  EXPECT_EQ(engine->Snapshot().kv_usage, 0) << "what is left is cached, and nobody's";
  return answers;
}

TEST(EngineGolden, GreedyAnswersEqualTheReferenceAlone) {
  const auto engine = Start("bf16", Precision::kF32, Codec::kRotated, 512);
  const std::vector<Answer> answers = AskAll(engine.get(), /*together=*/false);
  for (size_t i = 0; i < answers.size(); ++i) {
    EXPECT_EQ(answers[i].text, Cases()[i].greedy_text) << Cases()[i].name;
    EXPECT_EQ(answers[i].stats.prompt_tokens, Cases()[i].n_tokens);
  }
}

TEST(EngineGolden, GreedyAnswersEqualTheReferenceInABatch) {
  // Steps of 90 rows cut every prompt and every image, and mix decode rows with them.
  const auto engine = Start("bf16", Precision::kF32, Codec::kRotated, 90);
  const std::vector<Answer> answers = AskAll(engine.get(), /*together=*/true);
  for (size_t i = 0; i < answers.size(); ++i) {
    EXPECT_EQ(answers[i].text, Cases()[i].greedy_text) << Cases()[i].name;
  }
}

// This model hardly suffers from few bits: most answers stay what they were, in less than a third of the
// bytes.
TEST(EngineGolden, QuantizedAnswersStayClose) {
  for (const Codec codec : {Codec::kRotated, Codec::kPaper}) {
    const auto engine = Start("paper", Precision::kBf16, codec, 512);
    const std::vector<Answer> answers = AskAll(engine.get(), /*together=*/true);
    int equal = 0;
    for (size_t i = 0; i < answers.size(); ++i) {
      equal += answers[i].text == Cases()[i].greedy_text;
      const KvUsage& kv = answers[i].stats.kv;
      EXPECT_EQ(kv.tokens[static_cast<size_t>(Format::kBf16)], kv.tail_tokens);
      const double without_tail = 16.0 * static_cast<double>(kv.total_bytes() - kv.tail_bytes) /
                                  static_cast<double>(Bf16KvBytesPerToken(Served().config.text)) /
                                  static_cast<double>(kv.total_tokens() - kv.tail_tokens);
      EXPECT_LT(without_tail, 5.01);
      EXPECT_GT(without_tail, 2.2);
    }
    EXPECT_GE(equal, 10) << Name(codec);
  }
}

#ifdef TRIAXIAL_CUDA

// On a machine with a GPU; without one they are skipped, unless it is said that there must be one.
class GpuEngineGolden : public testing::Test {
 protected:
  void SetUp() override {
    std::string why;
    if (cuda::FindDevice(&why)) return;
    if (std::getenv("TRIAXIAL_REQUIRE_GPU") != nullptr) FAIL() << why;
    GTEST_SKIP() << why;
  }
  static int CountEqual(const std::vector<Answer>& answers) {
    int equal = 0;
    for (size_t i = 0; i < answers.size(); ++i) equal += answers[i].text == Cases()[i].greedy_text;
    return equal;
  }
};

// In BF16, ties within its rounding may turn; the tokens are chosen on the GPU.
TEST_F(GpuEngineGolden, GreedyAnswersAloneAndInABatch) {
  for (const Codec codec : {Codec::kRotated, Codec::kPaper}) {
    for (const bool together : {false, true}) {
      const auto engine = Start("bf16", Precision::kBf16, codec, together ? 90 : 512, Device::kCuda);
      EXPECT_GE(CountEqual(AskAll(engine.get(), together)), 11) << Name(codec) << together;
    }
  }
}

TEST_F(GpuEngineGolden, QuantizedAnswersStayClose) {
  for (const Codec codec : {Codec::kRotated, Codec::kPaper}) {
    const auto engine = Start("paper", Precision::kBf16, codec, 512, Device::kCuda);
    EXPECT_GE(CountEqual(AskAll(engine.get(), /*together=*/true)), 10) << Name(codec);
  }
}

#endif  // TRIAXIAL_CUDA

}  // namespace
}  // namespace triaxial
