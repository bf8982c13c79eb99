#include <cmath>
#include <limits>

#include "serve/openai.h"

namespace triaxial {
namespace {

constexpr size_t kMaxSaltBytes = 256;
constexpr double kMaxTimeoutSeconds = 86400;

Status WrongType(std::string_view field, std::string_view expected, const Json& found) {
  return InvalidArgument(std::string(field) + " must be " + std::string(expected) + ", found " +
                         found.type_name());
}

// A reader of optional fields: null counts as absent; the first error sticks.
class Fields {
 public:
  explicit Fields(const Json& body) : body_(body) {}

  const Json* Find(const char* name) const {
    const auto it = body_.find(name);
    return it == body_.end() || it->is_null() ? nullptr : &*it;
  }
  void Read(const char* name, float* out) {
    if (const Json* value = Find(name)) {
      if (!value->is_number()) return Fail(WrongType(name, "a number", *value));
      *out = value->get<float>();
    }
  }
  // Text of at most `max_bytes`.
  void Read(const char* name, size_t max_bytes, std::string* out) {
    if (const Json* value = Find(name)) {
      if (!value->is_string()) return Fail(WrongType(name, "a string", *value));
      const std::string& text = value->get_ref<const std::string&>();
      if (text.size() > max_bytes) {
        return Fail(InvalidArgument(std::string(name) + " has " + std::to_string(text.size()) +
                                    " bytes; at most " + std::to_string(max_bytes) + " are allowed"));
      }
      *out = text;
    }
  }
  void Read(const char* name, bool* out) {
    if (const Json* value = Find(name)) {
      if (!value->is_boolean()) return Fail(WrongType(name, "true or false", *value));
      *out = value->get<bool>();
    }
  }
  // Integers, also written as 5.0; `low` and `high` are inclusive.
  template <typename Int>
  void Read(const char* name, Int low, Int high, Int* out) {
    if (const Json* value = Find(name)) {
      const bool whole = value->is_number() && std::trunc(value->get<double>()) == value->get<double>();
      if (!whole) return Fail(WrongType(name, "an integer", *value));
      const double number = value->get<double>();
      if (number < static_cast<double>(low) || number > static_cast<double>(high)) {
        return Fail(InvalidArgument(std::string(name) + " is " + value->dump() + "; it must lie between " +
                                    std::to_string(low) + " and " + std::to_string(high)));
      }
      *out = value->is_number_float() ? static_cast<Int>(number) : value->get<Int>();
    }
  }
  void Fail(Status status) {
    if (status_.ok()) status_ = std::move(status);
  }
  const Status& status() const { return status_; }

 private:
  const Json& body_;
  Status status_;
};

Status CheckBody(const Json& body, const ServedModel& model) {
  if (!body.is_object()) return WrongType("the request body", "a JSON object", body);
  if (const auto it = body.find("model"); it != body.end() && !it->is_null()) {
    if (!it->is_string()) return WrongType("model", "a string", *it);
    const std::string& name = it->get_ref<const std::string&>();
    if (!name.empty() && name != model.name && name != model.directory) {
      return NotFound("the model '" + name + "' does not exist here; this server has '" + model.name + "'");
    }
  }
  return OkStatus();
}

Status ReadTokenIds(const Json& value, std::string_view field, const ServedModel& model,
                    std::vector<int32_t>* out) {
  if (!value.is_array()) return WrongType(field, "a list of token ids", value);
  for (size_t i = 0; i < value.size(); ++i) {
    const Json& id = value[i];
    if (!id.is_number_integer() || id.get<int64_t>() < 0 ||
        id.get<int64_t>() >= model.config.text.vocab_size) {
      return InvalidArgument(
          std::string(field) + "[" + std::to_string(i) + "] must be a token id from 0 to " +
          std::to_string(model.config.text.vocab_size - 1) + ", found " + id.dump().substr(0, 40));
    }
    out->push_back(id.get<int32_t>());
  }
  return OkStatus();
}

Status ReadStop(const Fields& fields, std::vector<std::string>* stop) {
  const Json* value = fields.Find("stop");
  if (value == nullptr) return OkStatus();
  const Json list = value->is_string() ? Json::array({*value}) : *value;
  if (!list.is_array()) return WrongType("stop", "a string or a list of strings", *value);
  if (list.size() > 16)
    return InvalidArgument("stop has " + std::to_string(list.size()) + " entries; at most 16 are allowed");
  for (const Json& entry : list) {
    if (!entry.is_string()) return WrongType("stop", "a string or a list of strings", entry);
    if (!entry.get_ref<const std::string&>().empty()) stop->push_back(entry.get<std::string>());
  }
  return OkStatus();
}

// How the request's blocks are shared, stored and scheduled.
Status ReadServing(const Fields& fields, ApiRequest* request) {
  if (const Json* format = fields.Find("kv_min_format")) {
    if (!format->is_string()) return WrongType("kv_min_format", "the name of a format", *format);
    const std::optional<Format> parsed = ParseFormat(format->get_ref<const std::string&>());
    if (!parsed) {
      std::string names;
      for (int f = 0; f < kFormats; ++f)
        names += std::string(f > 0 ? ", " : "") + std::string(Name(static_cast<Format>(f)));
      return InvalidArgument("kv_min_format is '" + format->get_ref<const std::string&>().substr(0, 40) +
                             "'; it must be one of " + names);
    }
    request->min_format = *parsed;
  }
  if (const Json* timeout = fields.Find("timeout")) {
    if (!timeout->is_number()) return WrongType("timeout", "a number of seconds", *timeout);
    const double seconds = timeout->get<double>();
    if (!(seconds > 0 && seconds <= kMaxTimeoutSeconds)) {
      return InvalidArgument("timeout is " + timeout->dump() + "; it must be more than 0 and at most " +
                             std::to_string(static_cast<int>(kMaxTimeoutSeconds)) + " seconds");
    }
    request->timeout_seconds = seconds;
  }
  return OkStatus();
}

// What chat and text completions share.
Status ReadCommon(const Json& body, const ServedModel& model, ApiRequest* request) {
  Fields fields(body);
  SamplingParams& sampling = request->sampling;
  if (model.generation.do_sample) {
    sampling.temperature = model.generation.temperature;
    sampling.top_p = model.generation.top_p;
    sampling.top_k = model.generation.top_k;
  }
  sampling.repetition_penalty = model.generation.repetition_penalty;
  fields.Read("temperature", &sampling.temperature);
  fields.Read("top_p", &sampling.top_p);
  fields.Read("top_k", -1, std::numeric_limits<int>::max(), &sampling.top_k);
  if (sampling.top_k < 0) sampling.top_k = 0;  // -1 means off to vLLM's clients
  fields.Read("min_p", &sampling.min_p);
  fields.Read("presence_penalty", &sampling.presence_penalty);
  fields.Read("frequency_penalty", &sampling.frequency_penalty);
  fields.Read("repetition_penalty", &sampling.repetition_penalty);
  if (fields.Find("seed") != nullptr) {
    int64_t seed = 0;
    fields.Read("seed", std::numeric_limits<int64_t>::min(), std::numeric_limits<int64_t>::max(), &seed);
    sampling.seed = static_cast<uint64_t>(seed);
    sampling.has_seed = true;
  }
  fields.Read("max_tokens", 1, std::numeric_limits<int>::max(), &sampling.max_tokens);
  fields.Read("max_completion_tokens", 1, std::numeric_limits<int>::max(), &sampling.max_tokens);
  fields.Read("ignore_eos", &sampling.ignore_eos);
  fields.Read("stream", &request->stream);
  fields.Read("skip_special_tokens", &request->output.skip_special_tokens);
  fields.Read("include_stop_str_in_output", &request->output.include_stop);
  fields.Read("cache_salt", kMaxSaltBytes, &request->cache_salt);
  fields.Read("priority", -100, 100, &request->priority);
  int n = 1;
  fields.Read("n", std::numeric_limits<int>::min(), std::numeric_limits<int>::max(), &n);
  if (n != 1)
    fields.Fail(InvalidArgument("n is " + std::to_string(n) +
                                "; only n = 1 is supported, send several requests instead"));
  if (const Json* options = fields.Find("stream_options")) {
    if (!options->is_object()) {
      fields.Fail(WrongType("stream_options", "an object", *options));
    } else {
      Fields inner(*options);
      inner.Read("include_usage", &request->include_usage);
      if (!inner.status().ok()) fields.Fail(InvalidArgument("stream_options." + inner.status().message()));
    }
  }
  RETURN_IF_ERROR(fields.status());
  if (const Json* ids = fields.Find("stop_token_ids")) {
    RETURN_IF_ERROR(ReadTokenIds(*ids, "stop_token_ids", model, &sampling.stop_token_ids));
  }
  RETURN_IF_ERROR(ReadStop(fields, &request->output.stop));
  RETURN_IF_ERROR(ReadServing(fields, request));
  return Validate(sampling);
}

enum class ToolChoice { kAuto, kNone, kRequired };

// tool_choice as OpenAI defines it; `name` is set for a named function.
Result<ToolChoice> ReadToolChoice(const Json& body, const Conversation& conversation, const Json& tools,
                                  std::string* name) {
  const auto it = body.find("tool_choice");
  if (it == body.end() || it->is_null()) return ToolChoice::kAuto;
  if (it->is_string()) {
    const std::string& choice = it->get_ref<const std::string&>();
    if (choice == "auto") return ToolChoice::kAuto;
    if (choice == "none") return ToolChoice::kNone;
    if (choice == "required") {
      if (conversation.tools.empty())
        return InvalidArgument("tool_choice is 'required' but the request has no tools");
      return ToolChoice::kRequired;
    }
    return InvalidArgument("tool_choice is '" + choice.substr(0, 40) +
                           "'; auto, none, required or a named function are supported");
  }
  const auto function = it->is_object() ? it->find("function") : it->end();
  if (!it->is_object() || function == it->end() || !function->is_object() || !function->contains("name") ||
      !function->at("name").is_string()) {
    return InvalidArgument(
        "tool_choice must be auto, none, required or {\"type\": \"function\", \"function\": {\"name\": "
        "...}}");
  }
  *name = function->at("name").get<std::string>();
  for (const Json& tool : tools) {
    if (tool.is_object() && tool.contains("function") && tool["function"].is_object() &&
        tool["function"].value("name", "") == *name) {
      return ToolChoice::kRequired;
    }
  }
  return InvalidArgument("tool_choice names the function '" + *name +
                         "', which is not among the request's tools");
}

Result<TemplateOptions> ReadTemplateOptions(const Json& body) {
  TemplateOptions options;
  Fields fields(body);
  fields.Read("add_generation_prompt", &options.add_generation_prompt);
  if (const Json* kwargs = fields.Find("chat_template_kwargs")) {
    if (!kwargs->is_object()) return WrongType("chat_template_kwargs", "an object", *kwargs);
    Fields inner(*kwargs);
    inner.Read("enable_thinking", &options.enable_thinking);
    inner.Read("add_vision_id", &options.add_vision_id);
    inner.Read("add_generation_prompt", &options.add_generation_prompt);
    if (!inner.status().ok()) return InvalidArgument("chat_template_kwargs." + inner.status().message());
  }
  RETURN_IF_ERROR(fields.status());
  return options;
}

Json ToolsOf(const Json& body) {
  const auto it = body.find("tools");
  return it == body.end() ? Json(nullptr) : *it;
}

Result<Conversation> ReadConversation(const Json& body, const Json& tools) {
  const auto messages = body.find("messages");
  if (messages == body.end()) return InvalidArgument("messages is missing");
  return ParseConversation(*messages, tools);
}

// Makes the answer begin with a tool call: its opening is appended to the prompt as if the model had written
// it.
void ForceToolCall(const ServedModel& model, const std::string& name, ApiRequest* request) {
  std::string opening = request->starts_in_thought ? "\n</think>\n\n" : "";
  opening += "<tool_call>\n{\"name\": \"";
  if (!name.empty()) {
    const std::string quoted = DumpJsonLikePython(Json(name));
    // Without the space that follows: it belongs to the token that opens the arguments.
    opening += quoted.substr(1, quoted.size() - 2) + "\", \"arguments\":";
  }
  request->forced = model.tokenizer->Encode(opening, ParseSpecial::kMarkup);
  GenerationTagger tagger(model.markup, request->starts_in_thought);
  Prompt& prompt = request->prompt;
  for (const int32_t token : request->forced) {
    TagSpan span = prompt.spans.back();  // turn and message of the generation prompt
    span.begin = static_cast<int32_t>(prompt.tokens.size());
    span.end = span.begin + 1;
    span.modal = Modal::kText;
    span.semantic = tagger.Next(token);
    prompt.tokens.push_back(token);
    if (TagSpan& last = prompt.spans.back(); last.semantic == span.semantic && last.modal == span.modal) {
      last.end = span.end;
    } else {
      prompt.spans.push_back(span);
    }
  }
}

}  // namespace

Result<ApiRequest> ParseChatRequest(const Json& body, const ServedModel& model) {
  RETURN_IF_ERROR(CheckBody(body, model));
  ApiRequest request;
  request.chat = true;
  RETURN_IF_ERROR(ReadCommon(body, model, &request));
  Fields fields(body);
  bool logprobs = false;
  int top_logprobs = 0;
  fields.Read("logprobs", &logprobs);
  fields.Read("top_logprobs", 0, 20, &top_logprobs);
  RETURN_IF_ERROR(fields.status());
  if (top_logprobs > 0 && !logprobs) return InvalidArgument("top_logprobs needs logprobs to be true");
  if (logprobs) request.sampling.logprobs = top_logprobs;
  ASSIGN_OR_RETURN(const TemplateOptions options, ReadTemplateOptions(body));
  const Json tools = ToolsOf(body);
  ASSIGN_OR_RETURN(Conversation conversation, ReadConversation(body, tools));
  std::string forced_name;
  ASSIGN_OR_RETURN(const ToolChoice choice, ReadToolChoice(body, conversation, tools, &forced_name));
  if (choice == ToolChoice::kNone) conversation.tools.clear();
  request.output.parse_tool_calls = !conversation.tools.empty();
  ASSIGN_OR_RETURN(request.prompt, BuildChatPrompt(model, conversation, options, ImageFromDataUrl));
  request.starts_in_thought = model.chat_template->GenerationStartsInThought(options);
  request.output.parse_reasoning = true;
  request.output.starts_in_thought = request.starts_in_thought;
  if (choice == ToolChoice::kRequired) ForceToolCall(model, forced_name, &request);
  return request;
}

Result<ApiRequest> ParseCompletionRequest(const Json& body, const ServedModel& model) {
  RETURN_IF_ERROR(CheckBody(body, model));
  ApiRequest request;
  request.sampling.max_tokens = 16;  // the API's default for this endpoint
  RETURN_IF_ERROR(ReadCommon(body, model, &request));
  Fields fields(body);
  bool echo = false;
  fields.Read("echo", &echo);
  fields.Read("logprobs", 0, 20, &request.sampling.logprobs);
  RETURN_IF_ERROR(fields.status());
  if (echo) return InvalidArgument("echo is not supported; prepend the prompt on the client's side");
  const Json* prompt = fields.Find("prompt");
  if (prompt == nullptr) return InvalidArgument("prompt is missing");
  if (prompt->is_array() && prompt->size() == 1 && !prompt->front().is_number()) prompt = &prompt->front();
  std::vector<int32_t> tokens;
  if (prompt->is_string()) {
    RETURN_IF_ERROR(CheckPromptBytes(model, prompt->get_ref<const std::string&>().size()));
    tokens = model.tokenizer->Encode(prompt->get_ref<const std::string&>(), ParseSpecial::kAll);
  } else if (prompt->is_array() && !prompt->empty() && prompt->front().is_number()) {
    RETURN_IF_ERROR(ReadTokenIds(*prompt, "prompt", model, &tokens));
  } else if (prompt->is_array() && prompt->size() > 1) {
    return InvalidArgument(
        "prompt has " + std::to_string(prompt->size()) +
        " entries; one prompt a request is supported, send several requests (they are batched)");
  } else {
    return WrongType("prompt", "a string or a list of token ids", *prompt);
  }
  request.prompt = BuildRawPrompt(model, std::move(tokens));
  return request;
}

Result<std::vector<int32_t>> ParseTokenizeRequest(const Json& body, const ServedModel& model) {
  RETURN_IF_ERROR(CheckBody(body, model));
  Fields fields(body);
  bool parse_special = true;
  bool add_special = false;  // accepted for compatibility: these vocabularies add none
  fields.Read("parse_special", &parse_special);
  fields.Read("add_special_tokens", &add_special);
  RETURN_IF_ERROR(fields.status());
  if (fields.Find("messages") != nullptr) {
    ASSIGN_OR_RETURN(const TemplateOptions options, ReadTemplateOptions(body));
    ASSIGN_OR_RETURN(const Conversation conversation, ReadConversation(body, ToolsOf(body)));
    ASSIGN_OR_RETURN(Prompt prompt, BuildChatPrompt(model, conversation, options, ImageFromDataUrl));
    return std::move(prompt.tokens);
  }
  const Json* prompt = fields.Find("prompt");
  if (prompt == nullptr) return InvalidArgument("give either prompt or messages");
  if (!prompt->is_string()) return WrongType("prompt", "a string", *prompt);
  RETURN_IF_ERROR(CheckPromptBytes(model, prompt->get_ref<const std::string&>().size()));
  return model.tokenizer->Encode(prompt->get_ref<const std::string&>(),
                                 parse_special ? ParseSpecial::kAll : ParseSpecial::kNone);
}

Result<std::vector<int32_t>> ParseDetokenizeRequest(const Json& body, const ServedModel& model) {
  RETURN_IF_ERROR(CheckBody(body, model));
  const auto tokens = body.find("tokens");
  if (tokens == body.end()) return InvalidArgument("tokens is missing");
  std::vector<int32_t> ids;
  RETURN_IF_ERROR(ReadTokenIds(*tokens, "tokens", model, &ids));
  return ids;
}

}  // namespace triaxial
