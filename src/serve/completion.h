// One answer under way: engine events in, HTTP out. Lives on a strand of the worker threads.
#ifndef TRIAXIAL_SERVE_COMPLETION_H_
#define TRIAXIAL_SERVE_COMPLETION_H_

#include <functional>
#include <memory>

#include "engine/engine.h"
#include "serve/http_server.h"
#include "serve/metrics.h"
#include "serve/openai.h"

namespace triaxial {

// Submits the request and answers it through `responder`, streamed or whole; cancels it when the client hangs
// up. Returns at once. Everything passed by reference must outlive the engine's last event.
void RunCompletion(ApiRequest request, const ServedModel& model, Engine* engine, Metrics* metrics,
                   std::shared_ptr<Responder> responder, std::function<void(std::function<void()>)> strand);

// Sends an error as JSON, with Retry-After for 429 and 503.
void SendError(const Status& status, Responder* responder);
std::string DumpJson(const Json& json);

}  // namespace triaxial

#endif  // TRIAXIAL_SERVE_COMPLETION_H_
