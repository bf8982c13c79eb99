#include "calib/eval_policy.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <optional>
#include <utility>

namespace triaxial {
namespace {

// Cuts what follows the last `mark` off `text`; nullopt if there is none.
std::optional<std::string> CutSuffix(char mark, std::string* text) {
  const size_t at = text->rfind(mark);
  if (at == std::string::npos) return std::nullopt;
  std::string suffix = text->substr(at + 1);
  text->resize(at);
  return suffix;
}

Result<Axes> ParseAxes(const std::string& text, const std::string& spec) {
  Axes axes;
  for (size_t begin = 0; begin <= text.size();) {
    const size_t end = std::min(text.find('-', begin), text.size());
    const std::string axis = text.substr(begin, end - begin);
    begin = end + 1;
    bool* kept = axis == "temporal"   ? &axes.temporal
                 : axis == "modal"    ? &axes.modal
                 : axis == "semantic" ? &axes.semantic
                                      : nullptr;
    if (kept == nullptr) {
      return InvalidArgument(fmt::format(
          "--kv {}: '{}' is no axis; use temporal, modal or semantic, joined by '-'", spec, axis));
    }
    *kept = true;
  }
  return axes;
}

Result<double> ParseBits(const std::string& text, const std::string& spec) {
  double bits = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), bits);
  if (error != std::errc() || end != text.data() + text.size() || !(bits > 0 && bits <= 16)) {
    return InvalidArgument(
        fmt::format("--kv {}: '{}' is no budget; use effective bits up to 16", spec, text));
  }
  return bits;
}

size_t KeptIndex(const Axes& axes, int index) {
  Tag tag = Tag::FromIndex(index);
  if (!axes.temporal) tag.temporal = Temporal::kCurrent;
  if (!axes.modal) tag.modal = Modal::kText;
  if (!axes.semantic) tag.semantic = Semantic::kInst;
  return static_cast<size_t>(tag.index());
}

}  // namespace

void KeepAxes(const Axes& axes, Policy* policy) {
  std::array<std::array<double, kFormats>, kTags> loss{};
  std::array<double, kTags> counts{};
  for (int t = 0; t < kTags; ++t) {
    const auto tag = static_cast<size_t>(t);
    const size_t kept = KeptIndex(axes, t);
    counts[kept] += policy->counts[tag];
    for (size_t f = 0; f < kFormats; ++f) loss[kept][f] += policy->counts[tag] * policy->distortion[tag][f];
  }
  for (int t = 0; t < kTags; ++t) {
    const size_t kept = KeptIndex(axes, t);
    if (counts[kept] <= 0) continue;  // never seen: as it was
    for (size_t f = 0; f < kFormats; ++f) {
      policy->distortion[static_cast<size_t>(t)][f] = static_cast<float>(loss[kept][f] / counts[kept]);
    }
  }
}

Result<EvalPolicy> ParseEvalPolicy(const std::string& spec, Codec codec) {
  EvalPolicy policy;
  policy.codec = codec;
  std::string name = spec;
  std::string suffix;
  if (const std::optional<std::string> text = CutSuffix('@', &name)) {
    const std::optional<Codec> said = ParseCodec(*text);
    if (!said) {
      return InvalidArgument(fmt::format("--kv {}: '{}' is no codec; use @rotated or @paper", spec, *text));
    }
    policy.codec = *said;
    suffix = "@" + *text;
  }
  std::optional<Axes> axes;
  if (const std::optional<std::string> text = CutSuffix('+', &name)) {
    ASSIGN_OR_RETURN(axes, ParseAxes(*text, spec));
    suffix = "+" + *text + suffix;
  }
  std::optional<double> bits;
  if (const std::optional<std::string> text = CutSuffix(':', &name)) {
    ASSIGN_OR_RETURN(bits, ParseBits(*text, spec));
    suffix = ":" + *text + suffix;
  }
  ASSIGN_OR_RETURN(policy.policy, LoadPolicy(name));
  policy.name = policy.policy.name + suffix;
  if ((axes || bits) && !policy.policy.priced) {
    return InvalidArgument(
        fmt::format("--kv {}: {} is a fixed policy, which has neither a budget nor losses to average; "
                    "calibrate a priced one",
                    spec, policy.policy.name));
  }
  if (axes) KeepAxes(*axes, &policy.policy);
  if (bits) policy.policy.budget_bits = *bits;
  return policy;
}

Result<std::vector<EvalPolicy>> ParseEvalPolicies(const std::string& list, Codec codec) {
  std::vector<EvalPolicy> policies;
  for (size_t begin = 0; begin <= list.size();) {
    const size_t end = std::min(list.find(',', begin), list.size());
    const std::string spec = list.substr(begin, end - begin);
    begin = end + 1;
    if (spec.empty()) {
      return InvalidArgument("--kv " + list + " has an empty entry; separate policies by one comma");
    }
    ASSIGN_OR_RETURN(EvalPolicy policy, ParseEvalPolicy(spec, codec));
    for (const EvalPolicy& other : policies) {
      if (other.name == policy.name) return InvalidArgument("--kv has two policies named " + policy.name);
    }
    policies.push_back(std::move(policy));
  }
  return policies;
}

}  // namespace triaxial
