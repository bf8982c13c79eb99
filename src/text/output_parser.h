// From generated tokens to what a client sees: text without halves of characters, stop strings removed,
// reasoning and tool calls told apart from content.
#ifndef TRIAXIAL_TEXT_OUTPUT_PARSER_H_
#define TRIAXIAL_TEXT_OUTPUT_PARSER_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "text/conversation.h"
#include "text/token_tagger.h"
#include "text/tokenizer.h"

namespace triaxial {

struct OutputOptions {
  bool parse_reasoning = false;    // split <think>...</think> off as reasoning
  bool starts_in_thought = false;  // the prompt ended in "<think>\n"
  bool parse_tool_calls = false;   // only when the request carries tools
  bool skip_special_tokens = true;
  std::vector<std::string> stop;  // matched on content, reasoning and raw text alike; not part of the output
  bool include_stop = false;
};

// What one Push or Finish added; concatenated over a stream the strings give the whole message.
struct OutputDelta {
  std::string content;
  std::string reasoning;
  std::vector<ToolCall>
      tool_calls;  // complete calls, arguments as the model wrote them; `id` is empty, the caller makes one
  bool stopped = false;  // a stop string was found: push no more tokens
};

// A tool call whose JSON is malformed is not lost: its text, tags included, becomes content.
class OutputParser {
 public:
  OutputParser(const Tokenizer& tokenizer, OutputOptions options);
  OutputParser(OutputParser&&) noexcept;
  ~OutputParser();
  OutputDelta Push(int32_t token);
  OutputDelta Finish();  // flushes what waited (partial stop strings, unfinished calls, half characters)

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace triaxial

#endif  // TRIAXIAL_TEXT_OUTPUT_PARSER_H_
