#include "serve/completion.h"

#include <chrono>
#include <random>

#include "base/log.h"

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
  Completion(ApiRequest&& request, const ServedModel& model, Engine* engine, Metrics* metrics,
             std::shared_ptr<Responder> responder, std::function<void(std::function<void()>)> strand)
      : model_(model),
        engine_(engine),
        metrics_(metrics),
        responder_(std::move(responder)),
        strand_(std::move(strand)),
        chat_(request.chat),
        stream_(request.stream),
        include_usage_(request.include_usage),
        want_logprobs_(request.sampling.logprobs >= 0),
        parser_(*model.tokenizer, request.output),
        reasoning_(model.markup, request.starts_in_thought),
        forced_(std::move(request.forced)) {
    head_ = {
        RandomId(chat_ ? "chatcmpl-" : "cmpl-"), model.name,
        std::chrono::duration_cast<std::chrono::seconds>(std::chrono::system_clock::now().time_since_epoch())
            .count(),
        chat_};
    engine_request_.prompt = std::move(request.prompt);
    engine_request_.sampling = std::move(request.sampling);
    engine_request_.starts_in_thought = request.starts_in_thought && forced_.empty();
  }

  void Start() {
    for (const int32_t token : forced_) Take(parser_.Push(token));
    engine_request_.on_event = [self = shared_from_this()](TokenEvent&& event) {
      self->strand_([self, event = std::move(event)]() mutable { self->OnEvent(std::move(event)); });
    };
    const Result<RequestId> id = engine_->Submit(std::move(engine_request_));
    if (!id.ok()) {
      metrics_->CountRefused(id.status().code());
      return SendError(id.status(), responder_.get());
    }
    // Ids are never reused, so cancelling a finished request is harmless.
    responder_->OnHangUp([engine = engine_, request = *id] { engine->Cancel(request); });
  }

 private:
  void Take(OutputDelta&& delta) {
    pending_.content += delta.content;
    pending_.reasoning += delta.reasoning;
    for (ToolCall& call : delta.tool_calls) {
      call.id = RandomId("call_");
      pending_.tool_calls.push_back(std::move(call));
    }
    pending_.stopped = pending_.stopped || delta.stopped;
  }

  void OnEvent(TokenEvent&& event) {
    const bool finished = event.finish != FinishReason::kNone;
    if (stopped_) {  // the engine was a step ahead of the stop string; its end brings the figures
      if (!finished) return;
      event.stats.completion_tokens = completion_tokens_;
      metrics_->ObserveFinished(event.stats, FinishReason::kStop);
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
      metrics_->ObserveFinished(event.stats, event.finish);
      if (event.finish == FinishReason::kError) return Fail(event.error);
      if (event.finish == FinishReason::kCancelled)
        return Fail(Unavailable("the request was cancelled: the server is shutting down"));
      Take(parser_.Finish());
      return End(event.finish, event.stats);
    }
    if (pending_.stopped) {
      stopped_ = true;
      return engine_->Cancel(event.id);
    }
    if (stream_) SendDelta("");
  }

  void SendDelta(const std::string& finish_reason) {
    const bool empty = pending_.content.empty() && pending_.reasoning.empty() && pending_.tool_calls.empty();
    if (empty && finish_reason.empty()) return;
    Json logprobs =
        want_logprobs_ ? LogprobsJson(events_, *model_.tokenizer, chat_, &text_offset_) : Json(nullptr);
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

  void End(FinishReason reason, const RequestStats& stats) {
    const bool called = calls_ > 0 || !pending_.tool_calls.empty();
    const std::string finish =
        called && reason == FinishReason::kStop ? "tool_calls" : std::string(Name(reason));
    if (stream_) {
      SendDelta(finish);
      if (include_usage_)
        responder_->Write(Event(UsageChunkJson(head_, UsageJson(stats, reasoning_tokens_))));
      responder_->Write("data: [DONE]\n\n");
      responder_->Finish();
      return;
    }
    Json logprobs =
        want_logprobs_ ? LogprobsJson(events_, *model_.tokenizer, chat_, &text_offset_) : Json(nullptr);
    responder_->Send(200, "application/json",
                     DumpJson(AnswerJson(head_, pending_, finish, std::move(logprobs),
                                         UsageJson(stats, reasoning_tokens_))),
                     {});
  }

  void Fail(const Status& status) {
    if (!started_) return SendError(status, responder_.get());
    responder_->Write(Event(ErrorJson(status)));
    responder_->Write("data: [DONE]\n\n");
    responder_->Finish();
  }

  const ServedModel& model_;
  Engine* engine_;
  Metrics* metrics_;
  const std::shared_ptr<Responder> responder_;
  const std::function<void(std::function<void()>)> strand_;
  const bool chat_;
  const bool stream_;
  const bool include_usage_;
  const bool want_logprobs_;
  Request engine_request_;
  AnswerHead head_;
  OutputParser parser_;
  GenerationTagger reasoning_;
  std::vector<int32_t> forced_;
  OutputDelta pending_;  // not yet sent
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

void SendError(const Status& status, Responder* responder) {
  const bool retry = status.code() == Code::kResourceExhausted || status.code() == Code::kUnavailable;
  responder->Send(HttpStatus(status.code()), "application/json", DumpJson(ErrorJson(status)),
                  retry ? "1" : "");
}

void RunCompletion(ApiRequest request, const ServedModel& model, Engine* engine, Metrics* metrics,
                   std::shared_ptr<Responder> responder, std::function<void(std::function<void()>)> strand) {
  std::make_shared<Completion>(std::move(request), model, engine, metrics, std::move(responder),
                               std::move(strand))
      ->Start();
}

}  // namespace triaxial
