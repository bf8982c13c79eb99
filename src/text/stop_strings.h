// Finds stop strings in a stream of text and says how much of it can no longer be part of one.
#ifndef TRIAXIAL_TEXT_STOP_STRINGS_H_
#define TRIAXIAL_TEXT_STOP_STRINGS_H_

#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

namespace triaxial {

// The match that is complete first wins; of several that end together, the longest. So the result does not
// depend on how the stream is cut into pieces. Time is linear in the text, whatever the strings are.
class StopStrings {
 public:
  explicit StopStrings(const std::vector<std::string>& strings);  // empty strings are ignored

  struct Match {
    bool found = false;
    size_t end = 0;     // offset in the pushed text just after the match
    size_t length = 0;  // of the matched string; it may begin in text pushed before
  };
  Match Push(std::string_view text);
  // Bytes at the end of everything pushed that may turn out to be the beginning of a stop string.
  size_t held() const;

 private:
  struct Pattern {
    std::string text;
    std::vector<size_t> border;  // [n]: longest proper prefix of text[0, n) that is also its suffix
    size_t matched = 0;          // longest prefix of `text` that the stream ends with
  };
  std::vector<Pattern> patterns_;
};

}  // namespace triaxial

#endif  // TRIAXIAL_TEXT_STOP_STRINGS_H_
