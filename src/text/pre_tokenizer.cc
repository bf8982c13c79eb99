#include "text/pre_tokenizer.h"

#include <new>

#define PCRE2_CODE_UNIT_WIDTH 8
#include <pcre2.h>

namespace triaxial {
namespace {

// The reference reads \s as the Unicode property White_Space. PCRE2 adds U+180E, so the list is spelled out.
std::string SpellOutSpaces(std::string_view pattern) {
  constexpr std::string_view kSpaces =
      "\\x{9}-\\x{d}\\x{20}\\x{85}\\x{a0}\\x{1680}\\x{2000}-\\x{200a}\\x{2028}\\x{2029}\\x{202f}\\x{205f}"
      "\\x{3000}";
  std::string out;
  bool in_class = false;
  for (size_t i = 0; i < pattern.size(); ++i) {
    const char c = pattern[i];
    if (c == '\\' && i + 1 < pattern.size()) {
      const char escaped = pattern[++i];
      if (escaped == 's') {
        out += in_class ? std::string(kSpaces) : "[" + std::string(kSpaces) + "]";
      } else if (escaped == 'S' && !in_class) {
        out += "[^" + std::string(kSpaces) + "]";
      } else {
        out += c;
        out += escaped;
      }
      continue;
    }
    out += c;
    if (in_class) {
      in_class = c != ']';
    } else if (c == '[') {
      in_class = true;
      // A ']' that stands first in a class is a member of it.
      if (i + 1 < pattern.size() && pattern[i + 1] == '^') out += pattern[++i];
      if (i + 1 < pattern.size() && pattern[i + 1] == ']') out += pattern[++i];
    }
  }
  return out;
}

}  // namespace

Result<PreTokenizer> PreTokenizer::Compile(const std::string& pattern, std::string_view what) {
  const std::string spelled = SpellOutSpaces(pattern);
  int error = 0;
  PCRE2_SIZE offset = 0;
  pcre2_code* code = pcre2_compile(reinterpret_cast<PCRE2_SPTR>(spelled.data()), spelled.size(),
                                   PCRE2_UTF | PCRE2_UCP | PCRE2_NEVER_BACKSLASH_C, &error, &offset, nullptr);
  if (code == nullptr) {
    PCRE2_UCHAR message[256];
    pcre2_get_error_message(error, message, sizeof(message));
    return InvalidArgument(std::string(what) + ": the pre-tokenizer's regular expression does not compile: " +
                           reinterpret_cast<const char*>(message));
  }
  // Where the machine forbids code generation the interpreter does the work.
  (void)pcre2_jit_compile(code, PCRE2_JIT_COMPLETE);
  PreTokenizer out;
  out.code_ = std::shared_ptr<pcre2_code>(code, [](pcre2_code* c) { pcre2_code_free(c); });
  return out;
}

void PreTokenizer::Splitter::Free::operator()(pcre2_match_data* match) const { pcre2_match_data_free(match); }

PreTokenizer::Splitter::Splitter(const PreTokenizer& pre_tokenizer, std::string_view text)
    : code_(pre_tokenizer.code_.get()), match_(pcre2_match_data_create(1, nullptr)), text_(text) {
  if (match_ == nullptr) throw std::bad_alloc();
}

bool PreTokenizer::Splitter::Next(std::string_view* piece) {
  if (at_ == text_.size()) return false;
  constexpr uint32_t kOptions = PCRE2_NO_UTF_CHECK | PCRE2_NOTEMPTY;
  const auto match = [&](uint32_t options) {
    return pcre2_match(code_, reinterpret_cast<PCRE2_SPTR>(text_.data()), text_.size(), at_, options,
                       match_.get(), nullptr);
  };
  int matched = match(kOptions);
  // The machine code has a small stack and a step limit of its own; the interpreter gets further.
  if (matched < 0 && matched != PCRE2_ERROR_NOMATCH) matched = match(kOptions | PCRE2_NO_JIT);
  size_t end = text_.size();  // no match: the rest is one piece, as it is when a limit was hit
  if (matched >= 0) {
    const PCRE2_SIZE* range = pcre2_get_ovector_pointer(match_.get());
    if (range[0] > at_) {
      end = range[0];
    } else if (range[1] > at_) {
      end = range[1];
    }
  }
  *piece = text_.substr(at_, end - at_);
  at_ = end;
  return true;
}

}  // namespace triaxial
