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
#include "serve/served_model.h"

namespace triaxial {

class ApiServer {
 public:
  // Serves `engine` under the OpenAI API. api_keys: any of them is accepted as a bearer token; empty: no
  // authorization.
  static Result<std::unique_ptr<ApiServer>> Start(ServedModel model, std::unique_ptr<Engine> engine,
                                                  const HttpOptions& http, std::vector<std::string> api_keys);
  virtual ~ApiServer() = default;  // Shutdown(0)
  virtual uint16_t port() const = 0;
  // Refuses new requests, lets the running ones finish for at most `seconds`, then closes everything.
  // Idempotent.
  virtual void Shutdown(double seconds) = 0;
};

// One key a line; empty lines and lines that begin with # are skipped. InvalidArgument if there is none.
Result<std::vector<std::string>> LoadApiKeys(const std::string& path);

}  // namespace triaxial

#endif  // TRIAXIAL_SERVE_API_H_
