#include "serve/api.h"

#include <fmt/format.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <optional>

#include "base/json.h"
#include "serve/api_keys.h"
#include "serve/completion.h"
#include "serve/kv_page.h"
#include "serve/metrics.h"
#include "serve/openai.h"

namespace triaxial {
namespace {

// A request that found its route, and the tenant who sent it.
struct Call {
  HttpRequest request;
  std::string tenant;
  std::shared_ptr<Responder> responder;
};

void SendJson(const Json& json, Responder* responder) {
  responder->Send(200, "application/json", DumpJson(json), {});
}

// An error that has no Status: of routing and authorization.
void SendRefusal(int code, const std::string& message, const char* type, Responder* responder) {
  responder->Send(
      code, "application/json",
      DumpJson({{"error", {{"message", message}, {"type", type}, {"param", nullptr}, {"code", code}}}}), {});
}

class ApiServerImpl : public ApiServer {
 public:
  ApiServerImpl(ServedModel model, std::unique_ptr<Engine> engine, ApiOptions options)
      : model_(std::move(model)),
        engine_(std::move(engine)),
        keys_(options.api_keys),
        request_timeout_(options.request_timeout),
        recorder_(std::move(options.recorder)),
        metrics_(model_.name),
        context_{&model_, engine_.get(), &metrics_, &retry_, &ids_, recorder_.get(), options.log_requests},
        created_(std::chrono::duration_cast<std::chrono::seconds>(
                     std::chrono::system_clock::now().time_since_epoch())
                     .count()) {}
  ~ApiServerImpl() override { ApiServerImpl::Shutdown(0); }

  Status Listen(const HttpOptions& options) {
    ASSIGN_OR_RETURN(http_, HttpServer::Start(
                                options, [this](HttpRequest&& request, std::shared_ptr<Responder> responder) {
                                  Handle(std::move(request), std::move(responder));
                                }));
    ready_.store(true, std::memory_order_release);
    return OkStatus();
  }

  uint16_t port() const override { return http_->port(); }

  void Shutdown(double seconds) override {
    if (stopped_.exchange(true)) return;
    draining_.store(true);
    if (http_) http_->StopAccepting();
    engine_->Drain(seconds);
    if (http_) http_->Stop();
    engine_.reset();  // before the server: its last events still post to the server's strands
    http_.reset();
  }

 private:
  void Handle(HttpRequest&& request, std::shared_ptr<Responder> responder) {
    // The listener starts before Start() has returned its handle.
    if (!ready_.load(std::memory_order_acquire))
      return SendError(Unavailable("the server is starting"), responder.get());
    struct Route {
      std::string_view method, path;  // a path that ends with / stands for all below it
      bool open;                      // needs no key
      void (ApiServerImpl::*handler)(Call&&);
    };
    static constexpr Route kRoutes[] = {
        {"GET", "/health", true, &ApiServerImpl::Health},
        {"GET", "/metrics", true, &ApiServerImpl::GetMetrics},
        {"GET", "/v1/models", false, &ApiServerImpl::Models},
        {"GET", "/v1/kv", false, &ApiServerImpl::Kv},
        {"POST", "/v1/kv/check", false, &ApiServerImpl::KvCheck},
        {"GET", kKvOfAnswer, false, &ApiServerImpl::KvOfAnswer},
        {"POST", "/v1/chat/completions", false, &ApiServerImpl::Chat},
        {"POST", "/v1/completions", false, &ApiServerImpl::Complete},
        {"POST", "/tokenize", false, &ApiServerImpl::Tokenize},
        {"POST", "/detokenize", false, &ApiServerImpl::Detokenize},
    };
    bool path_known = false;
    for (const Route& route : kRoutes) {
      if (route.path.ends_with('/') ? !request.path.starts_with(route.path) : request.path != route.path)
        continue;
      path_known = true;
      if (request.method != route.method) continue;
      const std::optional<std::string> tenant =
          route.open ? std::string() : keys_.Tenant(request.authorization);
      if (!tenant) {
        return SendRefusal(401, "missing or wrong API key; send 'Authorization: Bearer KEY'",
                           "authentication_error", responder.get());
      }
      return (this->*route.handler)({std::move(request), *tenant, std::move(responder)});
    }
    SendRefusal(path_known ? 405 : 404,
                request.method + " " + request.path.substr(0, 200) +
                    (path_known ? " is not allowed here"
                                : " does not exist; see /v1/models, /v1/chat/completions, /v1/completions, "
                                  "/v1/kv, /tokenize, /detokenize, /health, /metrics"),
                "invalid_request_error", responder.get());
  }

  void Health(Call&& call) {
    if (draining_.load()) return SendError(Unavailable("the server is shutting down"), call.responder.get());
    SendJson({{"status", "ok"}}, call.responder.get());
  }

  void GetMetrics(Call&& call) {
    call.responder->Send(200, "text/plain; version=0.0.4; charset=utf-8",
                         metrics_.Render(engine_->Snapshot()), {});
  }

  void Models(Call&& call) {
    const Json model = {{"id", model_.name},        {"object", "model"},
                        {"created", created_},      {"owned_by", "triaxial"},
                        {"root", model_.directory}, {"max_model_len", engine_->max_model_len()}};
    SendJson({{"object", "list"}, {"data", Json::array({model})}}, call.responder.get());
  }

  void Kv(Call&& call) { SendJson(KvSnapshotJson(engine_->Snapshot()), call.responder.get()); }

  // Counting everything holds up the engine, so where there are keys no tenant may ask for it all the time.
  void KvCheck(Call&& call) {
    const auto now = std::chrono::steady_clock::now().time_since_epoch();
    std::chrono::nanoseconds::rep next = next_check_.load();
    const bool limited = !keys_.empty();
    if (limited &&
        (now.count() < next || !next_check_.compare_exchange_strong(next, (now + kBetweenChecks).count()))) {
      const auto left = std::chrono::ceil<std::chrono::seconds>(std::chrono::nanoseconds(next) - now);
      return SendError(
          ResourceExhausted(fmt::format("the cache is checked at most once in {} s; come again later",
                                        kBetweenChecks.count())),
          call.responder.get(), std::max(1, static_cast<int>(left.count())));
    }
    const Status integrity = engine_->CheckIntegrity();
    SendJson({{"ok", integrity.ok()}, {"error", integrity.ok() ? Json(nullptr) : Json(integrity.message())}},
             call.responder.get());
  }

  void KvOfAnswer(Call&& call) {
    const std::string id = call.request.path.substr(kKvOfAnswer.size());
    const std::optional<RequestId> request = ids_.Find(id, call.tenant);
    if (!request) {
      return SendError(
          NotFound("no answer '" + id.substr(0, 100) + "' is known here; the newest " +
                   std::to_string(CompletionIds::kKept) + " are, to the key that asked for them"),
          call.responder.get());
    }
    SendJson(KvBlocksJson(id, engine_->InspectBlocks(*request), engine_->geometry()), call.responder.get());
  }

  template <typename Parse>
  void Generate(Call&& call, const Parse& parse) {
    Responder* responder = call.responder.get();
    if (draining_.load()) return SendError(Unavailable("the server is shutting down"), responder);
    Result<Json> body = ParseJson(call.request.body, "the request body");
    if (!body.ok()) return SendError(body.status(), responder);
    Result<ApiRequest> parsed = parse(*body, model_);
    if (!parsed.ok()) {
      metrics_.CountRefused(parsed.status().code());
      return SendError(parsed.status(), responder);
    }
    parsed->tenant = std::move(call.tenant);
    if (parsed->timeout_seconds == 0) parsed->timeout_seconds = request_timeout_;
    if (recorder_ && parsed->chat) {
      parsed->messages = std::move((*body)["messages"]);
      // Tools that tool_choice kept out of the prompt are no part of the conversation.
      if (parsed->output.parse_tool_calls) parsed->tools = std::move((*body)["tools"]);
    }
    RunCompletion(std::move(*parsed), context_, std::move(call.responder), http_->MakeStrand());
  }

  void Chat(Call&& call) { Generate(std::move(call), ParseChatRequest); }
  void Complete(Call&& call) { Generate(std::move(call), ParseCompletionRequest); }

  void Tokenize(Call&& call) {
    const Result<Json> body = ParseJson(call.request.body, "the request body");
    if (!body.ok()) return SendError(body.status(), call.responder.get());
    const Result<std::vector<int32_t>> tokens = ParseTokenizeRequest(*body, model_);
    if (!tokens.ok()) return SendError(tokens.status(), call.responder.get());
    SendJson({{"tokens", *tokens}, {"count", tokens->size()}, {"max_model_len", engine_->max_model_len()}},
             call.responder.get());
  }

  void Detokenize(Call&& call) {
    const Result<Json> body = ParseJson(call.request.body, "the request body");
    if (!body.ok()) return SendError(body.status(), call.responder.get());
    const Result<std::vector<int32_t>> tokens = ParseDetokenizeRequest(*body, model_);
    if (!tokens.ok()) return SendError(tokens.status(), call.responder.get());
    SendJson({{"prompt", model_.tokenizer->Decode(*tokens, false)}}, call.responder.get());
  }

  static constexpr std::string_view kKvOfAnswer = "/v1/kv/";
  static constexpr std::chrono::seconds kBetweenChecks{10};

  const ServedModel model_;
  std::unique_ptr<Engine> engine_;
  const ApiKeys keys_;
  const double request_timeout_;
  const std::unique_ptr<ConversationRecorder> recorder_;
  Metrics metrics_;
  RetryEstimate retry_;
  CompletionIds ids_;
  const AnswerContext context_;
  const int64_t created_;
  std::unique_ptr<HttpServer> http_;
  std::atomic<std::chrono::nanoseconds::rep> next_check_{0};
  std::atomic<bool> ready_{false};
  std::atomic<bool> draining_{false};
  std::atomic<bool> stopped_{false};
};

}  // namespace

Result<std::unique_ptr<ApiServer>> ApiServer::Start(ServedModel model, std::unique_ptr<Engine> engine,
                                                    ApiOptions options) {
  const HttpOptions http = options.http;
  auto server = std::make_unique<ApiServerImpl>(std::move(model), std::move(engine), std::move(options));
  RETURN_IF_ERROR(server->Listen(http));
  return std::unique_ptr<ApiServer>(std::move(server));
}

}  // namespace triaxial
