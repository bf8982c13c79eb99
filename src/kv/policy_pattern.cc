#include "kv/policy_pattern.h"

#include <algorithm>

#include "kv/format.h"

namespace triaxial {
namespace {

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
    return InvalidArgument(where + ": " + QuoteValue(part) + " has a brace without its partner; write {a,b}");
  }
  for (const std::string& value : Split(braces ? part.substr(1, part.size() - 2) : part, ',')) {
    const auto found = std::find(names.begin(), names.end(), value);
    if (found == names.end()) {
      return InvalidArgument(where + ": " + QuoteValue(value) + " is no " + std::string(axis) +
                             " value; use " + JoinNames(names) + ", {a,b} for several or * for any");
    }
    (*matches)[static_cast<size_t>(found - names.begin())] = true;
  }
  return OkStatus();
}

}  // namespace

std::string QuoteValue(const Json& value) {
  std::string text = value.dump(-1, ' ', true, Json::error_handler_t::replace);
  if (text.size() > 80) text = text.substr(0, 77) + "...";
  return text;
}

std::vector<std::string_view> FormatNames() {
  std::vector<std::string_view> names;
  names.reserve(kFormats);
  for (int f = 0; f < kFormats; ++f) names.push_back(Name(static_cast<Format>(f)));
  return names;
}

Result<TagSet> ParseTagPattern(const std::string& match, const std::string& where) {
  const std::vector<std::string> parts = Split(match, '/');
  if (parts.size() != 3) {
    return InvalidArgument(where + ": " + QuoteValue(match) + " has " + std::to_string(parts.size()) +
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

}  // namespace triaxial
