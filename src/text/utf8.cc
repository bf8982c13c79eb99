#include "text/utf8.h"

#include <utf8proc.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

namespace triaxial {
namespace {

size_t AsciiPrefix(std::string_view text) {
  size_t i = 0;
  for (uint64_t word; i + 8 <= text.size(); i += 8) {
    std::memcpy(&word, text.data() + i, 8);
    if (word & 0x8080808080808080u) break;
  }
  while (i < text.size() && static_cast<uint8_t>(text[i]) < 0x80) ++i;
  return i;
}

// Appends the normalization of a stretch of text. utf8proc's own ordering of combining marks is an insertion
// sort, which a hostile text makes quadratic; so decomposition and composition are its, the ordering is ours.
void AppendNfc(std::string_view text, std::string* out) {
  std::vector<utf8proc_int32_t> chars;
  chars.reserve(text.size());
  const auto* bytes = reinterpret_cast<const utf8proc_uint8_t*>(text.data());
  for (size_t at = 0; at < text.size();) {
    utf8proc_int32_t c = 0;
    const auto length = utf8proc_iterate(bytes + at, static_cast<utf8proc_ssize_t>(text.size() - at), &c);
    if (length <= 0) break;  // the text is valid UTF-8
    at += static_cast<size_t>(length);
    utf8proc_int32_t parts[16];
    int boundary = 0;
    const auto n = utf8proc_decompose_char(c, parts, std::size(parts), UTF8PROC_COMPOSE, &boundary);
    if (n > 0 && n <= static_cast<utf8proc_ssize_t>(std::size(parts))) {
      chars.insert(chars.end(), parts, parts + n);
    } else {
      chars.push_back(c);
    }
  }
  const auto mark_class = [](utf8proc_int32_t c) { return utf8proc_get_property(c)->combining_class; };
  for (size_t i = 0; i < chars.size();) {
    size_t end = i;
    while (end < chars.size() && mark_class(chars[end]) != 0) ++end;
    if (end > i + 1) {
      std::stable_sort(chars.begin() + i, chars.begin() + end,
                       [&](auto a, auto b) { return mark_class(a) < mark_class(b); });
    }
    i = std::max(end, i + 1);
  }
  const auto n = utf8proc_normalize_utf32(chars.data(), static_cast<utf8proc_ssize_t>(chars.size()),
                                          static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE));
  for (utf8proc_ssize_t i = 0; i < n; ++i) {
    utf8proc_uint8_t encoded[4];
    const auto length = utf8proc_encode_char(chars[i], encoded);
    out->append(reinterpret_cast<const char*>(encoded), static_cast<size_t>(length));
  }
}

// No character below U+0300 changes in NFC, nor do two of them compose.
bool BelowU0300(std::string_view text) {
  return std::none_of(text.begin(), text.end(), [](char c) { return static_cast<uint8_t>(c) >= 0xCC; });
}

}  // namespace

Utf8Step NextUtf8(std::string_view bytes) {
  const auto byte = [&](size_t i) { return static_cast<uint8_t>(bytes[i]); };
  const uint8_t lead = byte(0);
  if (lead < 0x80) return {Utf8Step::Kind::kCharacter, 1};
  if (lead < 0xC2 || lead > 0xF4) return {Utf8Step::Kind::kInvalid, 1};
  const size_t length = lead < 0xE0 ? 2 : lead < 0xF0 ? 3 : 4;
  for (size_t i = 1; i < length; ++i) {
    if (i == bytes.size()) return {Utf8Step::Kind::kIncomplete, i};
    // The second byte also rules out overlong forms, surrogates and what lies beyond U+10FFFF.
    const uint8_t low = i > 1 ? 0x80 : lead == 0xE0 ? 0xA0 : lead == 0xF0 ? 0x90 : 0x80;
    const uint8_t high = i > 1 ? 0xBF : lead == 0xED ? 0x9F : lead == 0xF4 ? 0x8F : 0xBF;
    if (byte(i) < low || byte(i) > high) return {Utf8Step::Kind::kInvalid, i};
  }
  return {Utf8Step::Kind::kCharacter, length};
}

bool IsAscii(std::string_view text) { return AsciiPrefix(text) == text.size(); }

std::string ToValidUtf8(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  while (!text.empty()) {
    size_t length = AsciiPrefix(text);
    if (length > 0) {
      out += text.substr(0, length);
    } else {
      const Utf8Step step = NextUtf8(text);
      length = step.length;
      out += step.kind == Utf8Step::Kind::kCharacter ? text.substr(0, length) : kReplacement;
    }
    text.remove_prefix(length);
  }
  return out;
}

std::string ToNfc(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  while (!text.empty()) {
    const size_t ascii = AsciiPrefix(text);
    if (ascii == text.size()) return out.append(text);
    // Only the last character of a stretch of ASCII can take up marks that follow it.
    const size_t begin = ascii > 0 ? ascii - 1 : 0;
    out += text.substr(0, begin);
    size_t end = ascii;
    while (end < text.size() && static_cast<uint8_t>(text[end]) >= 0x80) ++end;
    const std::string_view stretch = text.substr(begin, end - begin);
    if (BelowU0300(stretch)) {
      out += stretch;
    } else {
      AppendNfc(stretch, &out);
    }
    text.remove_prefix(end);
  }
  return out;
}

}  // namespace triaxial
