#include "apps/bench_load.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <limits>
#include <thread>

#include "base/json.h"
#include "serve/http_server.h"

namespace triaxial {
namespace {

using namespace std::chrono_literals;

TEST(EventSplitter, EventsAcrossPieces) {
  EventSplitter splitter;
  std::vector<std::string> events;
  const auto keep = [&](std::string_view event) { events.emplace_back(event); };
  splitter.Push("data: {\"a\":1}\n\ndata: {\"b\"", keep);
  EXPECT_EQ(events, (std::vector<std::string>{"{\"a\":1}"}));
  splitter.Push(":2}\r\n\r\n: a comment\ndata:x\ndata: [DO", keep);
  splitter.Push("NE]\n\n", keep);
  EXPECT_EQ(events, (std::vector<std::string>{"{\"a\":1}", "{\"b\":2}", "x"}));
}

TEST(SpreadOf, NearestRank) {
  std::vector<double> values;
  for (int i = 200; i >= 1; --i) values.push_back(i);
  const BenchSpread spread = SpreadOf(values);
  EXPECT_DOUBLE_EQ(spread.p50, 100);
  EXPECT_DOUBLE_EQ(spread.p99, 198);
  EXPECT_DOUBLE_EQ(spread.max, 200);
  EXPECT_DOUBLE_EQ(spread.mean, 100.5);
  EXPECT_DOUBLE_EQ(SpreadOf({7}).p99, 7);
  EXPECT_DOUBLE_EQ(SpreadOf({}).p50, 0);
}

TEST(ReadGauges, SumsSeriesAndKnowsWhatIsMissing) {
  const BenchGauges gauges = ReadGauges(
      "# HELP triaxial_kv_bytes Bytes\n"
      "triaxial_kv_bytes{model_name=\"m\",format=\"k2v2\"} 1000\n"
      "triaxial_kv_bytes{model_name=\"m\",format=\"bf16\"} 24\n"
      "triaxial_kv_bytes_other 5\n"
      "triaxial_num_requests_running{model_name=\"m\"} 3\n"
      "triaxial_engine_host_seconds_total{model_name=\"m\"} 0.25\n"
      "triaxial_kv_cache_usage_perc{model_name=\"m\"} 0.5\n");
  EXPECT_DOUBLE_EQ(gauges.kv_bytes, 1024);
  EXPECT_DOUBLE_EQ(gauges.running, 3);
  EXPECT_DOUBLE_EQ(gauges.kv_usage, 0.5);
  EXPECT_DOUBLE_EQ(gauges.host_seconds, 0.25);
  EXPECT_DOUBLE_EQ(gauges.preemptions, -1);
}

TEST(ParseEndpoint, AddressesOfServers) {
  EXPECT_EQ(ParseEndpoint("http://10.0.0.1:8000/v1").value().port, 8000);
  EXPECT_EQ(ParseEndpoint("http://somewhere:80").value().host, "somewhere");
  for (const char* bad :
       {"https://a:1", "http://a", "http://:1", "http://a:0", "http://a:70000", "http://a:1x"})
    EXPECT_EQ(ParseEndpoint(bad).status().code(), Code::kInvalidArgument) << bad;
}

// Answers of `tokens` tokens, one every `gap`, the first after `first`.
struct FakeServer {
  explicit FakeServer(int answer_tokens, std::chrono::milliseconds first_token,
                      std::chrono::milliseconds token_gap)
      : tokens(answer_tokens), first(first_token), gap(token_gap) {
    HttpOptions options;
    options.port = 0;
    auto started =
        HttpServer::Start(options, [this](HttpRequest&& request, std::shared_ptr<Responder> responder) {
          Answer(std::move(request), std::move(responder));
        });
    CHECK(started.ok());
    server = std::move(*started);
  }
  ~FakeServer() {
    stop = true;
    for (std::thread& thread : threads) thread.join();
    server->Stop();
  }

  void Answer(HttpRequest&& request, std::shared_ptr<Responder> responder) {
    if (request.path == "/metrics")
      return responder->Send(200, "text/plain", "triaxial_num_requests_running 2\n");
    const std::lock_guard lock(mutex);
    if (refusals > 0) {
      --refusals;
      return responder->Send(429, "application/json", "{\"error\":{\"message\":\"full\"}}");
    }
    if (broken) return responder->Send(400, "application/json", "{\"error\":{\"message\":\"too long\"}}");
    ++asked;
    threads.emplace_back([this, responder] {
      responder->Start("text/event-stream");
      std::this_thread::sleep_for(first);
      for (int i = 0; i < tokens && !stop; ++i) {
        if (i > 0) std::this_thread::sleep_for(gap);
        responder->Write("data: {\"choices\":[{\"text\":\"x\"}]}\n\n");
      }
      const Json usage = {{"prompt_tokens", 10},
                          {"completion_tokens", 2 * tokens},  // two tokens an event
                          {"prompt_tokens_details", {{"cached_tokens", 4}}},
                          {"kv_effective_bits", 2.5}};
      responder->Write("data: " + Json({{"choices", Json::array()}, {"usage", usage}}).dump() + "\n\n");
      responder->Write("data: [DONE]\n\n");
      responder->Finish();
    });
  }

  const int tokens;
  const std::chrono::milliseconds first, gap;
  std::unique_ptr<HttpServer> server;
  std::mutex mutex;
  std::vector<std::thread> threads;
  std::atomic<bool> stop{false};
  int refusals = 0;
  bool broken = false;
  int asked = 0;
};

constexpr double kForever = std::numeric_limits<double>::infinity();
void Ignore(const BenchWindow&) {}

TEST(BenchLoad, CountsWhatAnswersBring) {
  FakeServer fake(5, 60ms, 20ms);
  auto workload = MakeWorkload("8/10", {}).value();
  BenchLoad load({"127.0.0.1", fake.server->port()}, "m", workload.get(), 0);
  load.LimitSessions(12);
  load.Grow(4);
  const Result<BenchWindow> window = load.Measure(kForever, Ignore);
  ASSERT_TRUE(window.ok()) << window.status().message();
  EXPECT_EQ(window->requests, 12);
  EXPECT_EQ(fake.asked, 12);
  EXPECT_DOUBLE_EQ(window->output_tokens, 12 * 10);
  EXPECT_EQ(window->prompt_tokens, 120);
  EXPECT_EQ(window->cached_tokens, 48);
  EXPECT_DOUBLE_EQ(window->request_bits, 2.5);
  ASSERT_EQ(window->ttft.size(), 12u);
  ASSERT_EQ(window->tpot.size(), 12u);
  EXPECT_GE(SpreadOf(window->ttft).p50, 0.06);
  EXPECT_GE(SpreadOf(window->tpot).p50, 4 * 0.02 / 9);
  EXPECT_GE(window->seconds, 3 * (0.06 + 4 * 0.02));
  ASSERT_FALSE(window->gauges.empty());
  EXPECT_DOUBLE_EQ(window->gauges.front().running, 2);
}

TEST(BenchLoad, StreamsGoOnFromOneLevelToTheNext) {
  FakeServer fake(50, 10ms, 4ms);
  auto workload = MakeWorkload("8/100", {}).value();
  BenchLoad load({"127.0.0.1", fake.server->port()}, "m", workload.get(), 7);
  load.Grow(1);
  ASSERT_TRUE(load.WarmUp(10).ok());
  const Result<BenchWindow> one = load.Measure(0.5, Ignore);
  load.Grow(64);
  ASSERT_TRUE(load.WarmUp(10).ok());
  const Result<BenchWindow> many = load.Measure(0.5, Ignore);
  ASSERT_TRUE(one.ok() && many.ok());
  EXPECT_NEAR(one->seconds, 0.5, 0.2);
  EXPECT_GT(many->output_tokens, 8 * one->output_tokens);
  EXPECT_GT(load.next_session(), 7 + 64);
}

TEST(BenchLoad, RefusedRequestsAreAskedAgainOthersEndTheRun) {
  FakeServer fake(2, 1ms, 1ms);
  fake.refusals = 2;
  auto workload = MakeWorkload("8/4", {}).value();
  {
    BenchLoad load({"127.0.0.1", fake.server->port()}, "m", workload.get(), 0);
    load.LimitSessions(3);
    load.Grow(3);
    const Result<BenchWindow> window = load.Measure(kForever, Ignore);
    ASSERT_TRUE(window.ok()) << window.status().message();
    EXPECT_EQ(window->requests, 3);
    EXPECT_EQ(window->refused, 2);
  }
  fake.broken = true;
  BenchLoad load({"127.0.0.1", fake.server->port()}, "m", workload.get(), 0);
  load.Grow(2);
  const Status status = load.Measure(kForever, Ignore).status();
  EXPECT_EQ(status.code(), Code::kInternal);
  EXPECT_NE(status.message().find("400"), std::string::npos);
  EXPECT_NE(status.message().find("too long"), std::string::npos);
}

TEST(BenchLoad, NoServer) {
  auto workload = MakeWorkload("8/4", {}).value();
  BenchLoad load({"127.0.0.1", 1}, "m", workload.get(), 0);
  load.Grow(1);
  EXPECT_EQ(load.Measure(10, Ignore).status().code(), Code::kUnavailable);
}

}  // namespace
}  // namespace triaxial
