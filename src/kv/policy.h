// A policy says which format a token's tag deserves. It never sees a page: (tag) -> format.
#ifndef TRIAXIAL_KV_POLICY_H_
#define TRIAXIAL_KV_POLICY_H_

#include <array>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/json.h"
#include "base/status.h"
#include "kv/format.h"
#include "kv/tag.h"

namespace triaxial {

struct PolicyRule {
  std::string match;  // "temporal/modal/semantic", "*" for any; "{a,b}" for one of several
  Format format = Format::kBf16;
};

// Two kinds: a fixed policy says a format for every tag (`rules`); a priced one says what each format costs a
// token of each tag (`distortion`), and a block takes the format of least distortion + price * bytes
// (kv/need.h), so that its formats follow from one price per byte.
struct Policy {
  std::string name;
  std::string description;
  std::vector<PolicyRule> rules;  // of a fixed policy; first match wins
  int recent_window = 0;          // the newest tokens, rounded up to blocks, stay bf16 whatever their tags
  std::array<Format, kTags> table{};  // the rules, resolved for every tag

  bool priced = false;
  // Of a priced policy: loss of one token of a tag stored at a format; 0 for bf16, falling with bits.
  std::array<std::array<float, kFormats>, kTags> distortion{};
  std::array<double, kTags> counts{};  // tokens by tag in the workload that it was calibrated on; any scale
  double budget_bits = 0;              // effective bits at which it rests on that workload; 0: see price
  double price = 0;                    // distortion per byte of one token at rest, where budget_bits is 0
  std::vector<PolicyRule> pins;        // of both kinds: tokens of these tags never get less than this format
  std::array<Format, kTags> floor{};   // the pins, resolved: the most that any asks for
  Format sink = Format::kK2V2;         // a sequence's first block never gets less
  Json provenance;                     // where it comes from, for people and tools; null if it does not say

  Format FormatOf(const Tag& tag) const { return table[static_cast<size_t>(tag.index())]; }
};

inline constexpr int kPolicyVersion = 1;

// Built-in names: "bf16", "int4", "int2", "kivi", "paper".
std::vector<std::string_view> BuiltinPolicies();
// A built-in by name, else a JSON file, fixed or priced:
//   {"version": 1, "name": "...", "description": "...", "recent_window": 0,
//    "rules": [{"match": "*/image/*", "format": "k2v2"}, ...]}
//   {"version": 1, "name": "...", "distortion": {"current/text/inst": {"k2v2": 3e-4, "k4v4": 2e-6}, ...},
//    "counts": {"current/text/inst": 812, ...}, "budget_bits": 2.8}      (or "price": 1e-9)
// and in both kinds, optionally, "pins": [{"match": "*/*/inst", "format": "k4v4"}], "sink": "k4v4" and
// "provenance": {...}, free but for the types of model, model_hash, tokenizer_hash, data_hash, codec, metric,
// date, tool_version (strings), layers (integers), conversations (an integer) and predicted_loss (a number).
//
// Keys of `distortion` are patterns too; the first match wins and every tag must be matched by some rule or
// entry. Losses are of one token, finite, not negative, and fall with bits; bf16 loses nothing. A format
// missing from an entry has not been measured: it counts as no better than the next one of fewer bits (the
// format of fewest bits is required), so that no price makes a block take it.
// Errors name the file, the field and the remedy; unknown fields are errors.
Result<Policy> LoadPolicy(const std::string& name_or_path);
Result<Policy> ParsePolicy(const Json& json, std::string_view what);
Json PolicyToJson(const Policy& policy);
// Fills policy->table from its rules; InvalidArgument that begins with `what` unless they cover all tags.
Status ResolveRules(const std::string& what, Policy* policy);

// The format of a block whose tokens wish for `wishes` (usually 64, at least 1): the median wish in the order
// of Format, that is, by bits; a tie takes the more precise one. So at most half of a block's tokens get less
// than they wish and at most half get more. docs/kv-format.md, "What a block takes".
//
// Measured under the policy `paper` on the recorded agent trajectories in tests/data (348,000 tokens of
// complete blocks, Qwen3-VL's tokenizer), codec `rotated`; bytes are against every token stored at its own
// wish:
//   a block goes up once        text: get less, get more, bytes     screenshots: the same
//   one token asks for more           0.0%   10.1%   1.064                0.0%   10.1%   1.079
//   a quarter of them do              0.8%    2.6%   1.011                0.7%    1.3%   1.005
//   half of them do (the rule)        1.7%    1.1%   0.996                1.0%    0.5%   0.996
//   all of them do                    4.2%    0.0%   0.974                1.8%    0.0%   0.986
// Half is the rule whose errors cancel: what a policy was calculated to cost is what the cache takes.
Format BlockFormat(std::span<const Format> wishes);

}  // namespace triaxial

#endif  // TRIAXIAL_KV_POLICY_H_
