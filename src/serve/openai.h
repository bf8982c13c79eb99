// The OpenAI schema: request JSON to plain structs, results to response JSON. No sockets, no engine.
#ifndef TRIAXIAL_SERVE_OPENAI_H_
#define TRIAXIAL_SERVE_OPENAI_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "base/json.h"
#include "engine/request.h"
#include "kv/format.h"
#include "serve/served_model.h"
#include "text/output_parser.h"

namespace triaxial {

// A chat or text completion request, validated, with its prompt rendered.
struct ApiRequest {
  bool chat = false;
  Prompt prompt;
  SamplingParams sampling;
  OutputOptions output;
  bool starts_in_thought = false;
  bool stream = false;
  bool include_usage = false;
  std::vector<int32_t>
      forced;  // tokens that tool_choice put at the end of the prompt and that open the answer
  std::string cache_salt;
  Format min_format = Format::kK2V2;
  int priority = 0;
  double timeout_seconds = 0;  // 0: the request has none of its own
  // The server fills these in.
  std::string tenant;
  Json messages, tools;  // of the body, if the conversation is to be recorded, else null
};

// Body of POST /v1/chat/completions and /v1/completions. Unknown fields are ignored; a field of the wrong
// type or out of range is InvalidArgument naming it; an unknown model is NotFound.
Result<ApiRequest> ParseChatRequest(const Json& body, const ServedModel& model);
Result<ApiRequest> ParseCompletionRequest(const Json& body, const ServedModel& model);

// Body of POST /tokenize: the ids of a prompt or of rendered messages.
Result<std::vector<int32_t>> ParseTokenizeRequest(const Json& body, const ServedModel& model);
// Body of POST /detokenize: {"tokens": [...]}.
Result<std::vector<int32_t>> ParseDetokenizeRequest(const Json& body, const ServedModel& model);

// What all answers to one request share.
struct AnswerHead {
  std::string id;
  std::string model;
  int64_t created = 0;  // seconds since 1970
  bool chat = false;
};

// Log probabilities of the tokens behind one answer or delta.
Json LogprobsJson(const std::vector<TokenEvent>& events, const Tokenizer& tokenizer, bool chat,
                  int64_t* text_offset);

Json UsageJson(const RequestStats& stats, int reasoning_tokens);
// The assistant's message of a chat answer, as clients send it back in their next request. tool_calls have
// ids.
Json MessageJson(const OutputDelta& message);
// A whole answer.
Json AnswerJson(const AnswerHead& head, const OutputDelta& message, const std::string& finish_reason,
                Json logprobs, Json usage);
// One streamed chunk. `first`: carries the role; tool calls are numbered from `first_call`. finish_reason ""
// while it goes on.
Json ChunkJson(const AnswerHead& head, const OutputDelta& delta, bool first, int first_call,
               const std::string& finish_reason, Json logprobs);
// The last chunk when stream_options.include_usage is set: no choices.
Json UsageChunkJson(const AnswerHead& head, Json usage);

int HttpStatus(Code code);
// retry_after_seconds: when to come again; 0: not said.
Json ErrorJson(const Status& status, int retry_after_seconds = 0);
std::string_view Name(FinishReason reason);  // "stop", "length", ...

}  // namespace triaxial

#endif  // TRIAXIAL_SERVE_OPENAI_H_
