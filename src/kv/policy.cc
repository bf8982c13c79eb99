#include "kv/policy.h"

#include <array>
#include <filesystem>

#include "base/check.h"
#include "kv/policy_pattern.h"

namespace triaxial {
namespace {

constexpr size_t kMaxPolicyBytes = size_t{1} << 20;

Policy Builtin(std::string name, std::string description, std::vector<PolicyRule> rules,
               int recent_window = 0) {
  Policy policy;
  policy.name = std::move(name);
  policy.description = std::move(description);
  policy.rules = std::move(rules);
  policy.recent_window = recent_window;
  CHECK(ResolveRules(policy.name, &policy).ok());
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
    return NotFound("policy " + QuoteValue(name_or_path) + " is neither built in (" +
                    JoinNames(BuiltinPolicies()) + ") nor a file");
  }
  ASSIGN_OR_RETURN(const Json json, ReadJsonFile(name_or_path, kMaxPolicyBytes));
  return ParsePolicy(json, name_or_path);
}

Format BlockFormat(std::span<const Format> wishes) {
  CHECK(!wishes.empty());
  const Format first = wishes.front();
  if (std::all_of(wishes.begin(), wishes.end(), [first](Format f) { return f == first; })) return first;
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
