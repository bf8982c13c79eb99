#include "apps/bench_client.h"

#include <boost/asio.hpp>
#include <boost/beast/core.hpp>
#include <boost/beast/http.hpp>
#include <charconv>

namespace triaxial {
namespace {

namespace asio = boost::asio;
namespace http = boost::beast::http;
using boost::system::error_code;

constexpr std::chrono::seconds kPatience{600};

}  // namespace

Result<BenchEndpoint> ParseEndpoint(const std::string& url) {
  constexpr std::string_view kScheme = "http://";
  BenchEndpoint endpoint;
  std::string rest = url.starts_with(kScheme) ? url.substr(kScheme.size()) : "";
  rest = rest.substr(0, rest.find('/'));
  const size_t colon = rest.rfind(':');
  if (colon != std::string::npos && colon > 0) {
    endpoint.host = rest.substr(0, colon);
    const char* end = rest.data() + rest.size();
    const auto [last, error] = std::from_chars(rest.data() + colon + 1, end, endpoint.port);
    if (error == std::errc() && last == end && endpoint.port > 0) return endpoint;
  }
  return InvalidArgument("'" + url + "' is not the address of a server; give http://HOST:PORT");
}

BenchConnection::BenchConnection(asio::any_io_executor executor, BenchEndpoint endpoint)
    : endpoint_(std::move(endpoint)), stream_(std::move(executor)) {}

void BenchConnection::Close() {
  error_code ignored;
  stream_.socket().close(ignored);
  connected_ = false;
}

Status BenchConnection::Lost(const error_code& error) {
  Close();
  return Unavailable("the connection to " + endpoint_.host + ":" + std::to_string(endpoint_.port) +
                     " failed: " + error.message());
}

asio::awaitable<Status> BenchConnection::Connect() {
  error_code error;
  asio::ip::tcp::resolver resolver(stream_.get_executor());
  const auto found = co_await resolver.async_resolve(endpoint_.host, std::to_string(endpoint_.port),
                                                     asio::redirect_error(asio::use_awaitable, error));
  if (error) co_return Lost(error);
  stream_.expires_after(kPatience);
  co_await stream_.async_connect(found, asio::redirect_error(asio::use_awaitable, error));
  if (error) co_return Lost(error);
  stream_.socket().set_option(asio::ip::tcp::no_delay(true), error);
  connected_ = true;
  co_return OkStatus();
}

asio::awaitable<Result<int>> BenchConnection::Exchange(std::string target, std::string body,
                                                       std::function<void(std::string_view)> on_body) {
  http::request<http::string_body> request(body.empty() ? http::verb::get : http::verb::post, target, 11);
  request.set(http::field::host, endpoint_.host);
  request.set(http::field::content_type, "application/json");
  request.body() = std::move(body);
  request.prepare_payload();
  error_code error;
  // A kept-alive connection may have been closed meanwhile: one fresh one.
  for (int attempt = 0; attempt < 2; ++attempt) {
    const bool fresh = !connected_;
    if (fresh) {
      Status status = co_await Connect();
      if (!status.ok()) co_return status;
    }
    stream_.expires_after(kPatience);
    co_await http::async_write(stream_, request, asio::redirect_error(asio::use_awaitable, error));
    boost::beast::flat_buffer buffer;
    http::response_parser<http::string_body> parser;
    parser.body_limit(boost::none);
    if (!error)
      co_await http::async_read_header(stream_, buffer, parser,
                                       asio::redirect_error(asio::use_awaitable, error));
    if (error) {
      Status lost = Lost(error);
      if (fresh) co_return lost;
      continue;
    }
    for (;;) {
      std::string& received = parser.get().body();
      if (!received.empty()) on_body(received);
      received.clear();
      if (parser.is_done()) break;
      stream_.expires_after(kPatience);
      co_await http::async_read_some(stream_, buffer, parser,
                                     asio::redirect_error(asio::use_awaitable, error));
      if (error) co_return Lost(error);
    }
    if (!parser.get().keep_alive()) Close();
    co_return static_cast<int>(parser.get().result_int());
  }
  co_return Lost(error);
}

void EventSplitter::Push(std::string_view bytes, const std::function<void(std::string_view)>& on_event) {
  rest_ += bytes;
  size_t begin = 0;
  for (size_t end = rest_.find('\n'); end != std::string::npos; end = rest_.find('\n', begin)) {
    std::string_view line = std::string_view(rest_).substr(begin, end - begin);
    begin = end + 1;
    if (line.ends_with('\r')) line.remove_suffix(1);
    if (!line.starts_with("data:")) continue;
    line.remove_prefix(5);
    if (line.starts_with(' ')) line.remove_prefix(1);
    if (line != "[DONE]") on_event(line);
  }
  rest_.erase(0, begin);
}

}  // namespace triaxial
