// One answer under way: engine events in, HTTP out. Lives on a strand of the worker threads.
#ifndef TRIAXIAL_SERVE_COMPLETION_H_
#define TRIAXIAL_SERVE_COMPLETION_H_

#include <functional>
#include <memory>

#include "engine/engine.h"
#include "serve/completion_ids.h"
#include "serve/http_server.h"
#include "serve/metrics.h"
#include "serve/openai.h"
#include "serve/recorder.h"
#include "serve/retry.h"

namespace triaxial {

// What all answers of a server share. Not owned; outlives the engine's last event.
struct AnswerContext {
  const ServedModel* model = nullptr;
  Engine* engine = nullptr;
  Metrics* metrics = nullptr;
  RetryEstimate* retry = nullptr;
  CompletionIds* ids = nullptr;
  ConversationRecorder* recorder = nullptr;  // null: nothing is recorded
  bool log = false;                          // a line for each finished request
};

// Submits the request and answers it through `responder`, streamed or whole; cancels it when the client hangs
// up. Returns at once.
void RunCompletion(ApiRequest request, const AnswerContext& context, std::shared_ptr<Responder> responder,
                   std::function<void(std::function<void()>)> strand);

// Sends an error as JSON; 429 and 503 say when to come again.
void SendError(const Status& status, Responder* responder, int retry_after_seconds = 1);
std::string DumpJson(const Json& json);

}  // namespace triaxial

#endif  // TRIAXIAL_SERVE_COMPLETION_H_
