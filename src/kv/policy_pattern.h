// Patterns over tags ("temporal/modal/semantic") and the words of messages about policy files.
#ifndef TRIAXIAL_KV_POLICY_PATTERN_H_
#define TRIAXIAL_KV_POLICY_PATTERN_H_

#include <bitset>
#include <string>
#include <string_view>
#include <vector>

#include "base/json.h"
#include "base/status.h"
#include "kv/tag.h"

namespace triaxial {

using TagSet = std::bitset<kTags>;  // by Tag::index

// The tags that "temporal/modal/semantic" names, "*" for any value and "{a,b}" for one of several.
// InvalidArgument that begins with `where`.
Result<TagSet> ParseTagPattern(const std::string& match, const std::string& where);

// What a message quotes of a value from a file: all of a short one, the start of a long one, in ASCII.
std::string QuoteValue(const Json& value);

template <typename Names>
std::string JoinNames(const Names& names) {
  std::string text;
  for (const auto& name : names) {
    if (!text.empty()) text += ", ";
    text += name;
  }
  return text;
}
std::vector<std::string_view> FormatNames();  // from fewest to most bits

}  // namespace triaxial

#endif  // TRIAXIAL_KV_POLICY_PATTERN_H_
