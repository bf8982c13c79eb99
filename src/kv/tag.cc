#include "kv/tag.h"

#include <array>

#include "base/check.h"

namespace triaxial {
namespace {

constexpr std::array<std::string_view, kTemporals> kTemporalNames = {"current", "m1", "m2", "older"};
constexpr std::array<std::string_view, kModals> kModalNames = {"text", "image"};
constexpr std::array<std::string_view, kSemantics> kSemanticNames = {
    "inst", "user", "assistant", "reasoning", "tool_call", "obs", "delim"};

}  // namespace

std::string_view Name(Temporal temporal) { return kTemporalNames[static_cast<size_t>(temporal)]; }
std::string_view Name(Modal modal) { return kModalNames[static_cast<size_t>(modal)]; }
std::string_view Name(Semantic semantic) { return kSemanticNames[static_cast<size_t>(semantic)]; }

std::string Name(const Tag& tag) {
  std::string name(Name(tag.temporal));
  name += '/';
  name += Name(tag.modal);
  name += '/';
  name += Name(tag.semantic);
  return name;
}

std::vector<Tag> TagTokens(const std::vector<TagSpan>& spans, int32_t tokens) {
  std::vector<Tag> tags;
  tags.reserve(static_cast<size_t>(tokens));
  const int last_turn = spans.empty() ? 0 : spans.back().turn;
  for (const TagSpan& span : spans) {
    CHECK(span.begin == static_cast<int32_t>(tags.size()) && span.end >= span.begin && span.end <= tokens);
    tags.resize(static_cast<size_t>(span.end), Tag{Age(span.turn, last_turn), span.modal, span.semantic});
  }
  CHECK(static_cast<int32_t>(tags.size()) == tokens);
  return tags;
}

}  // namespace triaxial
