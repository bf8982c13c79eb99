#include "engine/request.h"

#include <fmt/format.h>

#include <cmath>

namespace triaxial {
namespace {

constexpr int kMaxLogprobs = 20;

Status OutOfRange(const char* field, double value, const char* range) {
  return InvalidArgument(fmt::format("{} is {}; it must be {}", field, value, range));
}

}  // namespace

Status Validate(const SamplingParams& p) {
  // Comparisons are written so that NaN fails them.
  if (!(p.temperature >= 0 && p.temperature <= 100)) {
    return OutOfRange("temperature", p.temperature, "from 0 (greedy) to 100");
  }
  if (!(p.top_p > 0 && p.top_p <= 1)) return OutOfRange("top_p", p.top_p, "above 0 and at most 1");
  if (p.top_k < 0) return OutOfRange("top_k", p.top_k, "0 (off) or more");
  if (!(p.min_p >= 0 && p.min_p <= 1)) return OutOfRange("min_p", p.min_p, "from 0 to 1");
  if (!(std::abs(p.presence_penalty) <= 2)) {
    return OutOfRange("presence_penalty", p.presence_penalty, "from -2 to 2");
  }
  if (!(std::abs(p.frequency_penalty) <= 2)) {
    return OutOfRange("frequency_penalty", p.frequency_penalty, "from -2 to 2");
  }
  if (!(p.repetition_penalty >= 0.01f && p.repetition_penalty <= 100)) {
    return OutOfRange("repetition_penalty", p.repetition_penalty, "from 0.01 to 100 (1: off)");
  }
  if (p.max_tokens < 0) return OutOfRange("max_tokens", p.max_tokens, "0 (as many as fit) or more");
  if (p.logprobs < -1 || p.logprobs > kMaxLogprobs) {
    return OutOfRange("logprobs", p.logprobs, "from 0 to 20, or -1 for none");
  }
  return OkStatus();
}

}  // namespace triaxial
