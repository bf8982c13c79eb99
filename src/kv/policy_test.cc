#include "kv/policy.h"

#include <gtest/gtest.h>

#include <cstdio>
#include <fstream>
#include <string>
#include <vector>

namespace triaxial {
namespace {

constexpr Format k2 = Format::kK2V2, k42 = Format::kK4V2, k4 = Format::kK4V4, k16 = Format::kBf16;

Policy Load(const std::string& name) {
  Result<Policy> policy = LoadPolicy(name);
  EXPECT_TRUE(policy.ok()) << policy.status().message();
  return policy.ok() ? *policy : Policy{};
}

Result<Policy> Parse(const std::string& text) {
  Result<Json> json = ParseJson(text, "my.json");
  EXPECT_TRUE(json.ok()) << text;
  return json.ok() ? ParsePolicy(*json, "my.json") : Result<Policy>(json.status());
}

Result<Policy> ParseRules(const std::string& rules) {
  return Parse(R"({"version": 1, "name": "mine", "rules": )" + rules + "}");
}

std::string ErrorOf(const Result<Policy>& policy) {
  EXPECT_FALSE(policy.ok());
  if (policy.ok()) return "";
  EXPECT_EQ(policy.status().code(), Code::kInvalidArgument);
  EXPECT_EQ(policy.status().message().find('\n'), std::string::npos);
  return policy.status().message();
}

Format Of(const Policy& policy, Temporal t, Modal m, Semantic s) { return policy.FormatOf({t, m, s}); }

TEST(PolicyTest, UniformBuiltins) {
  EXPECT_EQ(BuiltinPolicies(),
            (std::vector<std::string_view>{"bf16", "fp8", "int4", "int2", "kivi", "paper"}));
  const std::vector<std::pair<std::string, Format>> uniform = {
      {"bf16", k16}, {"int4", k4}, {"int2", k2}, {"kivi", k2}};
  for (const auto& [name, format] : uniform) {
    const Policy policy = Load(name);
    EXPECT_EQ(policy.name, name);
    for (int i = 0; i < kTags; ++i) EXPECT_EQ(policy.FormatOf(Tag::FromIndex(i)), format) << name;
    EXPECT_EQ(policy.recent_window, name == "kivi" ? 128 : 0);
  }
}

TEST(PolicyTest, PaperKeepsStructureAndTheCurrentTurnsTextAtFourBits) {
  const Policy paper = Load("paper");
  for (int i = 0; i < kTags; ++i) {
    const Tag tag = Tag::FromIndex(i);
    const bool structural = tag.semantic == Semantic::kInst || tag.semantic == Semantic::kDelim ||
                            tag.semantic == Semantic::kToolCall;
    const bool current_text = tag.temporal == Temporal::kCurrent && tag.modal == Modal::kText;
    EXPECT_EQ(paper.FormatOf(tag), structural || current_text ? k4 : k2) << Name(tag);
  }
}

TEST(PolicyTest, FirstMatchWinsAndPatternsCombine) {
  Result<Policy> parsed = ParseRules(R"([
      {"match": "{current,m1}/image/obs", "format": "k4v4"},
      {"match": "*/image/*", "format": "k2v2"},
      {"match": "older/text/{user,assistant}", "format": "k4v2"},
      {"match": "*/*/*", "format": "bf16"}])");
  ASSERT_TRUE(parsed.ok()) << parsed.status().message();
  EXPECT_EQ(Of(*parsed, Temporal::kCurrent, Modal::kImage, Semantic::kObs), k4);
  EXPECT_EQ(Of(*parsed, Temporal::kM1, Modal::kImage, Semantic::kObs), k4);
  EXPECT_EQ(Of(*parsed, Temporal::kM2, Modal::kImage, Semantic::kObs), k2);
  EXPECT_EQ(Of(*parsed, Temporal::kCurrent, Modal::kImage, Semantic::kUser), k2);
  EXPECT_EQ(Of(*parsed, Temporal::kOlder, Modal::kText, Semantic::kUser), k42);
  EXPECT_EQ(Of(*parsed, Temporal::kOlder, Modal::kText, Semantic::kReasoning), k16);
  EXPECT_EQ(Of(*parsed, Temporal::kM2, Modal::kText, Semantic::kUser), k16);
}

TEST(PolicyTest, JsonRoundTrips) {
  for (const std::string_view name : BuiltinPolicies()) {
    const Policy policy = Load(std::string(name));
    const Json json = PolicyToJson(policy);
    const Result<Policy> again = ParsePolicy(json, "round trip");
    ASSERT_TRUE(again.ok()) << again.status().message();
    EXPECT_EQ(again->name, policy.name);
    EXPECT_EQ(again->description, policy.description);
    EXPECT_EQ(again->recent_window, policy.recent_window);
    EXPECT_EQ(again->table, policy.table);
    EXPECT_EQ(PolicyToJson(*again), json);
  }
}

TEST(PolicyTest, EveryMistakeHasItsOwnSentence) {
  const std::string all = R"("rules": [{"match": "*/*/*", "format": "bf16"}])";
  const std::vector<std::pair<std::string, std::vector<std::string>>> mistakes = {
      {"[1]", {"not a JSON object", "rules"}},
      {R"({"name": "a", )" + all + "}", {"version is missing", "integer 1"}},
      {R"({"version": 2, "name": "a", )" + all + "}", {"version is 2", "integer 1"}},
      {R"({"version": "1", "name": "a", )" + all + "}", {"version is \"1\"", "integer 1"}},
      {R"({"version": 1.0, "name": "a", )" + all + "}", {"version is 1.0", "integer 1"}},
      {R"({"version": 1, )" + all + "}", {"name is missing", "letters"}},
      {R"({"version": 1, "name": 7, )" + all + "}", {"name is 7", "letters"}},
      {R"({"version": 1, "name": "", )" + all + "}", {"name is \"\"", "letters"}},
      {R"({"version": 1, "name": "a b", )" + all + "}", {"name is \"a b\"", "letters"}},
      {R"({"version": 1, "name": "a", "description": null, )" + all + "}", {"description is null", "string"}},
      {R"({"version": 1, "name": "a", "window": 3, )" + all + "}",
       {"unknown field \"window\"", "version, name, description, rules, recent_window"}},
      {R"({"version": 1, "name": "a", "recent_window": -1, )" + all + "}",
       {"recent_window is -1", "from 0 to 1048576"}},
      {R"({"version": 1, "name": "a", "recent_window": 18446744073709551615, )" + all + "}",
       {"recent_window is 18446744073709551615", "from 0 to 1048576"}},
      {R"({"version": 1, "name": "a", "recent_window": 1.5, )" + all + "}",
       {"recent_window is 1.5", "integer"}},
      {R"({"version": 1, "name": "a"})", {"rules is missing", "array of 1 to"}},
      {R"({"version": 1, "name": "a", "rules": {}})", {"rules is {}", "array of 1 to"}},
      {R"({"version": 1, "name": "a", "rules": []})", {"rules has 0 entries", "array of 1 to"}},
      {R"({"version": 1, "name": "a", "rules": ["*/*/*"]})", {"rules[0] is \"*/*/*\"", "object"}},
      {R"({"version": 1, "name": "a", "rules": [{"match": "*/*/*", "format": "bf16", "bits": 2}]})",
       {"rules[0]: unknown field \"bits\"", "match, format"}},
      {R"({"version": 1, "name": "a", "rules": [{"format": "bf16"}]})",
       {"rules[0].match is missing", "temporal/modal/semantic"}},
      {R"({"version": 1, "name": "a", "rules": [{"match": 1, "format": "bf16"}]})", {"rules[0].match is 1"}},
      {R"({"version": 1, "name": "a", "rules": [{"match": "*/*/*"}]})",
       {"rules[0].format is missing", "k2v2, k4v2, k4v4, fp8, bf16"}},
      {R"({"version": 1, "name": "a", "rules": [{"match": "*/*/*", "format": "int3"}]})",
       {"rules[0].format: \"int3\"", "k2v2, k4v2, k4v4, fp8, bf16"}},
      {R"({"version": 1, "name": "a", "rules": [{"match": "*/*", "format": "bf16"}]})",
       {"rules[0].match: \"*/*\" has 2 parts", "temporal/modal/semantic"}},
      {R"({"version": 1, "name": "a", "rules": [{"match": "now/*/*", "format": "bf16"}]})",
       {"rules[0].match: \"now\" is no temporal value", "current, m1, m2, older"}},
      {R"({"version": 1, "name": "a", "rules": [{"match": "*/video/*", "format": "bf16"}]})",
       {"\"video\" is no modal value", "text, image"}},
      {R"({"version": 1, "name": "a", "rules": [{"match": "*/*/{user,}", "format": "bf16"}]})",
       {"\"\" is no semantic value", "inst, user, assistant, reasoning, tool_call, obs, delim"}},
      {R"({"version": 1, "name": "a", "rules": [{"match": "*/*/{user,obs", "format": "bf16"}]})",
       {"\"{user,obs\"", "brace"}},
      {R"({"version": 1, "name": "a", "rules": [{"match": "*/*/*", "format": "bf16"},
           {"match": "m1/*/*", "format": "k2v2"}]})",
       {"rules[1].match: \"m1/*/*\" never applies", "move it up"}},
      {R"({"version": 1, "name": "a", "rules": [{"match": "{current,m1,m2}/*/*", "format": "bf16"},
           {"match": "older/text/*", "format": "bf16"}]})",
       {"7 of 56 tags", "older/image/inst", R"({"match": "*/*/*")"}},
  };
  std::vector<std::string> seen;
  for (const auto& [json, says] : mistakes) {
    const std::string error = ErrorOf(Parse(json));
    EXPECT_TRUE(error.starts_with("my.json")) << error;
    for (const std::string& part : says)
      EXPECT_NE(error.find(part), std::string::npos) << part << "\n" << error;
    EXPECT_LT(error.size(), 400u) << error;
  }
}

TEST(PolicyTest, LongAndBinaryValuesAreQuotedShort) {
  const std::string error =
      ErrorOf(ParseRules(R"([{"match": "*/*/*", "format": ")" + std::string(100000, 'x') + R"("}])"));
  EXPECT_LT(error.size(), 300u);
  const std::string control = ErrorOf(ParseRules(R"([{"match": "*/*/\u001b[31m", "format": "bf16"}])"));
  EXPECT_EQ(control.find('\x1b'), std::string::npos) << "a terminal must not interpret a policy file";
}

TEST(PolicyTest, LoadsFilesAndNamesWhatIsMissing) {
  const std::string path = testing::TempDir() + "/triaxial_policy_test.json";
  std::ofstream(path) << DumpJsonLikePython(PolicyToJson(Load("paper")));
  EXPECT_EQ(Load(path).table, Load("paper").table);
  std::ofstream(path) << "{";
  const std::string error = ErrorOf(LoadPolicy(path));
  EXPECT_NE(error.find(path), std::string::npos) << error;
  std::remove(path.c_str());
  const Result<Policy> missing = LoadPolicy("papre");
  ASSERT_FALSE(missing.ok());
  EXPECT_EQ(missing.status().code(), Code::kNotFound);
  EXPECT_NE(missing.status().message().find("\"papre\""), std::string::npos);
  EXPECT_NE(missing.status().message().find("bf16, fp8, int4, int2, kivi, paper"), std::string::npos);
  EXPECT_FALSE(LoadPolicy("src/kv").ok()) << "a directory is no policy";
}

constexpr const char* kPriced = R"({"version": 1, "name": "priced", "description": "d",
    "distortion": {"current/text/{inst,user}": {"k2v2": 0.5, "k4v2": 0.25, "k4v4": 0.0625, "bf16": 0},
                   "*/image/*": {"k2v2": 0.125, "k4v4": 0.1},
                   "*/*/*": {"k2v2": 1e-8}},
    "counts": {"current/text/inst": 12.5, "older/image/obs": 100},
    "budget_bits": 2.8,
    "pins": [{"match": "*/*/inst", "format": "k4v2"}, {"match": "current/*/{inst,delim}", "format": "k4v4"}],
    "sink": "k4v4", "recent_window": 64,
    "provenance": {"model": "m", "layers": [0, 2], "conversations": 20, "predicted_loss": 0.5, "note": [1]}})";

size_t IndexOf(Temporal t, Modal m, Semantic s) { return static_cast<size_t>(Tag{t, m, s}.index()); }
float LossOf(const Policy& policy, size_t tag, Format f) {
  return policy.distortion[tag][static_cast<size_t>(f)];
}

TEST(PolicyTest, PricedPoliciesSayWhatEachFormatCosts) {
  const Result<Policy> parsed = Parse(kPriced);
  ASSERT_TRUE(parsed.ok()) << parsed.status().message();
  EXPECT_TRUE(parsed->priced);
  const size_t inst = IndexOf(Temporal::kCurrent, Modal::kText, Semantic::kInst);
  EXPECT_EQ(LossOf(*parsed, inst, k2), 0.5f);
  EXPECT_EQ(LossOf(*parsed, inst, k42), 0.25f);
  EXPECT_EQ(LossOf(*parsed, inst, k4), 0.0625f);
  EXPECT_EQ(LossOf(*parsed, inst, k16), 0.0f);
  const size_t image = IndexOf(Temporal::kOlder, Modal::kImage, Semantic::kObs);
  EXPECT_EQ(LossOf(*parsed, image, k42), 0.125f) << "unmeasured: no better than the format of fewer bits";
  EXPECT_EQ(LossOf(*parsed, image, k4), 0.1f);
  EXPECT_EQ(LossOf(*parsed, IndexOf(Temporal::kM1, Modal::kText, Semantic::kObs), k4), 1e-8f);
  EXPECT_EQ(parsed->counts[inst], 12.5);
  EXPECT_EQ(parsed->counts[image], 100);
  EXPECT_EQ(parsed->budget_bits, 2.8);
  EXPECT_EQ(parsed->floor[inst], k4) << "of several pins the most demanding";
  EXPECT_EQ(parsed->floor[IndexOf(Temporal::kM1, Modal::kText, Semantic::kInst)], k42);
  EXPECT_EQ(parsed->floor[image], k2);
  EXPECT_EQ(parsed->sink, k4);
  EXPECT_EQ(parsed->provenance["conversations"], 20);
}

TEST(PolicyTest, PricedJsonRoundTripsToTheBit) {
  Result<Policy> parsed = Parse(kPriced);
  ASSERT_TRUE(parsed.ok());
  for (size_t t = 0; t < kTags; ++t) {
    for (size_t f = 0; f + 1 < kFormats; ++f) {
      parsed->distortion[t][f] = 1.0f / (3.0f + 7.0f * static_cast<float>(t) + static_cast<float>(f));
    }
  }
  for (const bool budget : {true, false}) {
    if (!budget) parsed->budget_bits = 0;
    if (!budget) parsed->price = 1.0 / 3;
    const Json json = PolicyToJson(*parsed);
    const Result<Policy> again = ParsePolicy(json, "round trip");
    ASSERT_TRUE(again.ok()) << again.status().message();
    EXPECT_TRUE(again->priced);
    EXPECT_EQ(again->distortion, parsed->distortion);
    EXPECT_EQ(again->counts, parsed->counts);
    EXPECT_EQ(again->budget_bits, parsed->budget_bits);
    EXPECT_EQ(again->price, parsed->price);
    EXPECT_EQ(again->floor, parsed->floor);
    EXPECT_EQ(again->sink, parsed->sink);
    EXPECT_EQ(again->recent_window, parsed->recent_window);
    EXPECT_EQ(PolicyToJson(*again), json);
  }
}

TEST(PolicyTest, FixedPoliciesMayPinAndKeepASink) {
  const Result<Policy> parsed = Parse(R"({"version": 1, "name": "a", "sink": "bf16",
      "rules": [{"match": "*/*/*", "format": "k2v2"}], "pins": [{"match": "*/*/inst", "format": "k4v4"}]})");
  ASSERT_TRUE(parsed.ok()) << parsed.status().message();
  EXPECT_FALSE(parsed->priced);
  EXPECT_EQ(parsed->sink, k16);
  EXPECT_EQ(parsed->floor[IndexOf(Temporal::kM2, Modal::kText, Semantic::kInst)], k4);
  EXPECT_EQ(PolicyToJson(*parsed)["pins"].size(), 1u);
}

TEST(PolicyTest, EveryMistakeOfPricedPoliciesHasItsOwnSentence) {
  struct Mistake {
    std::string pointer;  // into kPriced
    std::string value;    // "" removes the field
    std::vector<std::string> says;
  };
  const std::string losses = "/distortion/*~1*~1*";
  const std::vector<Mistake> mistakes = {
      {"/rules", R"([{"match": "*/*/*", "format": "bf16"}])", {"both rules", "distortion", "keep one"}},
      {"/distortion", "[]", {"distortion is []", "object of 1 to"}},
      {"/distortion", "{}", {"distortion is {}", "object of 1 to"}},
      {losses, "", {"distortion matches nothing for 26 of 56 tags", "current/text/assistant", "\"*/*/*\""}},
      {losses, "3", {"distortion[\"*/*/*\"] is 3", "object"}},
      {losses + "/k2v2", "", {"distortion[\"*/*/*\"].k2v2 is missing", "fewest bits is required"}},
      {losses + "/k2v2", "-1", {".k2v2 is -1", "from 0 to 1e30"}},
      {losses + "/k2v2", "1e31", {".k2v2 is 1e+31", "from 0 to 1e30"}},
      {losses + "/k2v2", "\"1\"", {".k2v2 is \"1\"", "from 0 to 1e30"}},
      {losses + "/k4v4", "0.5", {".k4v4 is 0.5", "fall with bits", "k2v2, k4v2, k4v4"}},
      {losses + "/bf16", "0.5", {".bf16 is 0.5", "expected 0"}},
      {losses + "/k3v3", "0.5", {"\"k3v3\" is no format", "k2v2, k4v2"}},
      {"/distortion/now~1*~1*", R"({"k2v2": 1})", {"\"now\" is no temporal value"}},
      {"/distortion/m1~1*~1*", R"({"k2v2": 1})", {"\"m1/*/*\" never applies", "remove it"}},
      {"/counts", "3", {"counts is 3", "current/text/user"}},
      {"/counts", "{}", {"counts counts no token"}},
      {"/counts", "", {"budget_bits needs counts", "price instead"}},
      {"/counts/*~1text~1user", "3", {"counts: \"*/text/user\" names 4 tags"}},
      {"/counts/older~1image~1obs", "-2", {"counts[\"older/image/obs\"] is -2", "0 to 1e15"}},
      {"/budget_bits", "", {"neither budget_bits nor price"}},
      {"/price", "1", {"both budget_bits and price"}},
      {"/budget_bits", "0.5", {"budget_bits is 0.5", "from 1 to 16"}},
      {"/budget_bits", "17", {"budget_bits is 17", "from 1 to 16"}},
      {"/pins", "{}", {"pins is {}", "array of 1 to"}},
      {"/pins/0/format", "\"k9\"", {"pins[0].format: \"k9\" is no format"}},
      {"/pins/1/match", "\"inst\"", {"pins[1].match: \"inst\" has 1 parts"}},
      {"/sink", "4", {"sink is 4", "k2v2, k4v2"}},
      {"/provenance", "\"me\"", {"provenance is \"me\"", "object"}},
      {"/provenance/model", "7", {"provenance.model is 7", "string"}},
      {"/provenance/codec", "null", {"provenance.codec is null", "string"}},
      {"/provenance/layers", "[1.5]", {"provenance.layers is [1.5]", "layer numbers"}},
      {"/provenance/conversations", "\"20\"", {"provenance.conversations is \"20\"", "integer"}},
      {"/provenance/predicted_loss", "-1", {"provenance.predicted_loss is -1"}},
      {"/lambda", "1", {"unknown field \"lambda\"", "distortion, counts, budget_bits, price, pins, sink"}},
  };
  for (const Mistake& mistake : mistakes) {
    Json json = *ParseJson(kPriced, "my.json");
    const Json::json_pointer pointer(mistake.pointer);
    if (mistake.value.empty()) {
      json[pointer.parent_pointer()].erase(pointer.back());
    } else {
      json[pointer] = *ParseJson(mistake.value, "my.json");
    }
    const std::string error = ErrorOf(ParsePolicy(json, "my.json"));
    EXPECT_TRUE(error.starts_with("my.json")) << error;
    for (const std::string& part : mistake.says)
      EXPECT_NE(error.find(part), std::string::npos) << part << "\n" << error;
    EXPECT_LT(error.size(), 400u) << error;
  }
  const std::string lone = ErrorOf(
      Parse(R"({"version": 1, "name": "a", "price": 1, "rules": [{"match": "*/*/*", "format": "bf16"}]})"));
  EXPECT_NE(lone.find("price is a field of priced policies"), std::string::npos) << lone;
}

// n2 wishes for k2v2, and so on.
Format Block(int n2, int n42, int n4, int n16) {
  std::vector<Format> wishes;
  wishes.insert(wishes.end(), static_cast<size_t>(n4), k4);
  wishes.insert(wishes.end(), static_cast<size_t>(n2), k2);
  wishes.insert(wishes.end(), static_cast<size_t>(n16), k16);
  wishes.insert(wishes.end(), static_cast<size_t>(n42), k42);
  return BlockFormat(wishes);
}

TEST(BlockFormatTest, TakesTheMedianWishAndTiesGoUp) {
  EXPECT_EQ(Block(64, 0, 0, 0), k2);
  EXPECT_EQ(Block(0, 64, 0, 0), k42);
  EXPECT_EQ(Block(0, 0, 64, 0), k4);
  EXPECT_EQ(Block(0, 0, 0, 64), k16);
  EXPECT_EQ(Block(0, 0, 0, 1), k16);
  EXPECT_EQ(Block(33, 0, 31, 0), k2);
  EXPECT_EQ(Block(32, 0, 32, 0), k4) << "a tie takes the more precise format";
  EXPECT_EQ(Block(31, 0, 33, 0), k4);
  EXPECT_EQ(Block(32, 0, 0, 32), k16);
  EXPECT_EQ(Block(30, 4, 30, 0), k42) << "the median may be the wish of few";
  EXPECT_EQ(Block(20, 20, 20, 4), k42);
  EXPECT_EQ(Block(1, 0, 1, 1), k4);
}

}  // namespace
}  // namespace triaxial
