// The server: routes, authorization, and the order in which things start and stop.
#ifndef TRIAXIAL_SERVE_API_H_
#define TRIAXIAL_SERVE_API_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/status.h"
#include "engine/engine.h"
#include "serve/http_server.h"
#include "serve/recorder.h"
#include "serve/served_model.h"

namespace triaxial {

struct ApiOptions {
  HttpOptions http;
  // Any of them is accepted as a bearer token, and each has cached blocks of its own; empty: no
  // authorization.
  std::vector<std::string> api_keys;
  double request_timeout = 0;                      // seconds, for requests that state none; 0: none
  std::unique_ptr<ConversationRecorder> recorder;  // of finished chats; null: nothing is recorded
  bool log_requests = false;                       // a line for each finished request
};

class ApiServer {
 public:
  // Serves `engine` under the OpenAI API.
  static Result<std::unique_ptr<ApiServer>> Start(ServedModel model, std::unique_ptr<Engine> engine,
                                                  ApiOptions options);
  virtual ~ApiServer() = default;  // Shutdown(0)
  virtual uint16_t port() const = 0;
  // Refuses new requests, lets the running ones finish for at most `seconds`, then closes everything.
  // Idempotent.
  virtual void Shutdown(double seconds) = 0;
};

}  // namespace triaxial

#endif  // TRIAXIAL_SERVE_API_H_
