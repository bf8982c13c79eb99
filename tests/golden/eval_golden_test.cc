// `triaxial eval` on the pocket agent: steps rendered as the server would see them, and scores that make
// sense.
#include <gtest/gtest.h>

#include <cstdio>
#include <filesystem>
#include <fstream>

#include "apps/eval_report.h"
#include "calib/evaluate.h"

namespace triaxial {
namespace {

const std::string kModel = "models/pocket-agent";
const std::string kHeldout = "models/pocket-agent/trajectories/heldout.jsonl";

const ServedModel& Served() {
  static const auto* model = new ServedModel(LoadServedModel(kModel, "").value());
  return *model;
}

RecordedFile Recorded(size_t limit) {
  Result<RecordedFile> file = LoadRecorded(kHeldout, "", limit);
  EXPECT_TRUE(file.ok()) << file.status().message();
  return std::move(file).value();
}

std::string Text(const std::vector<int32_t>& tokens) { return Served().tokenizer->Decode(tokens, false); }

TEST(RecordedSteps, AreWhatTheServerWouldBeAskedAndTheModelWouldSay) {
  const Result<RecordedConversation> recorded = PrepareRecorded(Served(), Recorded(1), 0);
  ASSERT_TRUE(recorded.ok()) << recorded.status().message();
  EXPECT_EQ(recorded->id, "heldout-standard-000");
  ASSERT_EQ(recorded->steps.size(), 12u);
  const RecordedStep& first = recorded->steps[0];
  EXPECT_TRUE(Text(first.prompt.tokens).ends_with("<|im_start|>assistant\n<think>\n"));
  EXPECT_EQ(
      Text(first.output),
      "To read use load_path_97. The pin for files is 565451.\n</think>\n\n<tool_call>\n"
      "{\"name\": \"load_path_97\", \"arguments\": {\"file\": \"/data/plan.txt\", \"pin\": \"565451\"}}\n"
      "</tool_call><|im_end|>");
  EXPECT_TRUE(first.calls_tools);
  EXPECT_TRUE(Text({first.output.begin() + first.action, first.output.end()}).starts_with("\n\n<tool_call>"));
  ASSERT_EQ(first.tags.size(), first.output.size());
  EXPECT_EQ(Name(Tag::FromIndex(first.tags[0])), "current/text/reasoning");
  EXPECT_EQ(Name(Tag::FromIndex(first.tags[first.tags.size() / 2])), "current/text/tool_call");

  // The thought of the first answer is still there while the tool's response is read, and gone with the next
  // question of the user.
  const std::string thought = "To read use load_path_97. The pin";
  const auto thoughts = [&](size_t step) {
    const std::string prompt = Text(recorded->steps[step].prompt.tokens);
    size_t count = 0;
    for (size_t at = prompt.find(thought); at != std::string::npos; at = prompt.find(thought, at + 1))
      ++count;
    return count;
  };
  EXPECT_EQ(thoughts(0), 0u);
  EXPECT_EQ(thoughts(1), 1u);
  EXPECT_EQ(thoughts(2), 0u);
  // Pictures are shared between steps.
  EXPECT_EQ(first.prompt.images[0].patches.get(), recorded->steps[5].prompt.images[0].patches.get());
}

TEST(RecordedSteps, OthersStandInFrontAndAreOnlyRead) {
  const RecordedFile own = Recorded(3);
  RecordedFile file = own;
  const RecordedConversation alone = PrepareRecorded(Served(), file, 0).value();
  ASSERT_TRUE(PutBehind(2, &file).ok());
  const RecordedConversation behind = PrepareRecorded(Served(), file, 0).value();
  ASSERT_EQ(behind.steps.size(), alone.steps.size());
  EXPECT_EQ(behind.id, alone.id);
  const std::string prompt = Text(behind.steps[0].prompt.tokens);
  const auto place = [&](size_t line, const char* role) {
    for (const Json& message : own.lines[line].messages) {
      if (message["role"] != role) continue;
      const Json& content = message["content"];
      const std::string text =
          content.is_string() ? content.get<std::string>() : content.back()["text"].get<std::string>();
      return prompt.find(text);
    }
    return std::string::npos;
  };
  // Its own system prompt alone, then the questions of the second, the third, and its own.
  EXPECT_NE(place(0, "system"), std::string::npos);
  EXPECT_EQ(place(1, "system"), std::string::npos);
  EXPECT_LT(place(0, "system"), place(1, "user"));
  EXPECT_LT(place(1, "user"), place(2, "user"));
  EXPECT_LT(place(2, "user"), place(0, "user"));
  EXPECT_NE(place(0, "user"), std::string::npos);
  for (size_t i = 0; i < alone.steps.size(); ++i) {
    EXPECT_EQ(behind.steps[i].output, alone.steps[i].output) << i;
    EXPECT_GT(behind.steps[i].prompt.tokens.size(), alone.steps[i].prompt.tokens.size() + 1000) << i;
  }
  RecordedFile small = Recorded(2);
  EXPECT_EQ(PutBehind(2, &small).code(), Code::kInvalidArgument);
}

TEST(RecordedSteps, BadFilesGetAnAnswer) {
  const std::string path = (std::filesystem::temp_directory_path() / "triaxial_recorded.jsonl").string();
  const auto load = [&](const std::string& text) {
    std::ofstream(path) << text;
    return LoadRecorded(path, "", 0);
  };
  const auto message = [](const Status& status) { return status.message(); };
  EXPECT_NE(message(load("").status()).find("holds no conversation"), std::string::npos);
  EXPECT_NE(message(load("{}\n").status()).find("line 1 has no list of messages"), std::string::npos);
  EXPECT_NE(message(load("\n\n{]\n").status()).find("line 3"), std::string::npos);
  EXPECT_FALSE(LoadRecorded("no-such-file.jsonl", "", 0).ok());
  const auto prepare = [&](const std::string& text) {
    const Result<RecordedFile> file = load(text);
    EXPECT_TRUE(file.ok());
    return message(PrepareRecorded(Served(), *file, 0).status());
  };
  EXPECT_NE(prepare(R"({"messages": [{"role": "user", "content": "a"}]})").find("says nothing"),
            std::string::npos);
  EXPECT_NE(message(load(R"({"messages": 3, "id": "x"})").status()).find("line 1"), std::string::npos);
  EXPECT_NE(prepare(R"({"messages": [{"role": "pope"}], "id": "x"})").find("(x)"), std::string::npos);
  EXPECT_NE(
      prepare(
          R"({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "no.png"}}]},)"
          R"({"role": "assistant", "content": "b"}]})")
          .find("image 0"),
      std::string::npos);
  std::string words;
  for (int i = 0; i < 40000; ++i) words += " a";
  EXPECT_NE(prepare(R"({"messages": [{"role": "user", "content": ")" + words +
                    R"("}, {"role": "assistant", "content": "b"}]})")
                .find("tokens"),
            std::string::npos);
  std::filesystem::remove(path);
}

Evaluation EvaluateHeldout(const std::string& policies, size_t conversations, const ReplayOptions& replay) {
  EvalOptions options;
  options.replay = replay;
  Result<Evaluation> evaluation = Evaluate(Served(), Recorded(conversations),
                                           ParseEvalPolicies(policies, Codec::kRotated).value(), options);
  EXPECT_TRUE(evaluation.ok()) << evaluation.status().message();
  return std::move(evaluation).value();
}

TEST(Evaluate, Bf16AgreesWithItselfAndFewBitsCostLittle) {
  const Evaluation evaluation = EvaluateHeldout("bf16,int4,int2@paper,bf16@rotated", 2, {});
  ASSERT_EQ(evaluation.policies.size(), 4u);
  // Run beside the others; `bf16` is the reference itself.
  const Fidelity& bf16 = evaluation.policies[3].fidelity;
  EXPECT_LT(evaluation.policies[0].fidelity.kl_mean, 1e-10);
  EXPECT_EQ(evaluation.policies[0].fidelity.kv_bytes, bf16.kv_bytes);
  EXPECT_EQ(evaluation.policies[0].fidelity.all_exact, bf16.all_exact);
  EXPECT_EQ(bf16.top1_agreement, 1);
  EXPECT_LT(bf16.kl_mean, 1e-7);
  EXPECT_EQ(bf16.action_match, 1);
  EXPECT_EQ(bf16.episode_exact, 1);
  EXPECT_GT(bf16.effective_bits, 16);  // the tail's room
  const Fidelity& int4 = evaluation.policies[1].fidelity;
  EXPECT_GT(int4.kl_mean, bf16.kl_mean);
  EXPECT_LT(int4.kl_mean, 1e-3);
  EXPECT_GT(int4.effective_bits, 4.25);
  EXPECT_LT(int4.kv_bytes, bf16.kv_bytes / 2);
  const Fidelity& int2 = evaluation.policies[2].fidelity;
  EXPECT_GT(int2.kl_mean, int4.kl_mean);
  EXPECT_GT(int2.effective_bits, 3);
  EXPECT_GE(int2.action_match, 0.9);

  // Attention's outputs: those of the reference are itself; others err as their bits say, whatever the
  // codec's basis is, and every token that was computed asked once.
  const auto outputs = [&](size_t i) -> const OutputErrors& { return evaluation.policies[i].outputs; };
  ASSERT_EQ(evaluation.layers, (std::vector<int>{0, 2, 3, 5}));
  EXPECT_EQ(outputs(0).Relative(), 0);
  EXPECT_LT(outputs(3).Relative(), 1e-4);
  EXPECT_GT(outputs(1).Relative(), 1e-4);
  EXPECT_LT(outputs(1).Relative(), 0.05);
  EXPECT_GT(outputs(2).Relative(), 2 * outputs(1).Relative());
  EXPECT_LT(outputs(2).Relative(), 1);
  EXPECT_EQ(outputs(1).queries, outputs(2).queries);
  int64_t queries = 0;
  for (const int64_t count : outputs(1).queries) queries += count;
  EXPECT_GT(queries, bf16.tokens);
}

// The figures must not depend on which policies run side by side, nor on how many fit.
TEST(Evaluate, PoliciesDoNotDisturbEachOther) {
  const Evaluation together = EvaluateHeldout("int4,int2,paper", 1, {.chunk = 200, .max_rows = 450});
  const Evaluation alone = EvaluateHeldout("int2", 1, {.chunk = 200, .max_rows = 200});
  const Fidelity& a = together.policies[2].fidelity;
  const Fidelity& b = alone.policies[1].fidelity;
  EXPECT_EQ(together.policies[2].policy.name, "int2");
  EXPECT_EQ(a.kv_bytes, b.kv_bytes);
  EXPECT_NEAR(a.kl_mean, b.kl_mean, 0.02 * b.kl_mean);
}

TEST(EvaluationJson, HasTheKeysThatOthersRead) {
  const Json json = EvaluationJson(EvaluateHeldout("int2", 1, {}), "pocket-agent", kHeldout);
  ASSERT_EQ(json["policies"].size(), 2u);
  EXPECT_EQ(json["layers"], Json({0, 2, 3, 5}));
  const Json& reasoning = json["policies"][1]["attention_error"]["by_tag"]["current/text/reasoning"];
  EXPECT_GT(reasoning["queries"], 50);
  EXPECT_GT(reasoning["relative"], 0);
  EXPECT_EQ(json["policies"][0]["name"], "bf16");
  for (const Json& policy : json["policies"]) {
    for (const char* key : {"effective_bits", "kv_bytes", "action_match", "episode_exact", "top1_agreement",
                            "kl_mean", "kl_p99", "perplexity"}) {
      EXPECT_TRUE(policy[key].is_number()) << key;
    }
    EXPECT_LE(policy["episode_all_tokens_exact"], policy["episode_exact"]);
    EXPECT_EQ(policy["attention_error"]["relative"] > 0, policy["name"] != "bf16");
    for (const char* key : {"action_match_ci", "episode_exact_ci", "episode_all_tokens_exact_ci"}) {
      ASSERT_EQ(policy[key].size(), 2u);
      EXPECT_LE(policy[key][0], policy[key][1]);
    }
  }
}

}  // namespace
}  // namespace triaxial
