#include "kv/policy.h"

#include <algorithm>
#include <bitset>
#include <filesystem>
#include <initializer_list>
#include <optional>

#include "base/file.h"

namespace triaxial {
namespace {

using TagSet = std::bitset<kTags>;

constexpr size_t kMaxPolicyBytes = size_t{1} << 20;
constexpr size_t kMaxRules = 1000;
constexpr size_t kMaxName = 64;
constexpr int kMaxRecentWindow = 1 << 20;
constexpr std::string_view kRemedyCatchAll = R"({"match": "*/*/*", "format": "..."})";

// What a message quotes of a value from the file: all of a short one, the start of a long one.
std::string Quote(const Json& value) {
  std::string text = value.dump(-1, ' ', true, Json::error_handler_t::replace);
  if (text.size() > 80) text = text.substr(0, 77) + "...";
  return text;
}

template <typename Names>
std::string Join(const Names& names) {
  std::string text;
  for (const auto& name : names) {
    if (!text.empty()) text += ", ";
    text += name;
  }
  return text;
}

std::vector<std::string_view> FormatNames() {
  std::vector<std::string_view> names;
  names.reserve(kFormats);
  for (int f = 0; f < kFormats; ++f) names.push_back(Name(static_cast<Format>(f)));
  return names;
}

template <typename Axis>
std::vector<std::string_view> AxisNames(int count) {
  std::vector<std::string_view> names;
  names.reserve(static_cast<size_t>(count));
  for (int i = 0; i < count; ++i) names.push_back(Name(static_cast<Axis>(i)));
  return names;
}

std::vector<std::string> Split(const std::string& text, char separator) {
  std::vector<std::string> parts(1);
  for (const char c : text) {
    if (c == separator) {
      parts.emplace_back();
    } else {
      parts.back() += c;
    }
  }
  return parts;
}

// Sets (*matches)[i] for every value i of one axis that `part` names.
Status ParseAxis(const std::string& part, std::string_view axis, const std::vector<std::string_view>& names,
                 const std::string& where, std::vector<bool>* matches) {
  matches->assign(names.size(), part == "*");
  if (part == "*") return OkStatus();
  const bool braces = part.starts_with('{') && part.ends_with('}') && part.size() >= 2;
  if (!braces && part.find_first_of("{}") != std::string::npos) {
    return InvalidArgument(where + ": " + Quote(part) + " has a brace without its partner; write {a,b}");
  }
  for (const std::string& value : Split(braces ? part.substr(1, part.size() - 2) : part, ',')) {
    const auto found = std::find(names.begin(), names.end(), value);
    if (found == names.end()) {
      return InvalidArgument(where + ": " + Quote(value) + " is no " + std::string(axis) + " value; use " +
                             Join(names) + ", {a,b} for several or * for any");
    }
    (*matches)[static_cast<size_t>(found - names.begin())] = true;
  }
  return OkStatus();
}

Result<TagSet> ParsePattern(const std::string& match, const std::string& where) {
  const std::vector<std::string> parts = Split(match, '/');
  if (parts.size() != 3) {
    return InvalidArgument(where + ": " + Quote(match) + " has " + std::to_string(parts.size()) +
                           " parts; write temporal/modal/semantic, for example */image/*");
  }
  std::vector<bool> temporal, modal, semantic;
  RETURN_IF_ERROR(ParseAxis(parts[0], "temporal", AxisNames<Temporal>(kTemporals), where, &temporal));
  RETURN_IF_ERROR(ParseAxis(parts[1], "modal", AxisNames<Modal>(kModals), where, &modal));
  RETURN_IF_ERROR(ParseAxis(parts[2], "semantic", AxisNames<Semantic>(kSemantics), where, &semantic));
  TagSet tags;
  for (int i = 0; i < kTags; ++i) {
    const Tag tag = Tag::FromIndex(i);
    tags[static_cast<size_t>(i)] = temporal[static_cast<size_t>(tag.temporal)] &&
                                   modal[static_cast<size_t>(tag.modal)] &&
                                   semantic[static_cast<size_t>(tag.semantic)];
  }
  return tags;
}

// Fills policy->table from its rules.
Status Resolve(const std::string& what, Policy* policy) {
  TagSet covered;
  for (size_t r = 0; r < policy->rules.size(); ++r) {
    const PolicyRule& rule = policy->rules[r];
    const std::string where = what + ": rules[" + std::to_string(r) + "].match";
    ASSIGN_OR_RETURN(const TagSet matched, ParsePattern(rule.match, where));
    const TagSet added = matched & ~covered;
    if (added.none()) {
      return InvalidArgument(where + ": " + Quote(rule.match) +
                             " never applies, because the first match wins and earlier rules match all of "
                             "its tags; move the rule up or remove it");
    }
    for (size_t i = 0; i < kTags; ++i) {
      if (added[i]) policy->table[i] = rule.format;
    }
    covered |= added;
  }
  if (covered.all()) return OkStatus();
  std::vector<std::string> missing;
  for (int i = 0; i < kTags && missing.size() < 3; ++i) {
    if (!covered[static_cast<size_t>(i)]) missing.push_back(Name(Tag::FromIndex(i)));
  }
  const size_t count = kTags - covered.count();
  return InvalidArgument(what + ": rules match no format for " + std::to_string(count) + " of " +
                         std::to_string(kTags) + " tags (" + Join(missing) +
                         (count > missing.size() ? ", ..." : "") +
                         "); end the rules with one for all the rest, " + std::string(kRemedyCatchAll));
}

Status CheckFields(const Json& object, std::initializer_list<std::string_view> allowed,
                   const std::string& where) {
  for (const auto& [key, value] : object.items()) {
    if (std::find(allowed.begin(), allowed.end(), key) == allowed.end()) {
      return InvalidArgument(where + ": unknown field " + Quote(key) + "; allowed are " + Join(allowed));
    }
  }
  return OkStatus();
}

Result<std::string> StringField(const Json& object, const char* field, const std::string& where,
                                std::string_view expected) {
  const auto found = object.find(field);
  const std::string path = where + field;
  if (found == object.end()) {
    return InvalidArgument(path + " is missing; expected " + std::string(expected));
  }
  if (!found->is_string()) {
    return InvalidArgument(path + " is " + Quote(*found) + "; expected " + std::string(expected));
  }
  return found->get<std::string>();
}

Result<int> IntField(const Json& object, const char* field, int low, int high, const std::string& where) {
  const auto found = object.find(field);
  const std::string path = where + field;
  const std::string expected = low == high
                                   ? "the integer " + std::to_string(low)
                                   : "an integer from " + std::to_string(low) + " to " + std::to_string(high);
  if (found == object.end()) return InvalidArgument(path + " is missing; expected " + expected);
  // Unsigned values past int64_t become negative, and `low` is never below zero.
  const bool in_range =
      found->is_number_integer() && found->get<int64_t>() >= low && found->get<int64_t>() <= high;
  if (!in_range) return InvalidArgument(path + " is " + Quote(*found) + "; expected " + expected);
  return found->get<int>();
}

Result<PolicyRule> ParseRule(const Json& json, const std::string& where) {
  if (!json.is_object()) {
    return InvalidArgument(where + " is " + Quote(json) +
                           R"(; expected an object such as {"match": "*/image/*", "format": "k2v2"})");
  }
  RETURN_IF_ERROR(CheckFields(json, {"match", "format"}, where));
  PolicyRule rule;
  ASSIGN_OR_RETURN(rule.match,
                   StringField(json, "match", where + ".", "a string temporal/modal/semantic, * for any"));
  const std::string formats = "one of " + Join(FormatNames());
  ASSIGN_OR_RETURN(const std::string name, StringField(json, "format", where + ".", formats));
  const std::optional<Format> format = ParseFormat(name);
  if (!format) {
    return InvalidArgument(where + ".format: " + Quote(name) + " is no format; use " + formats);
  }
  rule.format = *format;
  return rule;
}

bool IsNameChar(char c) {
  return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '-' || c == '_' ||
         c == '.';
}

Policy Builtin(std::string name, std::string description, std::vector<PolicyRule> rules,
               int recent_window = 0) {
  Policy policy{std::move(name), std::move(description), std::move(rules), recent_window, /*table=*/{}};
  CHECK(Resolve(policy.name, &policy).ok());
  return policy;
}

const std::vector<Policy>& Builtins() {
  static const std::vector<Policy> policies = {
      Builtin("bf16", "Everything in BF16: the uncompressed baseline.", {{"*/*/*", Format::kBf16}}),
      Builtin("fp8", "Everything at 8 bits (E4M3).", {{"*/*/*", Format::kFp8}}),
      Builtin("int4", "Everything at 4 bits.", {{"*/*/*", Format::kK4V4}}),
      Builtin("int2", "Everything at 2 bits.", {{"*/*/*", Format::kK2V2}}),
      Builtin("kivi",
              "KIVI (arXiv 2402.02750): 2 bits but for a window of the newest 128 tokens in BF16; meant for "
              "the codec `paper`, whose 2-bit keys are per channel.",
              {{"*/*/*", Format::kK2V2}}, /*recent_window=*/128),
      Builtin(
          "paper",
          "TriAxialKV's fixed table (arXiv 2605.17170): instructions, scaffolding, tool calls and the text "
          "of the current turn at 4 bits, the rest at 2.",
          {{"*/*/{inst,delim,tool_call}", Format::kK4V4},
           {"current/text/*", Format::kK4V4},
           {"*/*/*", Format::kK2V2}}),
  };
  return policies;
}

}  // namespace

std::vector<std::string_view> BuiltinPolicies() {
  std::vector<std::string_view> names;
  names.reserve(Builtins().size());
  for (const Policy& policy : Builtins()) names.push_back(policy.name);
  return names;
}

Result<Policy> LoadPolicy(const std::string& name_or_path) {
  for (const Policy& policy : Builtins()) {
    if (policy.name == name_or_path) return policy;
  }
  std::error_code ignored;
  if (!std::filesystem::exists(name_or_path, ignored)) {
    return NotFound("policy " + Quote(name_or_path) + " is neither built in (" + Join(BuiltinPolicies()) +
                    ") nor a file");
  }
  ASSIGN_OR_RETURN(const Json json, ReadJsonFile(name_or_path, kMaxPolicyBytes));
  return ParsePolicy(json, name_or_path);
}

Result<Policy> ParsePolicy(const Json& json, std::string_view what_view) {
  const std::string what(what_view);
  if (!json.is_object()) {
    return InvalidArgument(what + " is not a JSON object; expected {\"version\": " +
                           std::to_string(kPolicyVersion) + R"(, "name": "...", "rules": [...]})");
  }
  RETURN_IF_ERROR(CheckFields(json, {"version", "name", "description", "rules", "recent_window"}, what));
  RETURN_IF_ERROR(IntField(json, "version", kPolicyVersion, kPolicyVersion, what + ": ").status());
  Policy policy;
  constexpr std::string_view kNameRule = "1 to 64 letters, digits, dots, dashes or underscores";
  ASSIGN_OR_RETURN(policy.name, StringField(json, "name", what + ": ", kNameRule));
  if (policy.name.empty() || policy.name.size() > kMaxName ||
      !std::all_of(policy.name.begin(), policy.name.end(), IsNameChar)) {
    return InvalidArgument(what + ": name is " + Quote(policy.name) + "; expected " + std::string(kNameRule));
  }
  if (json.contains("description")) {
    ASSIGN_OR_RETURN(policy.description, StringField(json, "description", what + ": ", "a string"));
  }
  if (json.contains("recent_window")) {
    ASSIGN_OR_RETURN(policy.recent_window, IntField(json, "recent_window", 0, kMaxRecentWindow, what + ": "));
  }
  const auto rules = json.find("rules");
  if (rules == json.end() || !rules->is_array() || rules->empty() || rules->size() > kMaxRules) {
    return InvalidArgument(what + ": rules " +
                           (rules == json.end()  ? "is missing"
                            : !rules->is_array() ? "is " + Quote(*rules)
                                                 : "has " + std::to_string(rules->size()) + " entries") +
                           "; expected an array of 1 to " + std::to_string(kMaxRules) + " rules such as " +
                           std::string(kRemedyCatchAll));
  }
  for (size_t r = 0; r < rules->size(); ++r) {
    ASSIGN_OR_RETURN(PolicyRule rule, ParseRule((*rules)[r], what + ": rules[" + std::to_string(r) + "]"));
    policy.rules.push_back(std::move(rule));
  }
  RETURN_IF_ERROR(Resolve(what, &policy));
  return policy;
}

Json PolicyToJson(const Policy& policy) {
  Json rules = Json::array();
  for (const PolicyRule& rule : policy.rules) {
    rules.push_back(Json{{"match", rule.match}, {"format", std::string(Name(rule.format))}});
  }
  Json json;
  json["version"] = kPolicyVersion;
  json["name"] = policy.name;
  json["description"] = policy.description;
  json["rules"] = std::move(rules);
  json["recent_window"] = policy.recent_window;
  return json;
}

Format BlockFormat(std::span<const Format> wishes) {
  CHECK(!wishes.empty());
  std::array<size_t, kFormats> count{};
  for (const Format wish : wishes) ++count[static_cast<size_t>(wish)];
  size_t served = 0;
  for (size_t f = 0; f < kFormats; ++f) {
    served += count[f];
    if (2 * served > wishes.size()) return static_cast<Format>(f);
  }
  return Format::kBf16;
}

}  // namespace triaxial
