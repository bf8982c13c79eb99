#include "serve/openai.h"

namespace triaxial {
namespace {

Json ToolCallJson(const ToolCall& call, std::optional<int> index) {
  Json json;
  if (index) json["index"] = *index;
  json["id"] = call.id;
  json["type"] = "function";
  json["function"] = {{"name", call.name}, {"arguments", call.arguments}};
  return json;
}

// JSON strings must be UTF-8; a token may hold half a character.
std::string Printable(std::string_view bytes) {
  Utf8Stream stream;
  std::string text = stream.Push(bytes);
  return text + stream.Finish();
}

Json ChatLogprob(const TokenLogprob& entry, const Tokenizer& tokenizer) {
  const std::string_view bytes = tokenizer.TokenBytes(entry.token);
  Json values = Json::array();
  for (const char c : bytes) values.push_back(static_cast<uint8_t>(c));
  return {{"token", Printable(bytes)}, {"logprob", entry.logprob}, {"bytes", std::move(values)}};
}

Json Head(const AnswerHead& head, std::string_view chat_object) {
  Json json;
  json["id"] = head.id;
  json["object"] = head.chat ? std::string(chat_object) : "text_completion";
  json["created"] = head.created;
  json["model"] = head.model;
  return json;
}

}  // namespace

std::string_view Name(FinishReason reason) {
  switch (reason) {
    case FinishReason::kNone:
      return "";
    case FinishReason::kStop:
      return "stop";
    case FinishReason::kLength:
      return "length";
    case FinishReason::kCancelled:
      return "abort";
    case FinishReason::kError:
      return "error";
  }
  return "";
}

Json LogprobsJson(const std::vector<TokenEvent>& events, const Tokenizer& tokenizer, bool chat,
                  int64_t* text_offset) {
  if (chat) {
    Json content = Json::array();
    for (const TokenEvent& event : events) {
      if (event.token < 0) continue;
      Json entry = ChatLogprob({event.token, event.logprob}, tokenizer);
      Json top = Json::array();
      for (const TokenLogprob& alternative : event.top) top.push_back(ChatLogprob(alternative, tokenizer));
      entry["top_logprobs"] = std::move(top);
      content.push_back(std::move(entry));
    }
    return {{"content", std::move(content)}};
  }
  Json json = {{"tokens", Json::array()},
               {"token_logprobs", Json::array()},
               {"top_logprobs", Json::array()},
               {"text_offset", Json::array()}};
  for (const TokenEvent& event : events) {
    if (event.token < 0) continue;
    const std::string text = Printable(tokenizer.TokenBytes(event.token));
    json["tokens"].push_back(text);
    json["token_logprobs"].push_back(event.logprob);
    Json top = Json::object();
    for (const TokenLogprob& alternative : event.top) {
      top[Printable(tokenizer.TokenBytes(alternative.token))] = alternative.logprob;
    }
    json["top_logprobs"].push_back(std::move(top));
    json["text_offset"].push_back(*text_offset);
    *text_offset += static_cast<int64_t>(text.size());
  }
  return json;
}

Json UsageJson(const RequestStats& stats, int reasoning_tokens) {
  Json tokens = Json::object();
  for (int f = 0; f < kFormats; ++f) {
    tokens[std::string(Name(static_cast<Format>(f)))] = stats.kv.tokens[static_cast<size_t>(f)];
  }
  Json json;
  json["prompt_tokens"] = stats.prompt_tokens;
  json["completion_tokens"] = stats.completion_tokens;
  json["total_tokens"] = stats.prompt_tokens + stats.completion_tokens;
  json["prompt_tokens_details"] = {{"cached_tokens", stats.cached_tokens}};
  json["completion_tokens_details"] = {{"reasoning_tokens", reasoning_tokens}};
  json["kv_bytes"] = stats.kv.total_bytes();
  json["kv_effective_bits"] = stats.effective_bits;
  json["kv_tokens"] = std::move(tokens);
  json["kv_demotions"] = stats.demotions;
  return json;
}

Json MessageJson(const OutputDelta& message) {
  Json json;
  json["role"] = "assistant";
  // OpenAI answers null content beside tool calls; text that is there is never dropped.
  json["content"] =
      message.content.empty() && !message.tool_calls.empty() ? Json(nullptr) : Json(message.content);
  if (!message.reasoning.empty()) json["reasoning_content"] = message.reasoning;
  if (!message.tool_calls.empty()) {
    json["tool_calls"] = Json::array();
    for (const ToolCall& call : message.tool_calls)
      json["tool_calls"].push_back(ToolCallJson(call, std::nullopt));
  }
  return json;
}

Json AnswerJson(const AnswerHead& head, const OutputDelta& message, const std::string& finish_reason,
                Json logprobs, Json usage) {
  Json choice;
  choice["index"] = 0;
  if (head.chat) {
    choice["message"] = MessageJson(message);
  } else {
    choice["text"] = message.content;
  }
  choice["logprobs"] = std::move(logprobs);
  choice["finish_reason"] = finish_reason;
  Json json = Head(head, "chat.completion");
  json["choices"] = Json::array({std::move(choice)});
  json["usage"] = std::move(usage);
  return json;
}

Json ChunkJson(const AnswerHead& head, const OutputDelta& delta, bool first, int first_call,
               const std::string& finish_reason, Json logprobs) {
  Json choice;
  choice["index"] = 0;
  if (head.chat) {
    Json out = Json::object();
    if (first) out["role"] = "assistant";
    if (!delta.reasoning.empty()) out["reasoning_content"] = delta.reasoning;
    if (!delta.content.empty() || (first && delta.reasoning.empty() && delta.tool_calls.empty()))
      out["content"] = delta.content;
    if (!delta.tool_calls.empty()) {
      out["tool_calls"] = Json::array();
      for (const ToolCall& call : delta.tool_calls)
        out["tool_calls"].push_back(ToolCallJson(call, first_call++));
    }
    choice["delta"] = std::move(out);
  } else {
    choice["text"] = delta.content;
  }
  choice["logprobs"] = std::move(logprobs);
  choice["finish_reason"] = finish_reason.empty() ? Json(nullptr) : Json(finish_reason);
  Json json = Head(head, "chat.completion.chunk");
  json["choices"] = Json::array({std::move(choice)});
  return json;
}

Json UsageChunkJson(const AnswerHead& head, Json usage) {
  Json json = Head(head, "chat.completion.chunk");
  json["choices"] = Json::array();
  json["usage"] = std::move(usage);
  return json;
}

int HttpStatus(Code code) {
  switch (code) {
    case Code::kOk:
      return 200;
    case Code::kInvalidArgument:
      return 400;
    case Code::kNotFound:
      return 404;
    case Code::kTooLarge:
      return 413;
    case Code::kResourceExhausted:
      return 429;
    case Code::kDeadlineExceeded:
      return 504;
    case Code::kUnavailable:
    case Code::kCancelled:
      return 503;
    case Code::kDataLoss:
    case Code::kInternal:
      return 500;
  }
  return 500;
}

Json ErrorJson(const Status& status, int retry_after_seconds) {
  const int code = HttpStatus(status.code());
  const char* type = code == 404   ? "not_found_error"
                     : code == 429 ? "rate_limit_error"
                     : code == 503 ? "service_unavailable_error"
                     : code == 504 ? "timeout_error"
                     : code >= 500 ? "server_error"
                                   : "invalid_request_error";
  Json error = {{"message", status.message()}, {"type", type}, {"param", nullptr}, {"code", code}};
  if (retry_after_seconds > 0) error["retry_after_seconds"] = retry_after_seconds;
  return {{"error", std::move(error)}};
}

}  // namespace triaxial
