#include "serve/api.h"

#include <atomic>
#include <chrono>

#include "base/file.h"
#include "base/json.h"
#include "base/log.h"
#include "serve/completion.h"
#include "serve/metrics.h"
#include "serve/openai.h"

namespace triaxial {
namespace {

// Takes as long for a wrong key as for a right one.
bool SameSecret(std::string_view a, std::string_view b) {
  unsigned difference = a.size() == b.size() ? 0 : 1;
  for (size_t i = 0; i < a.size(); ++i) {
    difference |= static_cast<unsigned>(static_cast<uint8_t>(a[i]) ^
                                        static_cast<uint8_t>(b.empty() ? 0 : b[i % b.size()]));
  }
  return difference == 0;
}

class ApiServerImpl : public ApiServer {
 public:
  ApiServerImpl(ServedModel model, std::unique_ptr<Engine> engine, std::vector<std::string> api_keys)
      : model_(std::move(model)),
        engine_(std::move(engine)),
        api_keys_(std::move(api_keys)),
        metrics_(model_.name),
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
      std::string_view method, path;
      bool open;  // needs no key
      void (ApiServerImpl::*handler)(HttpRequest&&, std::shared_ptr<Responder>);
    };
    static constexpr Route kRoutes[] = {
        {"GET", "/health", true, &ApiServerImpl::Health},
        {"GET", "/metrics", true, &ApiServerImpl::GetMetrics},
        {"GET", "/v1/models", false, &ApiServerImpl::Models},
        {"POST", "/v1/chat/completions", false, &ApiServerImpl::Chat},
        {"POST", "/v1/completions", false, &ApiServerImpl::Complete},
        {"POST", "/tokenize", false, &ApiServerImpl::Tokenize},
        {"POST", "/detokenize", false, &ApiServerImpl::Detokenize},
    };
    bool path_known = false;
    for (const Route& route : kRoutes) {
      if (request.path != route.path) continue;
      path_known = true;
      if (request.method != route.method) continue;
      if (!route.open && !Authorized(request)) {
        return responder->Send(
            401, "application/json",
            DumpJson({{"error",
                       {{"message", "missing or wrong API key; send 'Authorization: Bearer KEY'"},
                        {"type", "authentication_error"},
                        {"param", nullptr},
                        {"code", 401}}}}),
            {});
      }
      return (this->*route.handler)(std::move(request), std::move(responder));
    }
    const int status = path_known ? 405 : 404;
    const std::string message =
        request.method + " " + request.path.substr(0, 200) +
        (path_known ? " is not allowed here"
                    : " does not exist; see /v1/models, /v1/chat/completions, /v1/completions, "
                      "/tokenize, /detokenize, /health, /metrics");
    responder->Send(status, "application/json",
                    DumpJson({{"error",
                               {{"message", message},
                                {"type", "invalid_request_error"},
                                {"param", nullptr},
                                {"code", status}}}}),
                    {});
  }

  bool Authorized(const HttpRequest& request) const {
    if (api_keys_.empty()) return true;
    constexpr std::string_view kScheme = "Bearer ";
    if (!request.authorization.starts_with(kScheme)) return false;
    const std::string_view key = std::string_view(request.authorization).substr(kScheme.size());
    bool known = false;
    for (const std::string& candidate : api_keys_) known = SameSecret(key, candidate) || known;
    return known;
  }

  void Health(HttpRequest&&, std::shared_ptr<Responder> responder) {
    if (draining_.load()) return SendError(Unavailable("the server is shutting down"), responder.get());
    responder->Send(200, "application/json", "{\"status\":\"ok\"}", {});
  }

  void GetMetrics(HttpRequest&&, std::shared_ptr<Responder> responder) {
    responder->Send(200, "text/plain; version=0.0.4; charset=utf-8", metrics_.Render(engine_->Snapshot()),
                    {});
  }

  void Models(HttpRequest&&, std::shared_ptr<Responder> responder) {
    const Json model = {{"id", model_.name},        {"object", "model"},
                        {"created", created_},      {"owned_by", "triaxial"},
                        {"root", model_.directory}, {"max_model_len", engine_->max_model_len()}};
    responder->Send(200, "application/json", DumpJson({{"object", "list"}, {"data", Json::array({model})}}),
                    {});
  }

  template <typename Parse>
  void Generate(const HttpRequest& request, std::shared_ptr<Responder> responder, const Parse& parse) {
    if (draining_.load()) return SendError(Unavailable("the server is shutting down"), responder.get());
    const Result<Json> body = ParseJson(request.body, "the request body");
    if (!body.ok()) return SendError(body.status(), responder.get());
    Result<ApiRequest> parsed = parse(*body, model_);
    if (!parsed.ok()) {
      metrics_.CountRefused(parsed.status().code());
      return SendError(parsed.status(), responder.get());
    }
    RunCompletion(std::move(*parsed), model_, engine_.get(), &metrics_, std::move(responder),
                  http_->MakeStrand());
  }

  void Chat(HttpRequest&& request, std::shared_ptr<Responder> responder) {
    Generate(request, std::move(responder), ParseChatRequest);
  }

  void Complete(HttpRequest&& request, std::shared_ptr<Responder> responder) {
    Generate(request, std::move(responder), ParseCompletionRequest);
  }

  void Tokenize(HttpRequest&& request, std::shared_ptr<Responder> responder) {
    const Result<Json> body = ParseJson(request.body, "the request body");
    if (!body.ok()) return SendError(body.status(), responder.get());
    const Result<std::vector<int32_t>> tokens = ParseTokenizeRequest(*body, model_);
    if (!tokens.ok()) return SendError(tokens.status(), responder.get());
    responder->Send(
        200, "application/json",
        DumpJson(
            {{"tokens", *tokens}, {"count", tokens->size()}, {"max_model_len", engine_->max_model_len()}}),
        {});
  }

  void Detokenize(HttpRequest&& request, std::shared_ptr<Responder> responder) {
    const Result<Json> body = ParseJson(request.body, "the request body");
    if (!body.ok()) return SendError(body.status(), responder.get());
    const Result<std::vector<int32_t>> tokens = ParseDetokenizeRequest(*body, model_);
    if (!tokens.ok()) return SendError(tokens.status(), responder.get());
    responder->Send(200, "application/json", DumpJson({{"prompt", model_.tokenizer->Decode(*tokens, false)}}),
                    {});
  }

  const ServedModel model_;
  std::unique_ptr<Engine> engine_;
  const std::vector<std::string> api_keys_;
  Metrics metrics_;
  const int64_t created_;
  std::unique_ptr<HttpServer> http_;
  std::atomic<bool> ready_{false};
  std::atomic<bool> draining_{false};
  std::atomic<bool> stopped_{false};
};

}  // namespace

Result<std::unique_ptr<ApiServer>> ApiServer::Start(ServedModel model, std::unique_ptr<Engine> engine,
                                                    const HttpOptions& http,
                                                    std::vector<std::string> api_keys) {
  auto server = std::make_unique<ApiServerImpl>(std::move(model), std::move(engine), std::move(api_keys));
  RETURN_IF_ERROR(server->Listen(http));
  return std::unique_ptr<ApiServer>(std::move(server));
}

Result<std::vector<std::string>> LoadApiKeys(const std::string& path) {
  ASSIGN_OR_RETURN(const std::string text, ReadFile(path, size_t{1} << 20));
  std::vector<std::string> keys;
  size_t begin = 0;
  while (begin < text.size()) {
    const size_t end = std::min(text.find('\n', begin), text.size());
    std::string line = text.substr(begin, end - begin);
    begin = end + 1;
    while (!line.empty() && (line.back() == '\r' || line.back() == ' ' || line.back() == '\t'))
      line.pop_back();
    if (!line.empty() && line.front() != '#') keys.push_back(std::move(line));
  }
  if (keys.empty()) return InvalidArgument(path + " holds no API key; put one key on each line");
  return keys;
}

}  // namespace triaxial
