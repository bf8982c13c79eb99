// The one place of this module that knows which byte sequences are UTF-8.
#ifndef TRIAXIAL_TEXT_UTF8_H_
#define TRIAXIAL_TEXT_UTF8_H_

#include <cstddef>
#include <string>
#include <string_view>

namespace triaxial {

inline constexpr std::string_view kReplacement = "\xEF\xBF\xBD";  // U+FFFD

struct Utf8Step {
  enum class Kind {
    kCharacter,   // `length` bytes are one character
    kInvalid,     // no character begins like this: one U+FFFD stands for `length` bytes
    kIncomplete,  // all of the bytes are the beginning of a character
  } kind;
  size_t length;
};
// What stands at the beginning of `bytes`, which must not be empty. Invalid bytes are grouped as the Unicode
// standard recommends ("maximal subparts"), so that the number of U+FFFD is the same as in Python and Rust.
Utf8Step NextUtf8(std::string_view bytes);

bool IsAscii(std::string_view text);
// The text with U+FFFD in place of what is not UTF-8.
std::string ToValidUtf8(std::string_view text);

// Normalization form C of valid UTF-8, in time n log n for any input.
std::string ToNfc(std::string_view valid_utf8);

}  // namespace triaxial

#endif  // TRIAXIAL_TEXT_UTF8_H_
