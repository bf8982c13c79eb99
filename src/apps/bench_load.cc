#include "apps/bench_load.h"

#include <sys/resource.h>

#include <algorithm>
#include <boost/asio.hpp>
#include <chrono>
#include <cmath>
#include <limits>
#include <numeric>

#include "base/json.h"

namespace triaxial {
namespace {

namespace asio = boost::asio;
using Clock = std::chrono::steady_clock;

constexpr std::chrono::milliseconds kPollInterval{250};

double Seconds(Clock::duration duration) { return std::chrono::duration<double>(duration).count(); }

double ThreadCpuSeconds() {
  rusage usage{};
  getrusage(RUSAGE_THREAD, &usage);
  const auto seconds = [](const timeval& t) {
    return static_cast<double>(t.tv_sec) + 1e-6 * static_cast<double>(t.tv_usec);
  };
  return seconds(usage.ru_utime) + seconds(usage.ru_stime);
}

// One request as it was seen from here.
struct Ask {
  Clock::time_point start{}, end{};
  std::vector<Clock::time_point> events;  // that brought text
  bool done = false;
  int64_t prompt_tokens = 0, cached_tokens = 0, completion_tokens = 0;
  double bits = 0;
};

bool BringsText(const Json& event) {
  const auto choices = event.find("choices");
  if (choices == event.end() || !choices->is_array() || choices->empty()) return false;
  const Json& choice = choices->front();
  const auto has = [](const Json& holder, const char* field) {
    const auto it = holder.find(field);
    return it != holder.end() && !it->is_null() &&
           !(it->is_string() && it->get_ref<const std::string&>().empty());
  };
  if (has(choice, "text")) return true;
  const auto delta = choice.find("delta");
  return delta != choice.end() &&
         (has(*delta, "content") || has(*delta, "reasoning_content") || has(*delta, "tool_calls"));
}

template <typename T>
void ReadNumber(const Json& json, const char* field, T* out) {
  const auto it = json.find(field);
  if (it != json.end() && it->is_number()) *out = it->get<T>();
}

// What an event of the stream says; an error in it is returned.
Status TakeEvent(std::string_view text, Ask* ask) {
  ASSIGN_OR_RETURN(const Json event, ParseJson(text, "an event of the server"));
  if (!event.is_object())
    return Internal("the server sent an event that is no object: " + std::string(text.substr(0, 200)));
  if (event.contains("error"))
    return Internal("the server ended an answer with an error: " + std::string(text.substr(0, 300)));
  if (BringsText(event)) ask->events.push_back(Clock::now());
  const auto usage = event.find("usage");
  if (usage == event.end() || !usage->is_object()) return OkStatus();
  ReadNumber(*usage, "prompt_tokens", &ask->prompt_tokens);
  ReadNumber(*usage, "completion_tokens", &ask->completion_tokens);
  ReadNumber(*usage, "kv_effective_bits", &ask->bits);
  const auto details = usage->find("prompt_tokens_details");
  if (details != usage->end() && details->is_object())
    ReadNumber(*details, "cached_tokens", &ask->cached_tokens);
  return OkStatus();
}

}  // namespace

BenchSpread SpreadOf(std::vector<double> values) {
  if (values.empty()) return {};
  std::sort(values.begin(), values.end());
  const auto at = [&](double share) {  // the nearest rank
    const auto rank = static_cast<size_t>(std::ceil(share * static_cast<double>(values.size())));
    return values[std::clamp<size_t>(rank, 1, values.size()) - 1];
  };
  const double sum = std::accumulate(values.begin(), values.end(), 0.0);
  return {sum / static_cast<double>(values.size()), at(0.5), at(0.9), at(0.99), values.back()};
}

BenchGauges ReadGauges(std::string_view metrics) {
  BenchGauges gauges;
  const std::pair<std::string_view, double*> wanted[] = {
      {"num_requests_running", &gauges.running},
      {"num_requests_waiting", &gauges.waiting},
      {"kv_cache_usage_perc", &gauges.kv_usage},
      {"kv_bytes", &gauges.kv_bytes},
      {"kv_tokens", &gauges.kv_tokens},
      {"kv_cached_tokens", &gauges.cached_tokens},
      {"kv_effective_bits", &gauges.effective_bits},
      {"generation_tokens_total", &gauges.generated},
      {"prefix_cache_queries_total", &gauges.prefix_queries},
      {"prefix_cache_hits_total", &gauges.prefix_hits},
      {"num_preemptions_total", &gauges.preemptions},
      {"engine_model_seconds_total", &gauges.model_seconds},
      {"engine_host_seconds_total", &gauges.host_seconds},
      {"kv_demotions_total", &gauges.demotions},
  };
  for (size_t begin = 0; begin < metrics.size();) {
    const size_t end = std::min(metrics.find('\n', begin), metrics.size());
    std::string_view line = metrics.substr(begin, end - begin);
    begin = end + 1;
    for (const std::string_view prefix : {"triaxial_", "vllm:"}) {
      if (!line.starts_with(prefix)) continue;
      line.remove_prefix(prefix.size());
      const std::string_view name = line.substr(0, line.find_first_of("{ "));
      const size_t space = line.rfind(' ');
      if (space == std::string_view::npos) break;
      for (const auto& [metric, value] : wanted) {
        // Series of one name (formats, causes) add up.
        if (name == metric)
          *value = std::max(*value, 0.0) + std::atof(std::string(line.substr(space + 1)).c_str());
      }
      break;
    }
  }
  return gauges;
}

struct BenchLoad::State {
  State(const BenchEndpoint& server, std::string model_name, BenchWorkload* asked, int64_t first)
      : endpoint(server), model(std::move(model_name)), workload(asked), begun(first) {}

  asio::awaitable<void> Stream(size_t index) {
    BenchConnection connection(io.get_executor(), endpoint);
    // Streams of endless workloads begin at different steps of their first conversation, as if they had been
    // running for long: all at the first step would measure short prompts alone.
    size_t skip = workload->sessions() == 0 ? 3 + 5 * index : 0;
    while (failure.ok() && begun < session_limit) {
      const BenchSession session = workload->Make(begun++);
      for (size_t s = skip % session.steps.size(); s < session.steps.size(); ++s) {
        const BenchStep& step = session.steps[s];
        std::string body = StepBody(session, step, model, workload->fixed_length());
        co_await AskStep(&connection, step, std::move(body), index);
        if (!failure.ok()) break;
      }
      skip = 0;
    }
    --live;
  }

  // Asks until the answer has come or the run has failed.
  asio::awaitable<void> AskStep(BenchConnection* connection, const BenchStep& step, std::string body,
                                size_t index) {
    for (;;) {
      auto ask = std::make_shared<Ask>();
      asks.push_back(ask);
      ask->start = Clock::now();
      EventSplitter splitter;
      std::string plain;
      Status bad;
      std::function<void(std::string_view)> on_event = [&](std::string_view event) {
        if (bad.ok()) bad = TakeEvent(event, ask.get());
        if (!ask->events.empty()) has_token[index] = true;
      };
      std::function<void(std::string_view)> on_body = [&](std::string_view bytes) {
        if (ask->events.empty() && plain.size() < 1000) plain += bytes;
        splitter.Push(bytes, on_event);
      };
      std::string target = StepTarget(step);
      std::string sent = body;
      Result<int> status = co_await connection->Exchange(std::move(target), std::move(sent), on_body);
      ask->end = Clock::now();
      if (!status.ok()) {
        Fail(status.status());
      } else if (*status == 429 || *status == 503) {
        refused.push_back(ask->end);
        asks.erase(std::find(asks.rbegin(), asks.rend(), ask).base() - 1);
        asio::steady_timer timer(io, std::chrono::seconds(1));
        co_await timer.async_wait(asio::use_awaitable);
        if (failure.ok()) continue;
      } else if (*status != 200) {
        Fail(Internal("the server answered " + std::to_string(*status) + ": " + plain.substr(0, 500)));
      } else if (!bad.ok()) {
        Fail(bad);
      } else {
        ask->done = true;
        has_token[index] = true;
      }
      co_return;
    }
  }

  asio::awaitable<void> Poll() {
    BenchConnection connection(io.get_executor(), endpoint);
    asio::steady_timer timer(io);
    while (failure.ok()) {
      std::string text;
      std::function<void(std::string_view)> on_body = [&text](std::string_view bytes) { text += bytes; };
      std::string target = "/metrics";
      Result<int> status = co_await connection.Exchange(std::move(target), "", on_body);
      if (!status.ok() || *status != 200) co_return;  // a server without metrics
      BenchGauges gauges = ReadGauges(text);
      polled.emplace_back(Clock::now(), gauges);
      timer.expires_after(kPollInterval);
      co_await timer.async_wait(asio::use_awaitable);
    }
  }

  void Fail(Status status) {
    if (failure.ok()) failure = std::move(status);
  }

  // Handles what comes for `seconds`, or until `enough` says so.
  template <typename Enough>
  void Run(double seconds, const Enough& enough, const std::function<void()>& tick) {
    const Clock::time_point begin = Clock::now();
    while (failure.ok() && !enough() && Seconds(Clock::now() - begin) < seconds) {
      const double left = std::min(0.1, seconds - Seconds(Clock::now() - begin));
      try {
        io.restart();
        io.run_for(std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(left)));
      } catch (const std::exception& error) {
        Fail(Internal(std::string("the load generator stopped: ") + error.what()));
      }
      tick();
    }
  }

  BenchWindow Window(Clock::time_point from, Clock::time_point to) const;

  const BenchEndpoint endpoint;
  const std::string model;
  BenchWorkload* const workload;
  asio::io_context io{1};
  std::vector<std::shared_ptr<Ask>> asks;
  std::vector<Clock::time_point> refused;
  std::vector<std::pair<Clock::time_point, BenchGauges>> polled;
  std::vector<char> has_token;  // by stream
  int64_t begun;
  int64_t session_limit = std::numeric_limits<int64_t>::max();
  int live = 0;
  Status failure;
};

BenchWindow BenchLoad::State::Window(Clock::time_point from, Clock::time_point to) const {
  BenchWindow window;
  window.seconds = Seconds(to - from);
  const auto inside = [&](Clock::time_point t) { return t >= from && t < to; };
  // An event may bring several tokens, and a token no event (half a character): answers still under way get
  // the ratio of the others.
  double tokens = 0, events = 0;
  for (const auto& ask : asks) {
    if (!ask->done) continue;
    tokens += static_cast<double>(ask->completion_tokens);
    events += static_cast<double>(ask->events.size());
  }
  const double common = events > 0 ? tokens / events : 1;
  double bits_weight = 0;
  for (const auto& ask : asks) {
    const auto received = static_cast<double>(std::count_if(ask->events.begin(), ask->events.end(), inside));
    const bool known = ask->done && !ask->events.empty();
    window.output_tokens += received * (known ? static_cast<double>(ask->completion_tokens) /
                                                    static_cast<double>(ask->events.size())
                                              : common);
    if (!ask->events.empty() && inside(ask->events.front()))
      window.ttft.push_back(Seconds(ask->events.front() - ask->start));
    if (!ask->done || !inside(ask->end)) continue;
    ++window.requests;
    window.prompt_tokens += ask->prompt_tokens;
    window.cached_tokens += ask->cached_tokens;
    const auto stored = static_cast<double>(ask->prompt_tokens + ask->completion_tokens);
    window.request_bits += ask->bits * stored;
    bits_weight += stored;
    if (ask->completion_tokens > 1 && ask->events.size() > 1) {
      window.tpot.push_back(Seconds(ask->events.back() - ask->events.front()) /
                            static_cast<double>(ask->completion_tokens - 1));
    }
  }
  if (bits_weight > 0) window.request_bits /= bits_weight;
  window.refused = std::count_if(refused.begin(), refused.end(), inside);
  for (const auto& [at, gauges] : polled) {
    if (!inside(at)) continue;
    window.gauges.push_back(gauges);
    window.gauges.back().seconds = Seconds(at - from);
  }
  return window;
}

BenchLoad::BenchLoad(const BenchEndpoint& endpoint, std::string model, BenchWorkload* workload,
                     int64_t first_session)
    : state_(std::make_unique<State>(endpoint, std::move(model), workload, first_session)) {
  asio::co_spawn(state_->io, state_->Poll(), asio::detached);
}

BenchLoad::~BenchLoad() = default;

int64_t BenchLoad::next_session() const { return state_->begun; }

void BenchLoad::Grow(int streams) {
  while (static_cast<int>(state_->has_token.size()) < streams) {
    const size_t index = state_->has_token.size();
    state_->has_token.push_back(false);
    ++state_->live;
    asio::co_spawn(state_->io, state_->Stream(index), asio::detached);
  }
}

void BenchLoad::LimitSessions(int64_t sessions) { state_->session_limit = state_->begun + sessions; }

Status BenchLoad::WarmUp(double seconds) {
  const auto warm = [&] {
    return state_->live == 0 ||
           std::all_of(state_->has_token.begin(), state_->has_token.end(), [](char had) { return had != 0; });
  };
  state_->Run(seconds, warm, [] {});
  return state_->failure;
}

Result<BenchWindow> BenchLoad::Measure(double seconds,
                                       const std::function<void(const BenchWindow&)>& progress) {
  const Clock::time_point begin = Clock::now();
  const double cpu = ThreadCpuSeconds();
  Clock::time_point shown = begin;
  state_->Run(
      seconds, [&] { return state_->live == 0; },
      [&] {
        if (Seconds(Clock::now() - shown) < 1) return;
        shown = Clock::now();
        progress(state_->Window(begin, shown));
      });
  RETURN_IF_ERROR(state_->failure);
  const Clock::time_point end = Clock::now();
  const double computed = ThreadCpuSeconds() - cpu;
  BenchWindow window = state_->Window(begin, end);
  window.client_busy = computed / std::max(window.seconds, 1e-9);
  return window;
}

Result<std::string> BenchGet(const BenchEndpoint& endpoint, const std::string& target) {
  asio::io_context io{1};
  BenchConnection connection(io.get_executor(), endpoint);
  std::string body;
  Result<int> status = Internal("no answer");
  std::function<void(std::string_view)> on_body = [&body](std::string_view bytes) { body += bytes; };
  asio::co_spawn(
      io, [&]() -> asio::awaitable<void> { status = co_await connection.Exchange(target, "", on_body); },
      asio::detached);
  io.run();
  RETURN_IF_ERROR(status.ok() ? OkStatus() : status.status());
  if (*status != 200)
    return Internal(target + " answered " + std::to_string(*status) + ": " + body.substr(0, 300));
  return body;
}

Result<std::string> BenchModelName(const BenchEndpoint& endpoint) {
  ASSIGN_OR_RETURN(const std::string body, BenchGet(endpoint, "/v1/models"));
  ASSIGN_OR_RETURN(const Json json, ParseJson(body, "/v1/models"));
  const auto data = json.is_object() ? json.find("data") : json.end();
  if (data == json.end() || !data->is_array() || data->empty() || !data->front().is_object() ||
      !data->front().contains("id") || !data->front()["id"].is_string()) {
    return Internal("/v1/models names no model: " + body.substr(0, 200));
  }
  return data->front()["id"].get<std::string>();
}

}  // namespace triaxial
