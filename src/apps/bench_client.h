// The client's end of one HTTP connection, as coroutines: one thread drives hundreds of streams.
#ifndef TRIAXIAL_APPS_BENCH_CLIENT_H_
#define TRIAXIAL_APPS_BENCH_CLIENT_H_

#include <boost/asio/awaitable.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/beast/core/tcp_stream.hpp>
#include <functional>
#include <string>
#include <string_view>

#include "base/status.h"

namespace triaxial {

struct BenchEndpoint {
  std::string host = "127.0.0.1";
  uint16_t port = 0;
};

// "http://HOST:PORT" with or without a path; HOST is an address or a name.
Result<BenchEndpoint> ParseEndpoint(const std::string& url);

// One kept-alive connection, made when it is needed. Not for concurrent use.
class BenchConnection {
 public:
  BenchConnection(boost::asio::any_io_executor executor, BenchEndpoint endpoint);

  // Sends a request (a body makes it a POST) and hands over the response's body as it comes. The HTTP status;
  // Unavailable if the connection breaks.
  boost::asio::awaitable<Result<int>> Exchange(std::string target, std::string body,
                                               std::function<void(std::string_view)> on_body);

 private:
  boost::asio::awaitable<Status> Connect();
  void Close();
  Status Lost(const boost::system::error_code& error);

  const BenchEndpoint endpoint_;
  boost::beast::tcp_stream stream_;
  bool connected_ = false;
};

// Cuts an event stream into the payloads of its "data: " lines.
class EventSplitter {
 public:
  // Calls `on_event` for every complete event in `bytes` and what was left before; "[DONE]" is not an event.
  void Push(std::string_view bytes, const std::function<void(std::string_view)>& on_event);

 private:
  std::string rest_;
};

}  // namespace triaxial

#endif  // TRIAXIAL_APPS_BENCH_CLIENT_H_
