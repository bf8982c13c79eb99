// Policy files that went wrong: random mutations of valid ones, as text and as JSON. Every outcome must be a
// policy that covers all tags and round-trips, or one printable sentence that names the file.
#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <string>
#include <vector>

#include "kv/policy.h"

namespace triaxial {
namespace {

using Random = std::mt19937;

int Below(Random& random, size_t n) {
  return static_cast<int>(std::uniform_int_distribution<size_t>(0, n - 1)(random));
}

void ExpectPolicyOrOneSentence(const Result<Policy>& policy, const std::string& input) {
  if (!policy.ok()) {
    const std::string& message = policy.status().message();
    ASSERT_EQ(policy.status().code(), Code::kInvalidArgument) << input;
    ASSERT_TRUE(message.starts_with("fuzz.json")) << message;
    ASSERT_LT(message.size(), 1000u) << message;
    return;
  }
  ASSERT_FALSE(policy->name.empty());
  for (const Format format : policy->table) ASSERT_LT(static_cast<int>(format), kFormats);
  const Result<Policy> again = ParsePolicy(PolicyToJson(*policy), "fuzz.json");
  ASSERT_TRUE(again.ok()) << again.status().message() << "\n" << input;
  ASSERT_EQ(again->table, policy->table);
  ASSERT_EQ(again->priced, policy->priced);
  ASSERT_EQ(again->distortion, policy->distortion);
  ASSERT_EQ(again->counts, policy->counts);
  ASSERT_EQ(again->floor, policy->floor);
  ASSERT_EQ(again->sink, policy->sink);
  for (const auto& loss : policy->distortion) {
    for (size_t f = 0; f < kFormats; ++f) {
      ASSERT_TRUE(loss[f] >= 0 && loss[f] <= 1e30f) << loss[f];
      if (f > 0) {
        ASSERT_LE(loss[f], loss[f - 1]);
      }
    }
  }
  ASSERT_EQ(again->recent_window, policy->recent_window);
}

std::vector<Json> Seeds() {
  std::vector<Json> seeds;
  for (const std::string_view name : BuiltinPolicies()) {
    seeds.push_back(PolicyToJson(*LoadPolicy(std::string(name))));
  }
  seeds.push_back(*ParseJson(R"({"version": 1, "name": "priced",
      "distortion": {"current/text/{inst,user}": {"k2v2": 0.5, "k4v2": 0.25, "k4v4": 0.06},
                     "*/image/*": {"k2v2": 0.1, "k4v4": 0.01}, "*/*/*": {"k2v2": 1e-8}},
      "counts": {"current/text/inst": 12.5, "older/image/obs": 100}, "budget_bits": 2.8,
      "pins": [{"match": "*/*/inst", "format": "k4v2"}], "sink": "k4v4",
      "provenance": {"model": "m", "layers": [0, 2], "conversations": 20}})",
                             "seed"));
  seeds.push_back(PolicyToJson(*ParsePolicy(seeds.back(), "seed")));
  return seeds;
}

Json RandomValue(Random& random) {
  static const std::vector<Json> values = {nullptr,
                                           true,
                                           -1,
                                           0,
                                           1,
                                           2,
                                           1e300,
                                           18446744073709551615u,
                                           "",
                                           "k2v2",
                                           "bf16",
                                           "*",
                                           "*/*/*",
                                           "{,}/*/*",
                                           "{}/{}",
                                           "*/*/{obs",
                                           "//",
                                           "\u0000",
                                           "{{a}}/*/*",
                                           "*/image/{obs,obs}",
                                           Json::array(),
                                           Json::object(),
                                           Json{{"k2v2", 0.5}},
                                           -0.0,
                                           1e-320,
                                           Json::array({Json::object()}),
                                           std::string(5000, '{')};
  return values[static_cast<size_t>(Below(random, values.size()))];
}

// Changes one value, name or element somewhere below `json`.
void Mutate(Random& random, Json* json) {
  const bool here = Below(random, 4) == 0;
  if (json->is_structured() && !json->empty() && !here) {
    auto child = json->begin();
    std::advance(child, Below(random, json->size()));
    Mutate(random, &*child);
  } else if (json->is_string() && Below(random, 2) == 0) {
    std::string text = json->get<std::string>();
    static const std::string alphabet = "*/{},abcm12_\xff \"";
    const char c = alphabet[static_cast<size_t>(Below(random, alphabet.size()))];
    const size_t at = static_cast<size_t>(Below(random, text.size() + 1));
    if (at < text.size() && Below(random, 2) == 0) {
      text[at] = c;
    } else {
      text.insert(at, 1, c);
    }
    *json = text;
  } else if (json->is_object() && !json->empty() && Below(random, 2) == 0) {
    auto child = json->begin();
    std::advance(child, Below(random, json->size()));
    const Json value = child.value();
    const std::string key = child.key();
    json->erase(key);
    if (Below(random, 2) == 0) (*json)[key + "x"] = value;
  } else if (json->is_array() && !json->empty() && Below(random, 2) == 0) {
    const Json element = (*json)[static_cast<size_t>(Below(random, json->size()))];
    if (Below(random, 2) == 0) {
      json->insert(json->begin() + Below(random, json->size()), element);
    } else {
      json->erase(static_cast<size_t>(Below(random, json->size())));
    }
  } else {
    *json = RandomValue(random);
  }
}

TEST(PolicyFuzzTest, MutatedJson) {
  Random random(1);
  const std::vector<Json> seeds = Seeds();
  int valid = 0;
  for (int i = 0; i < 40000; ++i) {
    Json json = seeds[static_cast<size_t>(Below(random, seeds.size()))];
    for (int m = 1 + Below(random, 3); m > 0; --m) Mutate(random, &json);
    const Result<Policy> policy = ParsePolicy(json, "fuzz.json");
    valid += policy.ok();
    ExpectPolicyOrOneSentence(policy, json.dump(-1, ' ', true, Json::error_handler_t::replace));
    if (HasFatalFailure()) return;
  }
  EXPECT_GT(valid, 100) << "the mutations must also reach what follows validation";
}

TEST(PolicyFuzzTest, MutatedText) {
  Random random(2);
  std::vector<std::string> seeds;
  for (const Json& json : Seeds()) seeds.push_back(DumpJsonLikePython(json));
  for (int i = 0; i < 20000; ++i) {
    std::string text = seeds[static_cast<size_t>(Below(random, seeds.size()))];
    for (int m = 1 + Below(random, 4); m > 0; --m) {
      const size_t at = static_cast<size_t>(Below(random, text.size()));
      switch (Below(random, 3)) {
        case 0:
          text[at] = static_cast<char>(Below(random, 256));
          break;
        case 1:
          text.erase(at, 1 + static_cast<size_t>(Below(random, 8)));
          break;
        default:
          text.insert(at, text.substr(static_cast<size_t>(Below(random, text.size())), 12));
      }
      if (text.empty()) text = "{";
    }
    const Result<Json> json = ParseJson(text, "fuzz.json");
    if (!json.ok()) continue;
    ExpectPolicyOrOneSentence(ParsePolicy(*json, "fuzz.json"), text);
    if (HasFatalFailure()) return;
  }
}

}  // namespace
}  // namespace triaxial
