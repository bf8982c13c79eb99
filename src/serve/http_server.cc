#include "serve/http_server.h"

#include <sys/socket.h>

#include <boost/asio.hpp>
#include <boost/beast/core.hpp>
#include <boost/beast/http.hpp>
#include <chrono>
#include <deque>
#include <optional>
#include <set>
#include <thread>
#include <vector>

#include "base/log.h"

namespace triaxial {
namespace {

namespace asio = boost::asio;
namespace beast = boost::beast;
namespace http = beast::http;
using asio::ip::tcp;
using boost::system::error_code;

constexpr size_t kMaxHeaderBytes = 32 * 1024;
constexpr size_t kMaxUnsentBytes = size_t{16} << 20;  // of a client that does not read its stream
constexpr std::chrono::seconds kLastCall{2};  // for clients to take their answers when the server stops
constexpr std::string_view kServerName = "triaxial";

std::string ErrorBody(int status, std::string_view message) {
  // Messages of this file need no JSON escaping.
  return "{\"error\":{\"message\":\"" + std::string(message) +
         "\",\"type\":\"invalid_request_error\",\"code\":" + std::to_string(status) + "}}";
}

class ServerImpl;

// One connection. Everything here runs on the single I/O thread, except the Responder's entry points, which
// post to it.
class Session : public std::enable_shared_from_this<Session> {
 public:
  Session(tcp::socket socket, ServerImpl* server) : stream_(std::move(socket)), server_(server) {}
  void Run() { ReadHeader(); }
  void Close();
  bool idle() const { return exchange_ == 0; }
  // The whole answer is here, and not all of it is sent.
  bool answered() const { return last_queued_; }

  void PostSend(uint64_t exchange, std::string bytes, bool last);
  void SetHangUp(uint64_t exchange, std::function<void()> callback);

 private:
  void ReadHeader();
  void OnHeader(error_code error);
  void ReadBody();
  void OnBody(error_code error, size_t bytes);
  void Dispatch();
  void Refuse(int status, std::string_view message);
  void WatchForHangUp();
  void WriteNext();
  void FinishExchange();
  void Linger(size_t budget);

  beast::tcp_stream stream_;
  ServerImpl* server_;
  beast::flat_buffer buffer_;
  std::optional<http::request_parser<http::string_body>> parser_;
  bool keep_alive_ = false;
  bool closed_ = false;
  bool writing_ = false;
  bool last_queued_ = false;
  bool watching_ = false;
  uint64_t exchange_ = 0;  // number of the request being answered; 0: none
  uint64_t exchanges_ = 0;
  std::deque<std::string> unsent_;
  size_t unsent_bytes_ = 0;
  std::function<void()> on_hang_up_;
};

class ResponderImpl : public Responder {
 public:
  ResponderImpl(std::weak_ptr<Session> session, uint64_t exchange, bool chunked, bool keep_alive)
      : session_(std::move(session)), exchange_(exchange), chunked_(chunked), keep_alive_(keep_alive) {}
  // A handler that forgets to answer must not leave the client hanging.
  ~ResponderImpl() override {
    if (state_ == State::kNew)
      ResponderImpl::Send(500, "application/json", ErrorBody(500, "the request was dropped"), {});
    if (state_ == State::kStreaming) ResponderImpl::Finish();
  }
  void Send(int status, std::string_view content_type, std::string body,
            std::string_view retry_after) override {
    if (state_ != State::kNew) return;
    state_ = State::kDone;
    std::string out = Head(status, content_type, retry_after);
    out += "Content-Length: " + std::to_string(body.size()) + "\r\n\r\n";
    out += body;
    Post(std::move(out), true);
  }
  void Start(std::string_view content_type) override {
    if (state_ != State::kNew) return;
    state_ = State::kStreaming;
    head_ = Head(200, content_type, {}) + "Cache-Control: no-cache\r\n";
    head_ += chunked_ ? "Transfer-Encoding: chunked\r\n\r\n" : "\r\n";
  }
  void Write(std::string data) override {
    if (state_ != State::kStreaming || data.empty()) return;
    std::string out = std::move(head_);  // the headers travel with the first event
    head_.clear();
    if (chunked_) {
      char size[20];
      std::snprintf(size, sizeof(size), "%zx\r\n", data.size());
      out += size;
    }
    out += data;
    if (chunked_) out += "\r\n";
    Post(std::move(out), false);
  }
  void Finish() override {
    if (state_ != State::kStreaming) return;
    state_ = State::kDone;
    std::string out = std::move(head_);
    if (chunked_) out += "0\r\n\r\n";
    Post(std::move(out), true);
  }
  void OnHangUp(std::function<void()> callback) override {
    if (const auto session = session_.lock()) {
      session->SetHangUp(exchange_, std::move(callback));
    } else {
      callback();
    }
  }

 private:
  enum class State { kNew, kStreaming, kDone };
  std::string Head(int status, std::string_view content_type, std::string_view retry_after) const {
    std::string out = "HTTP/1.1 " + std::to_string(status) + " ";
    out += std::string_view(http::obsolete_reason(static_cast<http::status>(status)));
    out += "\r\nServer: ";
    out += kServerName;
    out += "\r\nContent-Type: ";
    out += content_type;
    out += keep_alive_ ? "\r\nConnection: keep-alive\r\n" : "\r\nConnection: close\r\n";
    if (!retry_after.empty()) {
      out += "Retry-After: ";
      out += retry_after;
      out += "\r\n";
    }
    return out;
  }
  void Post(std::string bytes, bool last) {
    if (const auto session = session_.lock()) session->PostSend(exchange_, std::move(bytes), last);
  }

  std::weak_ptr<Session> session_;  // the server owns it, until the connection closes
  uint64_t exchange_;
  bool chunked_;
  bool keep_alive_;
  State state_ = State::kNew;
  std::string head_;
};

class ServerImpl : public HttpServer {
 public:
  ServerImpl(HttpOptions options, Handler handler)
      : options_(std::move(options)),
        handler_(std::move(handler)),
        acceptor_(io_),
        workers_(static_cast<size_t>(options_.worker_threads)) {}
  ~ServerImpl() override { ServerImpl::Stop(); }

  Status Listen() {
    error_code error;
    const auto address =
        asio::ip::make_address(options_.host == "localhost" ? "127.0.0.1" : options_.host, error);
    if (error) {
      return InvalidArgument(
          "--host " + options_.host +
          " is not an IP address; use 127.0.0.1, 0.0.0.0 or another address of this machine");
    }
    const tcp::endpoint endpoint(address, options_.port);
    const auto failed = [&](const char* what) {
      return Unavailable("cannot " + std::string(what) + " " + options_.host + ":" +
                         std::to_string(options_.port) + ": " + error.message() +
                         "; choose another --host or --port");
    };
    if (acceptor_.open(endpoint.protocol(), error)) return failed("open");
    acceptor_.set_option(tcp::acceptor::reuse_address(true), error);
    if (acceptor_.bind(endpoint, error)) return failed("bind");
    if (acceptor_.listen(asio::socket_base::max_listen_connections, error)) return failed("listen on");
    port_ = acceptor_.local_endpoint().port();
    return OkStatus();
  }

  void StartThread() {
    Accept();
    thread_ = std::thread([this] { io_.run(); });
  }

  uint16_t port() const override { return port_; }

  std::function<void(std::function<void()>)> MakeStrand() override {
    return [strand = asio::make_strand(workers_)](std::function<void()> task) {
      asio::post(strand, std::move(task));
    };
  }

  void StopAccepting() override {
    asio::post(io_, [this] {
      stopping_ = true;
      error_code ignored;
      acceptor_.close(ignored);
      for (const auto& session : std::vector(sessions_.begin(), sessions_.end())) {
        if (session->idle()) session->Close();
      }
    });
  }

  void Stop() override {
    if (!thread_.joinable()) return;
    workers_.join();  // what they answer last is then on its way to the I/O thread, before the task below
    asio::post(io_, [this] {
      stopping_ = true;
      error_code ignored;
      acceptor_.close(ignored);
      for (const auto& session : std::vector(sessions_.begin(), sessions_.end())) {
        if (!session->answered()) session->Close();
      }
      if (!sessions_.empty()) {
        last_call_.expires_after(kLastCall);
        last_call_.async_wait([this](error_code) {
          for (const auto& session : std::vector(sessions_.begin(), sessions_.end())) session->Close();
        });
      }
      guard_.reset();
    });
    thread_.join();
    io_.restart();
    io_.poll();  // releases what workers posted last
  }

  void Handle(HttpRequest&& request, std::shared_ptr<Responder> responder) {
    asio::post(workers_, [this, request = std::move(request), responder = std::move(responder)]() mutable {
      try {
        handler_(std::move(request), responder);
      } catch (const std::exception& error) {
        spdlog::error("a request failed: {}", error.what());
        responder->Send(500, "application/json", ErrorBody(500, "internal error"), {});
      }
    });
  }

  void Remove(const std::shared_ptr<Session>& session) {
    sessions_.erase(session);
    if (sessions_.empty()) last_call_.cancel();
  }
  bool stopping() const { return stopping_; }
  const HttpOptions& options() const { return options_; }
  asio::io_context& io() { return io_; }

 private:
  void Accept() {
    acceptor_.async_accept(io_, [this](error_code error, tcp::socket socket) {
      if (stopping_ || error == asio::error::operation_aborted) return;
      if (error) {
        // Out of descriptors, most likely: wait instead of spinning.
        auto timer = std::make_shared<asio::steady_timer>(io_, std::chrono::milliseconds(100));
        timer->async_wait([this, timer](error_code) {
          if (!stopping_) Accept();
        });
        return;
      }
      if (static_cast<int>(sessions_.size()) < options_.max_connections) {
        error_code ignored;
        socket.set_option(tcp::no_delay(true), ignored);
        const auto session = std::make_shared<Session>(std::move(socket), this);
        sessions_.insert(session);
        session->Run();
      }  // else the socket closes here
      Accept();
    });
  }

  const HttpOptions options_;
  const Handler handler_;
  asio::io_context io_{1};
  std::optional<asio::executor_work_guard<asio::io_context::executor_type>> guard_{io_.get_executor()};
  tcp::acceptor acceptor_;
  asio::thread_pool workers_;
  std::thread thread_;
  std::set<std::shared_ptr<Session>> sessions_;  // I/O thread only
  asio::steady_timer last_call_{io_};            // I/O thread only
  bool stopping_ = false;                        // I/O thread only
  uint16_t port_ = 0;
};

void Session::ReadHeader() {
  parser_.emplace();
  parser_->header_limit(kMaxHeaderBytes);
  parser_->body_limit(server_->options().max_body_bytes);
  // The limit for a header runs from its first byte on; before that the connection is merely idle.
  if (buffer_.size() == 0) {
    stream_.expires_after(std::chrono::seconds(server_->options().idle_seconds));
    stream_.async_read_some(buffer_.prepare(16384),
                            [self = shared_from_this()](error_code error, size_t bytes) {
                              if (error) return self->Close();
                              self->buffer_.commit(bytes);
                              self->ReadHeader();
                            });
    return;
  }
  stream_.expires_after(std::chrono::seconds(server_->options().header_seconds));
  http::async_read_header(stream_, buffer_, *parser_,
                          [self = shared_from_this()](error_code error, size_t) { self->OnHeader(error); });
}

void Session::OnHeader(error_code error) {
  if (closed_) return;
  if (error == http::error::end_of_stream || error == beast::error::timeout ||
      error == asio::error::operation_aborted || error == asio::error::connection_reset ||
      error == http::error::partial_message) {
    return Close();
  }
  if (error == http::error::header_limit) return Refuse(431, "the request header is larger than 32 KiB");
  if (error == http::error::body_limit) return Refuse(413, "the request body is larger than the limit");
  if (error) return Refuse(400, "malformed HTTP request");
  const auto length = parser_->content_length();
  if (length && *length > server_->options().max_body_bytes) {
    return Refuse(413, "the request body is larger than the limit of " +
                           std::to_string(server_->options().max_body_bytes >> 20) + " MiB");
  }
  if (beast::iequals(parser_->get()[http::field::expect], "100-continue")) {
    auto reply = std::make_shared<std::string>("HTTP/1.1 100 Continue\r\n\r\n");
    asio::async_write(stream_, asio::buffer(*reply),
                      [self = shared_from_this(), reply](error_code error2, size_t) {
                        if (error2) return self->Close();
                        self->ReadBody();
                      });
    return;
  }
  ReadBody();
}

void Session::ReadBody() {
  if (parser_->is_done()) return Dispatch();
  stream_.expires_after(std::chrono::seconds(server_->options().header_seconds));
  http::async_read_some(
      stream_, buffer_, *parser_,
      [self = shared_from_this()](error_code error, size_t bytes) { self->OnBody(error, bytes); });
}

void Session::OnBody(error_code error, size_t) {
  if (closed_) return;
  if (error == http::error::body_limit) {
    return Refuse(413, "the request body is larger than the limit of " +
                           std::to_string(server_->options().max_body_bytes >> 20) + " MiB");
  }
  if (error == http::error::bad_chunk || error == http::error::bad_chunk_extension) {
    return Refuse(400, "malformed chunked body");
  }
  if (error && error != http::error::need_more) return Close();
  ReadBody();
}

void Session::Dispatch() {
  stream_.expires_never();
  auto message = parser_->release();
  HttpRequest request;
  request.method = std::string(message.method_string());
  request.path = std::string(message.target());
  if (const size_t query = request.path.find_first_of("?#"); query != std::string::npos)
    request.path.resize(query);
  request.authorization = std::string(message[http::field::authorization]);
  request.body = std::move(message.body());
  keep_alive_ = message.keep_alive() && !server_->stopping();
  exchange_ = ++exchanges_;
  last_queued_ = false;
  const bool chunked = message.version() >= 11;
  if (!chunked) keep_alive_ = false;
  server_->Handle(std::move(request),
                  std::make_shared<ResponderImpl>(shared_from_this(), exchange_, chunked, keep_alive_));
  WatchForHangUp();
}

void Session::Refuse(int status, std::string_view message) {
  keep_alive_ = false;
  exchange_ = ++exchanges_;
  stream_.expires_after(std::chrono::seconds(server_->options().header_seconds));
  ResponderImpl responder(shared_from_this(), exchange_, true, false);
  responder.Send(status, "application/json", ErrorBody(status, message), {});
}

// While a request is being answered nothing is read; a readable socket then means a hang-up or a pipelined
// request.
void Session::WatchForHangUp() {
  if (watching_) return;
  watching_ = true;
  stream_.socket().async_wait(tcp::socket::wait_read, [self = shared_from_this()](error_code error) {
    self->watching_ = false;
    if (error || self->closed_ || self->exchange_ == 0) return;
    char byte;
    const ssize_t n = recv(self->stream_.socket().native_handle(), &byte, 1, MSG_PEEK | MSG_DONTWAIT);
    if (n == 0 || (n < 0 && errno != EAGAIN && errno != EWOULDBLOCK && errno != EINTR)) return self->Close();
    if (n < 0) self->WatchForHangUp();
    // n > 0: a pipelined request waits in the socket; a hang-up behind it shows when we write.
  });
}

void Session::PostSend(uint64_t exchange, std::string bytes, bool last) {
  asio::post(stream_.get_executor(),
             [self = shared_from_this(), exchange, bytes = std::move(bytes), last]() mutable {
               if (self->closed_ || self->exchange_ != exchange) return;
               self->unsent_bytes_ += bytes.size();
               self->unsent_.push_back(std::move(bytes));
               self->last_queued_ = self->last_queued_ || last;
               if (!last && self->unsent_bytes_ > kMaxUnsentBytes) return self->Close();
               if (!self->writing_) self->WriteNext();
             });
}

void Session::SetHangUp(uint64_t exchange, std::function<void()> callback) {
  asio::post(stream_.get_executor(),
             [self = shared_from_this(), exchange, callback = std::move(callback)]() mutable {
               if (self->exchange_ == exchange && !self->closed_) {
                 self->on_hang_up_ = std::move(callback);
               } else if (self->closed_) {
                 callback();
               }
             });
}

void Session::WriteNext() {
  if (unsent_.empty()) {
    if (last_queued_) FinishExchange();
    return;
  }
  writing_ = true;
  stream_.expires_after(std::chrono::seconds(server_->options().idle_seconds));
  asio::async_write(stream_, asio::buffer(unsent_.front()),
                    [self = shared_from_this()](error_code error, size_t) {
                      self->writing_ = false;
                      if (self->closed_) return;
                      if (error) return self->Close();
                      self->stream_.expires_never();
                      self->unsent_bytes_ -= self->unsent_.front().size();
                      self->unsent_.pop_front();
                      self->WriteNext();
                    });
}

void Session::FinishExchange() {
  exchange_ = 0;
  on_hang_up_ = nullptr;
  last_queued_ = false;
  if (!keep_alive_ || server_->stopping()) {
    error_code ignored;
    stream_.socket().shutdown(tcp::socket::shutdown_send, ignored);
    stream_.expires_after(std::chrono::seconds(2));
    return Linger(server_->options().max_body_bytes);
  }
  ReadHeader();
}

// Closing a socket with unread input resets the connection, and the client may lose the answer (a 413 while
// it still sends, say). So what it sends is read and dropped, for a bounded time and amount.
void Session::Linger(size_t budget) {
  buffer_.consume(buffer_.size());
  stream_.async_read_some(buffer_.prepare(65536),
                          [self = shared_from_this(), budget](error_code error, size_t bytes) {
                            if (error || bytes >= budget) return self->Close();
                            self->Linger(budget - bytes);
                          });
}

void Session::Close() {
  if (closed_) return;
  closed_ = true;
  error_code ignored;
  stream_.socket().cancel(ignored);
  stream_.socket().close(ignored);
  server_->Remove(shared_from_this());
  if (on_hang_up_) {
    std::function<void()> callback = std::move(on_hang_up_);
    on_hang_up_ = nullptr;
    callback();
  }
}

}  // namespace

Result<std::unique_ptr<HttpServer>> HttpServer::Start(const HttpOptions& options, Handler handler) {
  auto server = std::make_unique<ServerImpl>(options, std::move(handler));
  RETURN_IF_ERROR(server->Listen());
  server->StartThread();
  return std::unique_ptr<HttpServer>(std::move(server));
}

}  // namespace triaxial
