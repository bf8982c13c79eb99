#include "text/stop_strings.h"

#include <algorithm>

#include "text/utf8.h"

namespace triaxial {

StopStrings::StopStrings(const std::vector<std::string>& strings) {
  for (const std::string& string : strings) {
    if (string.empty()) continue;
    Pattern pattern;
    pattern.text = ToValidUtf8(string);  // so that a match begins and ends between characters
    const std::string& text = pattern.text;
    pattern.border.assign(text.size() + 1, 0);
    for (size_t n = 1, border = 0; n < text.size(); ++n) {
      while (border > 0 && text[n] != text[border]) border = pattern.border[border];
      if (text[n] == text[border]) ++border;
      pattern.border[n + 1] = border;
    }
    patterns_.push_back(std::move(pattern));
  }
}

StopStrings::Match StopStrings::Push(std::string_view text) {
  if (patterns_.empty()) return {};
  for (size_t i = 0; i < text.size(); ++i) {
    Match match;
    for (Pattern& pattern : patterns_) {
      size_t& matched = pattern.matched;
      while (matched > 0 && text[i] != pattern.text[matched]) matched = pattern.border[matched];
      if (text[i] == pattern.text[matched]) ++matched;
      if (matched == pattern.text.size()) {
        match = {true, i + 1, std::max(match.length, matched)};
        matched = pattern.border[matched];
      }
    }
    if (match.found) return match;
  }
  return {};
}

size_t StopStrings::held() const {
  size_t held = 0;
  for (const Pattern& pattern : patterns_) held = std::max(held, pattern.matched);
  return held;
}

}  // namespace triaxial
