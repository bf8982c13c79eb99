#include <condition_variable>
#include <cstdio>
#include <deque>
#include <mutex>

#include "apps/commands.h"
#include "apps/terminal.h"
#include "base/json.h"
#include "text/conversation_file.h"
#include "text/output_parser.h"

namespace triaxial {
namespace {

// Hands events from the engine's thread to this one.
class EventQueue {
 public:
  void Push(TokenEvent&& event) {
    const std::lock_guard lock(mutex_);
    events_.push_back(std::move(event));
    ready_.notify_one();
  }
  TokenEvent Pop() {
    std::unique_lock lock(mutex_);
    ready_.wait(lock, [this] { return !events_.empty(); });
    TokenEvent event = std::move(events_.front());
    events_.pop_front();
    return event;
  }

 private:
  std::mutex mutex_;
  std::condition_variable ready_;
  std::deque<TokenEvent> events_;
};

void Print(const OutputDelta& delta, bool* in_reasoning) {
  if (!delta.reasoning.empty()) {
    *in_reasoning = true;
    std::fputs(Paint(Semantic::kReasoning, delta.reasoning).c_str(), stdout);
  }
  if (*in_reasoning && (!delta.content.empty() || !delta.tool_calls.empty())) {
    std::fputs("\n", stdout);
    *in_reasoning = false;
  }
  std::fputs(delta.content.c_str(), stdout);
  for (const ToolCall& call : delta.tool_calls) {
    std::printf("%s(%s)\n", Paint(Semantic::kToolCall, call.name).c_str(), call.arguments.c_str());
  }
  std::fflush(stdout);
}

void PrintMemory(const RequestStats& stats, const KvGeometry& geometry) {
  std::puts("");
  Table table({"format", "tokens", "bytes", "bits/element"}, {false, true, true, true});
  for (int f = kFormats - 1; f >= 0; --f) {
    const auto i = static_cast<size_t>(f);
    if (stats.kv.tokens[i] == 0) continue;
    const Format format = static_cast<Format>(f);
    table.Add({Paint(format, Name(format)), Count(stats.kv.tokens[i]),
               Bytes(static_cast<double>(stats.kv.bytes[i])), Fixed(EffectiveBits(geometry, format), 2)});
  }
  const double bf16 = static_cast<double>(stats.kv.total_tokens()) *
                      static_cast<double>(BlockBytes(geometry, Format::kBf16)) / kBlockTokens;
  table.Add({"total", Count(stats.kv.total_tokens()), Bytes(static_cast<double>(stats.kv.total_bytes())),
             Fixed(stats.effective_bits, 2)});
  table.Print();
  std::printf(
      "%d prompt + %d new tokens, %.2fx less KV memory than BF16, first token after %.0f ms, %.1f tokens/s\n",
      stats.prompt_tokens, stats.completion_tokens,
      bf16 / static_cast<double>(std::max<int64_t>(1, stats.kv.total_bytes())), stats.ttft_seconds * 1e3,
      stats.completion_tokens > 1
          ? (stats.completion_tokens - 1) / std::max(1e-9, stats.total_seconds - stats.ttft_seconds)
          : 0.0);
}

}  // namespace

Command AddGenerate(CLI::App* app) {
  struct Flags {
    ModelFlags model;
    std::string prompt, messages;
    int line = 0;
    std::vector<std::string> images;
    SamplingParams sampling;
    bool raw = false, json = false;
  };
  auto flags = std::make_shared<Flags>();
  flags->sampling.max_tokens = 1024;  // a model out of its depth may never stop
  CLI::App* command = app->add_subcommand("generate", "Answer one conversation or prompt in the terminal");
  AddCheckpointFlags(command, &flags->model);
  AddPolicyFlags(command, &flags->model);
  AddEngineFlags(command, &flags->model);
  CLI::Option* prompt = command->add_option("--prompt", flags->prompt, "A user message");
  CLI::Option* messages = command
                              ->add_option("--messages", flags->messages,
                                           "JSON file with messages and tools ('-': standard input)")
                              ->excludes(prompt);
  command->add_option("--line", flags->line, "Line of a file with one conversation a line, from 1")
      ->needs(messages)
      ->check(CLI::Range(1, 1 << 30));
  command->add_option("--image", flags->images, "Image file put before the prompt; may be repeated")
      ->excludes(messages);
  command->add_flag("--raw", flags->raw, "Complete the prompt as it is, without the chat template");
  command
      ->add_option("--max-tokens", flags->sampling.max_tokens,
                   "Most tokens to generate; 0: until the model stops")
      ->check(CLI::Range(0, 1 << 30))
      ->capture_default_str();
  CLI::Option* temperature = command->add_option("--temperature", flags->sampling.temperature,
                                                 "0: greedy (default: the checkpoint's)");
  command->add_option("--top-p", flags->sampling.top_p, "Nucleus");
  command->add_option("--top-k", flags->sampling.top_k, "0: off");
  CLI::Option* seed = command->add_option("--seed", flags->sampling.seed, "Makes sampling repeatable");
  command->add_flag("--json", flags->json, "Print the answer and its memory as JSON");
  return [flags, temperature, seed]() -> Status {
    ASSIGN_OR_RETURN(const ServedModel model, LoadServedModel(flags->model.model, flags->model.tokenizer));
    Request request;
    OutputOptions output;
    if (flags->raw) {
      if (!flags->images.empty()) return InvalidArgument("--raw takes no --image");
      request.prompt = BuildRawPrompt(model, model.tokenizer->Encode(flags->prompt, ParseSpecial::kAll));
    } else {
      Conversation conversation;
      std::string images;  // directory of the pictures
      if (!flags->messages.empty()) {
        ASSIGN_OR_RETURN(const ConversationLine line, LoadConversation(flags->messages, flags->line));
        ASSIGN_OR_RETURN(conversation, line.Parse());
        images = line.images;
      } else {
        if (flags->prompt.empty() && flags->images.empty())
          return InvalidArgument("nothing to answer: give --prompt TEXT or --messages FILE");
        Message message;
        for (const std::string& image : flags->images)
          message.content.push_back({ContentPart::Kind::kImage, image});
        if (!flags->prompt.empty()) message.content.push_back({ContentPart::Kind::kText, flags->prompt});
        conversation.messages.push_back(std::move(message));
      }
      // A recorded conversation that ends with the assistant's answer is asked again for that answer.
      auto& messages = conversation.messages;
      while (messages.size() > 1 && messages.back().role == Role::kAssistant) messages.pop_back();
      const TemplateOptions options;
      ASSIGN_OR_RETURN(request.prompt, BuildChatPrompt(model, conversation, options, ImageFromFiles(images)));
      request.starts_in_thought = model.chat_template->GenerationStartsInThought(options);
      output.parse_reasoning = true;
      output.starts_in_thought = request.starts_in_thought;
      output.parse_tool_calls = !conversation.tools.empty();
    }
    request.sampling = flags->sampling;
    if (temperature->count() == 0 && model.generation.do_sample) {
      request.sampling.temperature = model.generation.temperature;
      request.sampling.top_p = model.generation.top_p;
      request.sampling.top_k = model.generation.top_k;
    }
    request.sampling.has_seed = seed->count() > 0;
    ASSIGN_OR_RETURN(const std::unique_ptr<Engine> engine, StartEngine(flags->model, model));
    EventQueue events;
    request.on_event = [&events](TokenEvent&& event) { events.Push(std::move(event)); };
    const Result<RequestId> id = engine->Submit(std::move(request));
    if (!id.ok()) return id.status();
    OutputParser parser(*model.tokenizer, output);
    OutputDelta answer;
    bool in_reasoning = false;
    const auto collect = [&answer](const OutputDelta& part) {
      answer.content += part.content;
      answer.reasoning += part.reasoning;
      answer.tool_calls.insert(answer.tool_calls.end(), part.tool_calls.begin(), part.tool_calls.end());
    };
    while (true) {
      const TokenEvent event = events.Pop();
      if (event.finish == FinishReason::kError) return event.error;
      OutputDelta delta;
      if (event.token >= 0 && event.finish != FinishReason::kStop) delta = parser.Push(event.token);
      if (!flags->json) Print(delta, &in_reasoning);
      collect(delta);
      if (event.finish == FinishReason::kNone) continue;
      delta = parser.Finish();
      collect(delta);
      if (!flags->json) {
        Print(delta, &in_reasoning);
        PrintMemory(event.stats, engine->geometry());
        return OkStatus();
      }
      Json json = {{"content", answer.content},
                   {"reasoning_content", answer.reasoning},
                   {"tool_calls", Json::array()}};
      for (const ToolCall& call : answer.tool_calls)
        json["tool_calls"].push_back({{"name", call.name}, {"arguments", call.arguments}});
      json["prompt_tokens"] = event.stats.prompt_tokens;
      json["completion_tokens"] = event.stats.completion_tokens;
      json["kv_bytes"] = event.stats.kv.total_bytes();
      json["kv_effective_bits"] = event.stats.effective_bits;
      for (int f = 0; f < kFormats; ++f)
        json["kv_tokens"][std::string(Name(static_cast<Format>(f)))] =
            event.stats.kv.tokens[static_cast<size_t>(f)];
      std::puts(json.dump(2, ' ', false, Json::error_handler_t::replace).c_str());
      return OkStatus();
    }
  };
}

}  // namespace triaxial
