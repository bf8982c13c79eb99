// HTTP/1.1 over Boost.Beast: connections, limits, time-outs, streams, hang-ups. It knows nothing of JSON or
// models.
#ifndef TRIAXIAL_SERVE_HTTP_SERVER_H_
#define TRIAXIAL_SERVE_HTTP_SERVER_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>

#include "base/status.h"

namespace triaxial {

struct HttpRequest {
  std::string method;
  std::string path;  // without the query
  std::string authorization;
  std::string body;
};

// The answer to one request; may be kept and used from any thread. After the client hung up every call is a
// no-op.
class Responder {
 public:
  virtual ~Responder() = default;
  // A whole response. Call it or Start, once.
  virtual void Send(int status, std::string_view content_type, std::string body,
                    std::string_view retry_after = {}) = 0;
  // A streamed response (200): headers, then writes as they come, then Finish. Each Write is one write to the
  // socket.
  virtual void Start(std::string_view content_type) = 0;
  virtual void Write(std::string data) = 0;
  virtual void Finish() = 0;
  // `callback` runs once, on an I/O thread, when the client hangs up before the response is complete (at once
  // if it already has). It is dropped when the response completes.
  virtual void OnHangUp(std::function<void()> callback) = 0;
};

struct HttpOptions {
  std::string host = "127.0.0.1";
  uint16_t port = 8080;  // 0: any free port
  size_t max_body_bytes = size_t{64} << 20;
  int max_connections = 1024;
  int worker_threads = 2;   // run the handler: JSON, images, templates, tokenization
  int header_seconds = 30;  // from the first byte of a request to the end of its header; also the limit
                            // between reads of a body
  int idle_seconds = 120;   // a kept-alive connection without a request
};

class HttpServer {
 public:
  // Runs on a worker thread for every complete request; answers through the responder, now or later.
  using Handler = std::function<void(HttpRequest&&, std::shared_ptr<Responder>)>;

  // Binds and starts serving. Errors: InvalidArgument (bad host), Unavailable (port taken), naming the
  // remedy.
  static Result<std::unique_ptr<HttpServer>> Start(const HttpOptions& options, Handler handler);
  virtual ~HttpServer() = default;  // Stop()
  virtual uint16_t port() const = 0;
  // Runs `task` on a worker thread. Tasks of one `strand` key run in order, one at a time.
  virtual std::function<void(std::function<void()>)> MakeStrand() = 0;
  // Stops accepting and reading new requests; responses under way go on.
  virtual void StopAccepting() = 0;
  // Lets the answers out that are complete, for two seconds at most, then closes everything and joins the
  // threads.
  virtual void Stop() = 0;
};

}  // namespace triaxial

#endif  // TRIAXIAL_SERVE_HTTP_SERVER_H_
