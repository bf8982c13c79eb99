// Tags from token ids alone: for raw completion prompts, whose structure nobody vouches for, and for
// generated tokens.
#ifndef TRIAXIAL_TEXT_TOKEN_TAGGER_H_
#define TRIAXIAL_TEXT_TOKEN_TAGGER_H_

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include "kv/tag.h"
#include "text/tokenizer.h"

namespace triaxial {

// Ids of the markup of Qwen3; -1 where the vocabulary has none. Trivially copyable, no strings: the engine
// holds one.
struct MarkupIds {
  int32_t im_start = -1, im_end = -1, vision_start = -1, vision_end = -1, image_pad = -1;
  int32_t tool_call_begin = -1, tool_call_end = -1, tool_response_begin = -1, tool_response_end = -1;
  int32_t think_begin = -1, think_end = -1;
  int32_t role_system = -1, role_user = -1, role_assistant = -1;  // single-token role names, if they are
  std::array<int32_t, 4> newlines = {-1, -1, -1, -1};  // "\n", "\n\n", ..., where they are single tokens

  // The markers that a generation may hold: newlines around them belong to the scaffolding.
  bool IsMarker(int32_t token) const {
    return token >= 0 &&
           (token == tool_call_begin || token == tool_call_end || token == think_begin || token == think_end);
  }
  bool IsNewline(int32_t token) const {
    return token >= 0 && std::find(newlines.begin(), newlines.end(), token) != newlines.end();
  }
};
MarkupIds FindMarkup(const Tokenizer& tokenizer);

// Spans of a raw prompt by scanning for markup, with the rules of the chat templates: text before any
// <|im_start|>, and of a role that is not a single token, is `user`. `message` is -1 throughout.
std::vector<TagSpan> ScanSpans(const std::vector<int32_t>& tokens, const MarkupIds& markup);

// Semantic of generated tokens, one by one: reasoning, tool_call, assistant; markup itself and the newlines
// that follow it are delim. Inside a thought only </think> means something: a thought may talk about calls.
class GenerationTagger {
 public:
  GenerationTagger(const MarkupIds& markup, bool starts_in_thought)
      : markup_(markup), state_(starts_in_thought ? Semantic::kReasoning : Semantic::kAssistant) {}
  Semantic Next(int32_t token);
  // What the next token is unless it is markup.
  Semantic state() const { return state_; }

 private:
  MarkupIds markup_;
  Semantic state_;
  bool after_marker_ = false;
};

}  // namespace triaxial

#endif  // TRIAXIAL_TEXT_TOKEN_TAGGER_H_
