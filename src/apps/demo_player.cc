#include "apps/demo_player.h"

#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include <atomic>
#include <boost/asio.hpp>
#include <boost/beast/core.hpp>
#include <boost/beast/http.hpp>
#include <chrono>
#include <cstdio>
#include <mutex>
#include <numeric>
#include <thread>

#include "apps/terminal.h"

namespace triaxial {
namespace {

namespace asio = boost::asio;
namespace beast = boost::beast;
namespace http = beast::http;
using Clock = std::chrono::steady_clock;

double SecondsSince(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// One kept-alive connection.
class HttpClient {
 public:
  HttpClient(const std::string& host, uint16_t port) : host_(host), port_(port), stream_(io_) {}

  Result<std::string> Post(const std::string& target, std::string body) {
    try {
      if (!connected_) Connect();
      http::request<http::string_body> request(http::verb::post, target, 11);
      request.set(http::field::host, host_);
      request.set(http::field::content_type, "application/json");
      request.body() = std::move(body);
      request.prepare_payload();
      http::write(stream_, request);
      http::response<http::string_body> response;
      http::read(stream_, buffer_, response);
      if (response.result() != http::status::ok) {
        return Internal("the server answered " + std::to_string(response.result_int()) + ": " +
                        response.body().substr(0, 500));
      }
      return std::move(response.body());
    } catch (const boost::system::system_error& error) {
      return Unavailable("the connection to " + host_ + ":" + std::to_string(port_) +
                         " failed: " + error.code().message());
    }
  }

 private:
  void Connect() {
    stream_.connect(asio::ip::tcp::endpoint(asio::ip::make_address(host_), port_));
    stream_.socket().set_option(asio::ip::tcp::no_delay(true));
    const timeval patience{300, 0};
    setsockopt(stream_.socket().native_handle(), SOL_SOCKET, SO_RCVTIMEO, &patience, sizeof(patience));
    connected_ = true;
  }

  const std::string host_;
  const uint16_t port_;
  asio::io_context io_;
  beast::tcp_stream stream_;
  beast::flat_buffer buffer_;
  bool connected_ = false;
};

class Progress {
 public:
  Progress(std::string label, size_t total)
      : label_(std::move(label)), total_(total), terminal_(isatty(STDERR_FILENO) != 0) {}
  ~Progress() {
    if (terminal_ && done_ > 0) std::fputs("\n", stderr);
  }

  void Add(bool right) {
    const std::lock_guard lock(mutex_);
    ++done_;
    right_ += right ? 1 : 0;
    const double now = SecondsSince(start_);
    if (now - shown_ < (terminal_ ? 0.1 : 5.0) && done_ < total_) return;
    shown_ = now;
    const double left = now / static_cast<double>(done_) * static_cast<double>(total_ - done_);
    if (!terminal_) {
      std::fprintf(stderr, "%s: %zu of %zu steps, %zu right, about %.0f s left\n", label_.c_str(), done_,
                   total_, right_, left);
      return;
    }
    constexpr size_t kWidth = 32;
    const size_t filled = kWidth * done_ / total_;
    std::string bar;
    for (size_t i = 0; i < kWidth; ++i) bar += i < filled ? "█" : "░";
    std::fprintf(stderr, "\r%-6s %s %zu/%zu steps  %zu right  %2.0f:%02.0f left \x1b[K", label_.c_str(),
                 bar.c_str(), done_, total_, right_, std::floor(left / 60), std::fmod(std::floor(left), 60));
    std::fflush(stderr);
  }

 private:
  const std::string label_;
  const size_t total_;
  const bool terminal_;
  const Clock::time_point start_ = Clock::now();
  std::mutex mutex_;
  size_t done_ = 0;
  size_t right_ = 0;
  double shown_ = 0;
};

struct StepResult {
  bool right = false;
  int64_t prompt_tokens = 0;
  int64_t completion_tokens = 0;
  int64_t kv_bytes = 0;
  std::array<int64_t, kFormats> kv_tokens{};
};

Result<StepResult> ReadAnswer(const std::string& body, const Json& recorded) {
  ASSIGN_OR_RETURN(const Json answer, ParseJson(body, "the server's answer"));
  try {
    StepResult result;
    result.right = SameAnswer(answer.at("choices").at(0).at("message"), recorded);
    const Json& usage = answer.at("usage");
    result.prompt_tokens = usage.at("prompt_tokens").get<int64_t>();
    result.completion_tokens = usage.at("completion_tokens").get<int64_t>();
    result.kv_bytes = usage.at("kv_bytes").get<int64_t>();
    for (size_t f = 0; f < kFormats; ++f) {
      const std::string name(Name(static_cast<Format>(f)));
      result.kv_tokens[f] = usage.at("kv_tokens").at(name).get<int64_t>();
    }
    return result;
  } catch (const Json::exception&) {
    return Internal("the server's answer is no completion with usage: " + body.substr(0, 200));
  }
}

}  // namespace

int64_t PlayResult::stored_tokens() const {
  return std::accumulate(kv_tokens.begin(), kv_tokens.end(), int64_t{0});
}

Result<PlayResult> Play(const std::vector<Trajectory>& trajectories, const PlayOptions& options) {
  struct Step {
    size_t trajectory, step;
  };
  std::vector<Step> steps;
  for (size_t t = 0; t < trajectories.size(); ++t) {
    for (size_t s = 0; s < trajectories[t].steps.size(); ++s) steps.push_back({t, s});
  }
  std::vector<StepResult> results(steps.size());
  std::atomic<size_t> next{0};
  std::mutex mutex;
  Status failure;
  Progress progress(options.label, steps.size());
  const Clock::time_point start = Clock::now();
  const auto work = [&] {
    HttpClient client(options.host, options.port);
    for (size_t i = next++; i < steps.size(); i = next++) {
      const Trajectory& trajectory = trajectories[steps[i].trajectory];
      const Json request = StepRequest(trajectory, steps[i].step, options.model, options.max_tokens);
      Result<std::string> body =
          client.Post("/v1/chat/completions", request.dump(-1, ' ', false, Json::error_handler_t::replace));
      Result<StepResult> result =
          body.ok() ? ReadAnswer(*body, trajectory.messages[trajectory.steps[steps[i].step]])
                    : Result<StepResult>(body.status());
      if (!result.ok()) {
        const std::lock_guard lock(mutex);
        if (failure.ok()) {
          failure =
              Status(result.status().code(), trajectory.id + ", step " + std::to_string(steps[i].step + 1) +
                                                 ": " + result.status().message());
        }
        next = steps.size();
        return;
      }
      results[i] = *result;
      progress.Add(result->right);
    }
  };
  std::vector<std::thread> threads;
  for (int i = 0; i < options.in_flight; ++i) threads.emplace_back(work);
  for (std::thread& thread : threads) thread.join();
  RETURN_IF_ERROR(failure);

  PlayResult total;
  total.seconds = SecondsSince(start);
  total.conversations = static_cast<int>(trajectories.size());
  std::vector<bool> all_right(trajectories.size(), true);
  for (size_t i = 0; i < steps.size(); ++i) {
    const StepResult& result = results[i];
    ++total.asked;
    total.right += result.right ? 1 : 0;
    if (!result.right) all_right[steps[i].trajectory] = false;
    total.prompt_tokens += result.prompt_tokens;
    total.completion_tokens += result.completion_tokens;
    total.kv_bytes += result.kv_bytes;
    for (size_t f = 0; f < kFormats; ++f) total.kv_tokens[f] += result.kv_tokens[f];
  }
  for (const bool right : all_right) total.conversations_right += right ? 1 : 0;
  return total;
}

}  // namespace triaxial
