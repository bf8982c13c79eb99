#include "serve/completion.h"

#include <chrono>
#include <random>

#include "base/log.h"
#include "serve/api_keys.h"
#include "serve/request_log.h"

namespace triaxial {
namespace {

std::string RandomId(std::string_view prefix) {
  static constexpr char kHex[] = "0123456789abcdef";
  thread_local std::mt19937_64 generator{std::random_device{}()};
  std::string id(prefix);
  for (int i = 0; i < 24; ++i) id += kHex[generator() & 15];
  return id;
}

class Completion : public std::enable_shared_from_this<Completion> {
 public:
  Completion(ApiRequest&& request, const AnswerContext& context, std::shared_ptr<Responder> responder,
             std::function<void(std::function<void()>)> strand)
      : context_(context),
        responder_(std::move(responder)),
        strand_(std::move(strand)),
        chat_(request.chat),
        stream_(request.stream),
        include_usage_(request.include_usage),
        want_logprobs_(request.sampling.logprobs >= 0),
        record_(context.recorder != nullptr && !request.messages.is_null()),
        tenant_(request.tenant),
        parser_(*context.model->tokenizer, request.output),
        reasoning_(context.model->markup, request.starts_in_thought),
        forced_(std::move(request.forced)),
        messages_(std::move(request.messages)),
        tools_(std::move(request.tools)) {
    head_ = {
        RandomId(chat_ ? "chatcmpl-" : "cmpl-"), context.model->name,
        std::chrono::duration_cast<std::chrono::seconds>(std::chrono::system_clock::now().time_since_epoch())
            .count(),
        chat_};
    engine_request_.prompt = std::move(request.prompt);
    engine_request_.sampling = std::move(request.sampling);
    engine_request_.starts_in_thought = request.starts_in_thought && forced_.empty();
    engine_request_.salt = SaltOf(request.tenant, request.cache_salt);
    engine_request_.tenant = std::move(request.tenant);
    engine_request_.min_format = request.min_format;
    engine_request_.priority = request.priority;
    engine_request_.timeout_seconds = request.timeout_seconds;
  }

  // On the strand, so that no event overtakes what is noted here once the engine has the request.
  void Start() {
    strand_([self = shared_from_this()] { self->Submit(); });
  }

 private:
  void Submit() {
    for (const int32_t token : forced_) Take(parser_.Push(token));
    engine_request_.on_event = [self = shared_from_this()](TokenEvent&& event) {
      self->strand_([self, event = std::move(event)]() mutable { self->OnEvent(std::move(event)); });
    };
    const Result<RequestId> id = context_.engine->Submit(std::move(engine_request_));
    if (!id.ok()) {
      context_.metrics->CountRefused(id.status().code());
      return Refuse(id.status());
    }
    context_.ids->Add(head_.id, tenant_, *id);
    // Ids are never reused, so cancelling a finished request is harmless.
    responder_->OnHangUp([engine = context_.engine, request = *id] { engine->Cancel(request); });
  }

  static void Join(const OutputDelta& delta, OutputDelta* whole) {
    whole->content += delta.content;
    whole->reasoning += delta.reasoning;
    whole->tool_calls.insert(whole->tool_calls.end(), delta.tool_calls.begin(), delta.tool_calls.end());
    whole->stopped = whole->stopped || delta.stopped;
  }

  void Take(OutputDelta&& delta) {
    for (ToolCall& call : delta.tool_calls) call.id = RandomId("call_");
    Join(delta, &pending_);
    if (record_) Join(delta, &answer_);
  }

  void OnEvent(TokenEvent&& event) {
    const bool finished = event.finish != FinishReason::kNone;
    if (stopped_) {  // the engine was a step ahead of the stop string; its end brings the figures
      if (!finished) return;
      event.stats.completion_tokens = completion_tokens_;
      return End(FinishReason::kStop, event.stats);
    }
    const bool is_end_token = event.finish == FinishReason::kStop && event.token >= 0;
    if (event.token >= 0) {
      ++completion_tokens_;
      if (reasoning_.Next(event.token) == Semantic::kReasoning) ++reasoning_tokens_;
      // The token that ended the answer (<|im_end|>, or a stop id) is not part of its text.
      if (!is_end_token) {
        Take(parser_.Push(event.token));
        if (want_logprobs_) events_.push_back(event);
      }
    }
    if (finished) {
      if (event.finish == FinishReason::kError) return Fail(event.finish, event.stats, event.error);
      if (event.finish == FinishReason::kCancelled)
        return Fail(event.finish, event.stats,
                    Unavailable("the request was cancelled: the server is shutting down"));
      Take(parser_.Finish());
      return End(event.finish, event.stats);
    }
    if (pending_.stopped) {
      stopped_ = true;
      return context_.engine->Cancel(event.id);
    }
    if (stream_) SendDelta("");
  }

  void SendDelta(const std::string& finish_reason) {
    const bool empty = pending_.content.empty() && pending_.reasoning.empty() && pending_.tool_calls.empty();
    if (empty && finish_reason.empty()) return;
    Json logprobs = want_logprobs_ ? LogprobsJson(events_, *context_.model->tokenizer, chat_, &text_offset_)
                                   : Json(nullptr);
    events_.clear();
    if (!started_) responder_->Start("text/event-stream");
    const int calls = static_cast<int>(pending_.tool_calls.size());
    std::string out =
        Event(ChunkJson(head_, pending_, !started_, calls_, finish_reason, std::move(logprobs)));
    started_ = true;
    calls_ += calls;
    pending_ = {};
    responder_->Write(std::move(out));
  }

  static std::string Event(const Json& json) { return "data: " + DumpJson(json) + "\n\n"; }

  void Observe(FinishReason reason, const RequestStats& stats, const std::string& finish) {
    context_.metrics->ObserveFinished(stats, reason);
    if (reason == FinishReason::kStop || reason == FinishReason::kLength) context_.retry->Observe(stats);
    if (context_.log) spdlog::info("{}", FinishedLine(head_.id, tenant_, finish, stats));
  }

  void End(FinishReason reason, const RequestStats& stats) {
    const bool called = calls_ > 0 || !pending_.tool_calls.empty();
    const std::string finish =
        called && reason == FinishReason::kStop ? "tool_calls" : std::string(Name(reason));
    Observe(reason, stats, finish);
    if (record_) context_.recorder->Append(std::move(messages_), MessageJson(answer_), std::move(tools_));
    if (stream_) {
      SendDelta(finish);
      if (include_usage_)
        responder_->Write(Event(UsageChunkJson(head_, UsageJson(stats, reasoning_tokens_))));
      responder_->Write("data: [DONE]\n\n");
      responder_->Finish();
      return;
    }
    Json logprobs = want_logprobs_ ? LogprobsJson(events_, *context_.model->tokenizer, chat_, &text_offset_)
                                   : Json(nullptr);
    responder_->Send(200, "application/json",
                     DumpJson(AnswerJson(head_, pending_, finish, std::move(logprobs),
                                         UsageJson(stats, reasoning_tokens_))),
                     {});
  }

  void Refuse(const Status& status) {
    const int retry =
        status.code() == Code::kResourceExhausted ? context_.retry->Seconds(context_.engine->Snapshot()) : 1;
    SendError(status, responder_.get(), retry);
  }

  void Fail(FinishReason reason, const RequestStats& stats, const Status& status) {
    Observe(reason, stats, std::string(Name(reason)));
    if (!started_) return Refuse(status);
    responder_->Write(Event(ErrorJson(status)));
    responder_->Write("data: [DONE]\n\n");
    responder_->Finish();
  }

  const AnswerContext& context_;
  const std::shared_ptr<Responder> responder_;
  const std::function<void(std::function<void()>)> strand_;
  const bool chat_;
  const bool stream_;
  const bool include_usage_;
  const bool want_logprobs_;
  const bool record_;
  const std::string tenant_;
  Request engine_request_;
  AnswerHead head_;
  OutputParser parser_;
  GenerationTagger reasoning_;
  std::vector<int32_t> forced_;
  Json messages_, tools_;  // to be recorded
  OutputDelta pending_;    // not yet sent
  OutputDelta answer_;     // all of it, if it is recorded
  std::vector<TokenEvent> events_;
  int64_t text_offset_ = 0;
  int completion_tokens_ = 0;
  int reasoning_tokens_ = 0;
  int calls_ = 0;
  bool started_ = false;
  bool stopped_ = false;  // by a stop string
};

}  // namespace

std::string DumpJson(const Json& json) { return json.dump(-1, ' ', false, Json::error_handler_t::replace); }

void SendError(const Status& status, Responder* responder, int retry_after_seconds) {
  const bool retry = status.code() == Code::kResourceExhausted || status.code() == Code::kUnavailable;
  const int seconds = retry ? retry_after_seconds : 0;
  responder->Send(HttpStatus(status.code()), "application/json", DumpJson(ErrorJson(status, seconds)),
                  retry ? std::to_string(seconds) : "");
}

void RunCompletion(ApiRequest request, const AnswerContext& context, std::shared_ptr<Responder> responder,
                   std::function<void(std::function<void()>)> strand) {
  std::make_shared<Completion>(std::move(request), context, std::move(responder), std::move(strand))->Start();
}

}  // namespace triaxial
