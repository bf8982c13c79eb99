#include "text/tool_call_json.h"

#include <algorithm>

#include "base/json.h"

namespace triaxial {
namespace {

constexpr std::string_view kSpace = " \t\r\n";

// Steps through the text of an object that is known to be valid JSON.
class MemberScanner {
 public:
  explicit MemberScanner(std::string_view object) : text_(object) {}

  // The text of the value of the last member `key` of the object.
  std::string_view Find(std::string_view key) {
    std::string_view found;
    Skip("{");
    while (at_ < text_.size() && text_[at_] != '}') {
      const std::string_view name = Value();
      Skip(":");
      const std::string_view value = Value();
      Skip(",");
      // Keys may be written with escapes; the parser knows what they mean.
      if (const Result<Json> parsed = ParseJson(name, "key"); parsed.ok() && *parsed == key) found = value;
    }
    return found;
  }

 private:
  void SkipSpace() {
    while (at_ < text_.size() && kSpace.find(text_[at_]) != std::string_view::npos) ++at_;
  }
  // Skips one of `characters`, if it stands here, and the whitespace around it.
  void Skip(std::string_view characters) {
    SkipSpace();
    if (at_ < text_.size() && characters.find(text_[at_]) != std::string_view::npos) ++at_;
    SkipSpace();
  }
  // The value that begins here: up to a separator outside of strings and brackets.
  std::string_view Value() {
    const size_t begin = at_;
    bool in_string = false;
    for (int depth = 0; at_ < text_.size(); ++at_) {
      const char c = text_[at_];
      if (in_string) {
        if (c == '\\') ++at_;
        in_string = c != '"';
        continue;
      }
      if (depth == 0 && (c == ',' || c == ':' || c == '}' || kSpace.find(c) != std::string_view::npos)) break;
      if (c == '"') in_string = true;
      if (c == '{' || c == '[') ++depth;
      if (c == '}' || c == ']') --depth;
    }
    return text_.substr(begin, at_ - begin);
  }

  std::string_view text_;
  size_t at_ = 0;
};

}  // namespace

std::optional<ToolCall> ParseToolCallJson(std::string_view text) {
  text.remove_prefix(std::min(text.find_first_not_of(kSpace), text.size()));
  if (!text.starts_with('{')) return std::nullopt;  // the parser would also take a byte order mark
  const Result<Json> json = ParseJson(text, "tool call");
  if (!json.ok()) return std::nullopt;
  const auto name = json->find("name");
  if (name == json->end() || !name->is_string()) return std::nullopt;
  ToolCall call;
  call.name = name->get<std::string>();
  const auto arguments = json->find("arguments");
  if (arguments == json->end()) {
    call.arguments = "{}";
  } else if (arguments->is_string()) {
    call.arguments = arguments->get<std::string>();
  } else if (arguments->is_object()) {
    call.arguments = std::string(MemberScanner(text).Find("arguments"));
  } else {
    return std::nullopt;
  }
  return call;
}

}  // namespace triaxial
