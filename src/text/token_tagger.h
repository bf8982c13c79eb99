// Tags from token ids alone: for raw completion prompts, whose structure nobody vouches for, and for
// generated tokens.
#ifndef TRIAXIAL_TEXT_TOKEN_TAGGER_H_
#define TRIAXIAL_TEXT_TOKEN_TAGGER_H_

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
};
MarkupIds FindMarkup(const Tokenizer& tokenizer);

// Spans of a raw prompt by scanning for markup: text before any <|im_start|> is `user` of turn 0.
std::vector<TagSpan> ScanSpans(const std::vector<int32_t>& tokens, const MarkupIds& markup);

// Semantic of generated tokens, one by one: reasoning, tool_call, assistant; markup itself is delim.
class GenerationTagger {
 public:
  GenerationTagger(const MarkupIds& markup, bool starts_in_thought)
      : markup_(markup), state_(starts_in_thought ? Semantic::kReasoning : Semantic::kAssistant) {}
  Semantic Next(int32_t token);

 private:
  MarkupIds markup_;
  Semantic state_;
};

}  // namespace triaxial

#endif  // TRIAXIAL_TEXT_TOKEN_TAGGER_H_
