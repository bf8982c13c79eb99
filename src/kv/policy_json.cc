// Policy files: parsing with a sentence for every mistake, and writing.
#include <algorithm>
#include <charconv>
#include <cmath>
#include <initializer_list>
#include <optional>

#include "kv/policy.h"
#include "kv/policy_pattern.h"

namespace triaxial {
namespace {

constexpr size_t kMaxRules = 1000;
constexpr size_t kMaxName = 64;
constexpr int kMaxRecentWindow = 1 << 20;
constexpr double kMaxCount = 1e15;
// Losses beyond these would lose their sum over a block, or their order, in float.
constexpr double kMaxLoss = 1e30;
constexpr double kMaxPrice = 1e30;
constexpr double kMaxBits = 16;
constexpr std::string_view kRemedyCatchAll = R"({"match": "*/*/*", "format": "..."})";
constexpr std::string_view kRemedyDistortion = R"("*/*/*": {"k2v2": 1.0, "k4v4": 0.01})";

Status CheckFields(const Json& object, std::initializer_list<std::string_view> allowed,
                   const std::string& where) {
  for (const auto& [key, value] : object.items()) {
    if (std::find(allowed.begin(), allowed.end(), key) == allowed.end()) {
      return InvalidArgument(where + ": unknown field " + QuoteValue(key) + "; allowed are " +
                             JoinNames(allowed));
    }
  }
  return OkStatus();
}

// "PATH is VALUE; expected WHAT", or "is missing".
Status Expected(const Json* value, const std::string& path, std::string_view expected) {
  return InvalidArgument(path + (value == nullptr ? " is missing" : " is " + QuoteValue(*value)) +
                         "; expected " + std::string(expected));
}

const Json* Find(const Json& object, const std::string& field) {
  const auto found = object.find(field);
  return found == object.end() ? nullptr : &*found;
}

Result<std::string> StringField(const Json& object, const char* field, const std::string& where,
                                std::string_view expected) {
  const Json* found = Find(object, field);
  if (found == nullptr || !found->is_string()) return Expected(found, where + field, expected);
  return found->get<std::string>();
}

Result<int> IntField(const Json& object, const char* field, int low, int high, const std::string& where) {
  const Json* found = Find(object, field);
  const std::string expected = low == high
                                   ? "the integer " + std::to_string(low)
                                   : "an integer from " + std::to_string(low) + " to " + std::to_string(high);
  // Unsigned values past int64_t become negative, and `low` is never below zero.
  const bool in_range = found != nullptr && found->is_number_integer() && found->get<int64_t>() >= low &&
                        found->get<int64_t>() <= high;
  if (!in_range) return Expected(found, where + field, expected);
  return found->get<int>();
}

// A number in [low, high] from `value`, which is at `path`.
Result<double> Number(const Json* value, const std::string& path, double low, double high,
                      std::string_view expected) {
  const bool in_range =
      value != nullptr && value->is_number() && value->get<double>() >= low && value->get<double>() <= high;
  if (!in_range) return Expected(value, path, expected);
  return value->get<double>();
}

Result<Format> FormatField(const Json& object, const char* field, const std::string& where) {
  const std::string formats = "one of " + JoinNames(FormatNames());
  ASSIGN_OR_RETURN(const std::string name, StringField(object, field, where, formats));
  const std::optional<Format> format = ParseFormat(name);
  if (format) return *format;
  return InvalidArgument(where + field + ": " + QuoteValue(name) + " is no format; use " + formats);
}

Result<PolicyRule> ParseRule(const Json& json, const std::string& where) {
  if (!json.is_object()) {
    return InvalidArgument(where + " is " + QuoteValue(json) +
                           R"(; expected an object such as {"match": "*/image/*", "format": "k2v2"})");
  }
  RETURN_IF_ERROR(CheckFields(json, {"match", "format"}, where));
  PolicyRule rule;
  ASSIGN_OR_RETURN(rule.match,
                   StringField(json, "match", where + ".", "a string temporal/modal/semantic, * for any"));
  ASSIGN_OR_RETURN(rule.format, FormatField(json, "format", where + "."));
  return rule;
}

// A list of rules; `required` or absent.
Result<std::vector<PolicyRule>> ParseRules(const Json& json, const char* field, const std::string& what) {
  const Json* list = Find(json, field);
  const std::string where = what + ": " + field;
  if (list == nullptr || !list->is_array() || list->empty() || list->size() > kMaxRules) {
    return InvalidArgument(where +
                           (list == nullptr     ? " is missing"
                            : !list->is_array() ? " is " + QuoteValue(*list)
                                                : " has " + std::to_string(list->size()) + " entries") +
                           "; expected an array of 1 to " + std::to_string(kMaxRules) + " rules such as " +
                           std::string(kRemedyCatchAll));
  }
  std::vector<PolicyRule> rules;
  for (size_t r = 0; r < list->size(); ++r) {
    ASSIGN_OR_RETURN(PolicyRule rule, ParseRule((*list)[r], where + "[" + std::to_string(r) + "]"));
    rules.push_back(std::move(rule));
  }
  return rules;
}

// What the first match of a pattern leaves for later ones.
class Coverage {
 public:
  // The tags of `match` that no earlier pattern has; an error if there are none.
  Result<TagSet> Add(const std::string& match, const std::string& where) {
    ASSIGN_OR_RETURN(const TagSet matched, ParseTagPattern(match, where));
    const TagSet added = matched & ~covered_;
    if (added.none()) {
      return InvalidArgument(where + ": " + QuoteValue(match) +
                             " never applies, because the first match wins and earlier ones match all of "
                             "its tags; move it up or remove it");
    }
    covered_ |= added;
    return added;
  }
  Status CheckComplete(const std::string& where, std::string_view remedy) const {
    if (covered_.all()) return OkStatus();
    std::vector<std::string> missing;
    for (int i = 0; i < kTags && missing.size() < 3; ++i) {
      if (!covered_[static_cast<size_t>(i)]) missing.push_back(Name(Tag::FromIndex(i)));
    }
    const size_t count = kTags - covered_.count();
    return InvalidArgument(where + " matches nothing for " + std::to_string(count) + " of " +
                           std::to_string(kTags) + " tags (" + JoinNames(missing) +
                           (count > missing.size() ? ", ..." : "") + "); end it with one for all the rest, " +
                           std::string(remedy));
  }

 private:
  TagSet covered_;
};

// Losses of one entry, by format. A format without one has not been measured: it counts as no better than the
// next one of fewer bits, so it is never chosen over that one, whatever the price.
Result<std::array<float, kFormats>> ParseLosses(const Json& json, const std::string& where) {
  if (!json.is_object()) return Expected(&json, where, R"(an object such as {"k2v2": 1.0, "k4v4": 0.01})");
  for (const auto& [key, value] : json.items()) {
    if (!ParseFormat(key)) {
      return InvalidArgument(where + ": " + QuoteValue(key) + " is no format; use " +
                             JoinNames(FormatNames()));
    }
  }
  std::array<float, kFormats> losses{};
  for (int f = 0; f < kFormats; ++f) {
    const auto format = static_cast<Format>(f);
    const std::string name(Name(format));
    const Json* value = Find(json, name);
    float& loss = losses[static_cast<size_t>(f)];
    if (format == Format::kBf16) {
      if (value != nullptr) {
        RETURN_IF_ERROR(
            Number(value, where + "." + name, 0, 0, "0, because bf16 is what losses are against").status());
      }
      continue;
    }
    if (value == nullptr && f > 0) {
      loss = losses[static_cast<size_t>(f - 1)];
      continue;
    }
    const std::string expected =
        f == 0 ? "a loss from 0 to 1e30 (the format of fewest bits is required)" : "a loss from 0 to 1e30";
    ASSIGN_OR_RETURN(const double number, Number(value, where + "." + name, 0, kMaxLoss, expected));
    loss = static_cast<float>(number);
    if (f > 0 && loss > losses[static_cast<size_t>(f - 1)]) {
      return InvalidArgument(where + "." + name + " is " + QuoteValue(*value) +
                             ", more than a format of fewer bits loses; losses must fall with bits (" +
                             JoinNames(FormatNames()) + "), so write at most the smallest before it");
    }
  }
  return losses;
}

Status ParseDistortion(const Json& json, const std::string& what, Policy* policy) {
  const Json& entries = json["distortion"];
  const std::string where = what + ": distortion";
  if (!entries.is_object() || entries.empty() || entries.size() > kMaxRules) {
    return Expected(&entries, where,
                    "an object of 1 to " + std::to_string(kMaxRules) + " entries such as " +
                        std::string(kRemedyDistortion));
  }
  Coverage coverage;
  for (const auto& [match, value] : entries.items()) {
    ASSIGN_OR_RETURN(const TagSet added, coverage.Add(match, where));
    ASSIGN_OR_RETURN(const auto losses, ParseLosses(value, where + "[" + QuoteValue(match) + "]"));
    for (size_t t = 0; t < kTags; ++t) {
      if (added[t]) policy->distortion[t] = losses;
    }
  }
  return coverage.CheckComplete(where, kRemedyDistortion);
}

Status ParseCounts(const Json& counts, const std::string& where, Policy* policy) {
  if (!counts.is_object()) {
    return Expected(&counts, where, R"(an object such as {"current/text/user": 120})");
  }
  double total = 0;
  for (const auto& [name, value] : counts.items()) {
    ASSIGN_OR_RETURN(const TagSet tags, ParseTagPattern(name, where));
    if (tags.count() != 1) {
      return InvalidArgument(where + ": " + QuoteValue(name) + " names " + std::to_string(tags.count()) +
                             " tags; give the count of one tag, without * or {}");
    }
    size_t t = 0;
    while (!tags[t]) ++t;
    ASSIGN_OR_RETURN(policy->counts[t], Number(&value, where + "[" + QuoteValue(name) + "]", 0, kMaxCount,
                                               "a number of tokens from 0 to 1e15"));
    total += policy->counts[t];
  }
  if (total > 0) return OkStatus();
  return InvalidArgument(where + " counts no token; leave the field out, or give the workload's tokens");
}

// The fields that only a priced policy has.
Status ParsePriced(const Json& json, const std::string& what, Policy* policy) {
  policy->priced = true;
  RETURN_IF_ERROR(ParseDistortion(json, what, policy));
  const bool has_counts = json.contains("counts");
  if (has_counts) RETURN_IF_ERROR(ParseCounts(json["counts"], what + ": counts", policy));
  const bool budget = json.contains("budget_bits");
  if (budget == json.contains("price")) {
    return InvalidArgument(
        what +
        (budget ? " has both budget_bits and price; one of them follows from the other,"
                : " has neither budget_bits nor price;") +
        " give one: budget_bits (effective bits at rest, from 1 to 16) or price (loss per byte)");
  }
  if (!budget) {
    ASSIGN_OR_RETURN(policy->price, Number(Find(json, "price"), what + ": price", 0, kMaxPrice,
                                           "a loss per byte from 0 to 1e30"));
    return OkStatus();
  }
  ASSIGN_OR_RETURN(policy->budget_bits, Number(Find(json, "budget_bits"), what + ": budget_bits", 1, kMaxBits,
                                               "effective bits from 1 to 16, metadata included"));
  if (has_counts) return OkStatus();
  return InvalidArgument(what +
                         ": budget_bits needs counts, the workload's tokens by tag; add counts, or give a "
                         "price instead");
}

Status CheckProvenance(const Json& json, const std::string& what) {
  const Json* found = Find(json, "provenance");
  if (found == nullptr) return OkStatus();
  const std::string where = what + ": provenance";
  if (!found->is_object()) return Expected(found, where, "an object about where the policy comes from");
  for (const char* field :
       {"model", "model_hash", "tokenizer_hash", "data_hash", "codec", "metric", "date", "tool_version"}) {
    if (!found->contains(field)) continue;
    RETURN_IF_ERROR(StringField(*found, field, where + ".", "a string").status());
  }
  if (found->contains("conversations")) {
    RETURN_IF_ERROR(IntField(*found, "conversations", 0, 1 << 30, where + ".").status());
  }
  if (found->contains("predicted_loss")) {
    RETURN_IF_ERROR(
        Number(Find(*found, "predicted_loss"), where + ".predicted_loss", 0, 1e300, "a number of at least 0")
            .status());
  }
  const Json* layers = Find(*found, "layers");
  if (layers == nullptr) return OkStatus();
  const bool integers = layers->is_array() && std::all_of(layers->begin(), layers->end(), [](const Json& l) {
                          return l.is_number_integer() && l.get<int64_t>() >= 0;
                        });
  if (!integers) return Expected(layers, where + ".layers", "a list of layer numbers from 0");
  return OkStatus();
}

bool IsNameChar(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '-' || c == '_' ||
         c == '.';
}

// The double that prints as shortly as the float does, if it reads back as the same float.
double Shortest(float x) {
  std::array<char, 32> text;
  const auto end = std::to_chars(text.data(), text.data() + text.size(), x).ptr;
  double out = 0;
  std::from_chars(text.data(), end, out);
  return static_cast<float>(out) == x ? out : double{x};
}

Json RulesToJson(const std::vector<PolicyRule>& rules) {
  Json json = Json::array();
  for (const PolicyRule& rule : rules) {
    json.push_back(Json{{"match", rule.match}, {"format", std::string(Name(rule.format))}});
  }
  return json;
}

void WritePriced(const Policy& policy, Json* json) {
  Json& distortion = (*json)["distortion"] = Json::object();
  Json counts = Json::object();
  for (int t = 0; t < kTags; ++t) {
    const std::string tag = Name(Tag::FromIndex(t));
    Json losses;
    for (int f = 0; f < kFormats; ++f) {
      if (static_cast<Format>(f) == Format::kBf16) continue;
      losses[std::string(Name(static_cast<Format>(f)))] =
          Shortest(policy.distortion[static_cast<size_t>(t)][static_cast<size_t>(f)]);
    }
    distortion[tag] = std::move(losses);
    const double count = policy.counts[static_cast<size_t>(t)];
    if (count > 0) counts[tag] = count;
  }
  if (!counts.empty()) (*json)["counts"] = std::move(counts);
  if (policy.budget_bits > 0) {
    (*json)["budget_bits"] = policy.budget_bits;
  } else {
    (*json)["price"] = policy.price;
  }
}

}  // namespace

Status ResolveRules(const std::string& what, Policy* policy) {
  Coverage coverage;
  for (size_t r = 0; r < policy->rules.size(); ++r) {
    const PolicyRule& rule = policy->rules[r];
    ASSIGN_OR_RETURN(const TagSet added,
                     coverage.Add(rule.match, what + ": rules[" + std::to_string(r) + "].match"));
    for (size_t t = 0; t < kTags; ++t) {
      if (added[t]) policy->table[t] = rule.format;
    }
  }
  return coverage.CheckComplete(what + ": rules", kRemedyCatchAll);
}

Result<Policy> ParsePolicy(const Json& json, std::string_view what_view) {
  const std::string what(what_view);
  if (!json.is_object()) {
    return InvalidArgument(what + " is not a JSON object; expected {\"version\": " +
                           std::to_string(kPolicyVersion) + R"(, "name": "...", "rules": [...]})");
  }
  RETURN_IF_ERROR(CheckFields(json,
                              {"version", "name", "description", "rules", "recent_window", "distortion",
                               "counts", "budget_bits", "price", "pins", "sink", "provenance"},
                              what));
  RETURN_IF_ERROR(IntField(json, "version", kPolicyVersion, kPolicyVersion, what + ": ").status());
  Policy policy;
  constexpr std::string_view kNameRule = "1 to 64 letters, digits, dots, dashes or underscores";
  ASSIGN_OR_RETURN(policy.name, StringField(json, "name", what + ": ", kNameRule));
  if (policy.name.empty() || policy.name.size() > kMaxName ||
      !std::all_of(policy.name.begin(), policy.name.end(), IsNameChar)) {
    return InvalidArgument(what + ": name is " + QuoteValue(policy.name) + "; expected " +
                           std::string(kNameRule));
  }
  if (json.contains("description")) {
    ASSIGN_OR_RETURN(policy.description, StringField(json, "description", what + ": ", "a string"));
  }
  if (json.contains("recent_window")) {
    ASSIGN_OR_RETURN(policy.recent_window, IntField(json, "recent_window", 0, kMaxRecentWindow, what + ": "));
  }
  if (json.contains("distortion")) {
    if (json.contains("rules")) {
      return InvalidArgument(what +
                             " has both rules (a fixed policy) and distortion (a priced one); keep one");
    }
    RETURN_IF_ERROR(ParsePriced(json, what, &policy));
  } else {
    for (const char* field : {"counts", "budget_bits", "price"}) {
      if (!json.contains(field)) continue;
      return InvalidArgument(what + ": " + field +
                             " is a field of priced policies, but there is no distortion; add distortion, or "
                             "remove it");
    }
    ASSIGN_OR_RETURN(policy.rules, ParseRules(json, "rules", what));
    RETURN_IF_ERROR(ResolveRules(what, &policy));
  }
  if (json.contains("pins")) {
    ASSIGN_OR_RETURN(policy.pins, ParseRules(json, "pins", what));
    for (size_t p = 0; p < policy.pins.size(); ++p) {
      ASSIGN_OR_RETURN(const TagSet tags, ParseTagPattern(policy.pins[p].match,
                                                          what + ": pins[" + std::to_string(p) + "].match"));
      for (size_t t = 0; t < kTags; ++t) {
        if (tags[t]) policy.floor[t] = std::max(policy.floor[t], policy.pins[p].format);
      }
    }
  }
  if (json.contains("sink")) {
    ASSIGN_OR_RETURN(policy.sink, FormatField(json, "sink", what + ": "));
  }
  RETURN_IF_ERROR(CheckProvenance(json, what));
  if (json.contains("provenance")) policy.provenance = json["provenance"];
  return policy;
}

Json PolicyToJson(const Policy& policy) {
  Json json;
  json["version"] = kPolicyVersion;
  json["name"] = policy.name;
  json["description"] = policy.description;
  if (policy.priced) {
    WritePriced(policy, &json);
  } else {
    json["rules"] = RulesToJson(policy.rules);
  }
  if (!policy.pins.empty()) json["pins"] = RulesToJson(policy.pins);
  if (policy.sink != Format::kK2V2) json["sink"] = std::string(Name(policy.sink));
  json["recent_window"] = policy.recent_window;
  if (!policy.provenance.is_null()) json["provenance"] = policy.provenance;
  return json;
}

}  // namespace triaxial
