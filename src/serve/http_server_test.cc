#include "serve/http_server.h"

#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <thread>

#include "serve/http_testing.h"

namespace triaxial {
namespace {

class HttpServerTest : public testing::Test {
 protected:
  void Serve(HttpServer::Handler handler, HttpOptions options = {}) {
    options.port = 0;
    auto server = HttpServer::Start(options, std::move(handler));
    ASSERT_TRUE(server.ok()) << server.status().message();
    server_ = std::move(*server);
  }
  void ServeEcho(HttpOptions options = {}) {
    Serve(
        [](HttpRequest&& request, const std::shared_ptr<Responder>& responder) {
          responder->Send(200, "text/plain", request.method + " " + request.path + " " + request.body, {});
        },
        options);
  }
  std::unique_ptr<HttpServer> server_;
};

TEST_F(HttpServerTest, AnswersAndKeepsTheConnection) {
  ServeEcho();
  RawClient client(server_->port());
  for (int i = 0; i < 3; ++i) {
    ASSERT_TRUE(client.Send("POST /a?x=1 HTTP/1.1\r\nHost: h\r\nContent-Length: 3\r\n\r\nabc"));
    const std::string answer = client.Receive("POST /a abc");
    EXPECT_TRUE(answer.starts_with("HTTP/1.1 200 OK\r\n")) << answer;
    EXPECT_NE(answer.find("Content-Length: 11\r\n"), std::string::npos) << answer;
  }
}

TEST_F(HttpServerTest, ReadsChunkedAndSlowAndPipelinedRequests) {
  ServeEcho();
  RawClient client(server_->port());
  const std::string request =
      "POST /c HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n4\r\ndefg\r\n0\r\n\r\n";
  for (const char c : request) ASSERT_TRUE(client.Send(std::string_view(&c, 1)));
  EXPECT_NE(client.Receive("abcdefg").find("POST /c abcdefg"), std::string::npos);
  ASSERT_TRUE(client.Send("GET /1 HTTP/1.1\r\nHost: h\r\n\r\nGET /2 HTTP/1.1\r\nHost: h\r\n\r\n"));
  const std::string both = client.Receive("GET /2");
  EXPECT_LT(both.find("GET /1"), both.find("GET /2"));
}

TEST_F(HttpServerTest, ContinuesWhenAsked) {
  ServeEcho();
  RawClient client(server_->port());
  client.Send("POST /e HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n");
  EXPECT_TRUE(client.Receive("\r\n\r\n").starts_with("HTTP/1.1 100 "));
  client.Send("ok");
  EXPECT_NE(client.Receive("POST /e ok").find("200 OK"), std::string::npos);
}

TEST_F(HttpServerTest, RefusesWhatIsMalformedWithAnAnswer) {
  ServeEcho();
  for (const char* request :
       {"NONSENSE\r\n\r\n", "GET / HTTP/9.9\r\n\r\n", "GET / HTTP/1.1\r\nBad Header\r\n\r\n",
        "POST / HTTP/1.1\r\nContent-Length: minus\r\n\r\n", "\x16\x03\x01\x02\x00\x01\x00\x01\xfc\r\n\r\n",
        "POST / HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nabcdef",
        "POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n"}) {
    RawClient client(server_->port());
    ASSERT_TRUE(client.Send(request));
    const std::string answer = client.Receive();
    EXPECT_TRUE(answer.starts_with("HTTP/1.1 400 ")) << request << " -> " << answer;
    EXPECT_NE(answer.find("\"error\""), std::string::npos);
  }
  RawClient client(server_->port());
  client.Send("GET / HTTP/1.1\r\nX: " + std::string(100000, 'a') + "\r\n\r\n");
  EXPECT_TRUE(client.Receive().starts_with("HTTP/1.1 431 "));
}

TEST_F(HttpServerTest, RefusesTooLargeBodiesBeforeAndWhileReading) {
  HttpOptions options;
  options.max_body_bytes = 1000;
  ServeEcho(options);
  {
    RawClient client(server_->port());
    client.Send("POST / HTTP/1.1\r\nContent-Length: 5000\r\n\r\n" + std::string(5000, 'x'));
    EXPECT_TRUE(client.Receive().starts_with("HTTP/1.1 413 "));
  }
  RawClient client(server_->port());
  client.Send("POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n");
  for (int i = 0; i < 20; ++i) client.Send("64\r\n" + std::string(100, 'x') + "\r\n");
  EXPECT_TRUE(client.Receive().starts_with("HTTP/1.1 413 "));
}

TEST_F(HttpServerTest, SlowHeadersTimeOut) {
  HttpOptions options;
  options.header_seconds = 1;
  ServeEcho(options);
  RawClient client(server_->port());
  client.Send("GET / HT");
  const auto start = std::chrono::steady_clock::now();
  EXPECT_EQ(client.Receive(), "");
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(5));
}

TEST_F(HttpServerTest, EveryEventIsOneWriteAndHeadersTravelWithTheFirst) {
  std::shared_ptr<Responder> held;
  std::atomic<bool> ready{false};
  Serve([&](HttpRequest&&, std::shared_ptr<Responder> responder) {
    held = std::move(responder);
    ready = true;
  });
  RawClient client(server_->port());
  client.Send("GET /s HTTP/1.1\r\nHost: h\r\n\r\n");
  while (!ready) std::this_thread::yield();
  held->Start("text/event-stream");
  held->Write("data: 1\n\n");
  const std::string first = client.ReceiveOnce();
  EXPECT_TRUE(first.starts_with("HTTP/1.1 200 OK\r\n")) << first;
  EXPECT_TRUE(first.ends_with("\r\n\r\n9\r\ndata: 1\n\n\r\n")) << first;
  held->Write("data: 2\n\n");
  EXPECT_EQ(client.ReceiveOnce(), "9\r\ndata: 2\n\n\r\n");
  held->Finish();
  EXPECT_EQ(client.ReceiveOnce(), "0\r\n\r\n");
  ready = false;
  client.Send("GET /s HTTP/1.1\r\nHost: h\r\n\r\n");  // the connection goes on
  while (!ready) std::this_thread::yield();
  held->Send(200, "text/plain", "x", {});
  EXPECT_NE(client.Receive("\r\n\r\nx").find("200 OK"), std::string::npos);
  held.reset();
}

TEST_F(HttpServerTest, AHangUpIsNoticedWithinASecond) {
  for (const bool streaming : {false, true}) {
    std::shared_ptr<Responder> held;
    std::atomic<int> state{0};
    Serve([&](HttpRequest&&, std::shared_ptr<Responder> responder) {
      held = responder;
      if (streaming) {
        responder->Start("text/event-stream");
        responder->Write("data: x\n\n");
      }
      responder->OnHangUp([&] { state = 2; });
      state = 1;
    });
    {
      RawClient client(server_->port());
      client.Send("GET / HTTP/1.1\r\nHost: h\r\n\r\n");
      while (state == 0) std::this_thread::yield();
    }
    const auto start = std::chrono::steady_clock::now();
    while (state != 2 && std::chrono::steady_clock::now() - start < std::chrono::seconds(5))
      std::this_thread::yield();
    EXPECT_EQ(state, 2);
    EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(1));
    held->Write("data: y\n\n");  // a no-op now
    held.reset();
    server_.reset();
  }
}

TEST_F(HttpServerTest, AForgottenRequestAnswers500AndAThrowingHandlerToo) {
  std::atomic<bool> fail{false};
  Serve([&](HttpRequest&&, const std::shared_ptr<Responder>&) {
    if (fail) throw std::runtime_error("x");
  });
  for (const bool throwing : {false, true}) {
    fail = throwing;
    RawClient client(server_->port());
    client.Send("GET / HTTP/1.0\r\n\r\n");
    EXPECT_TRUE(client.Receive().starts_with("HTTP/1.1 500 "));
  }
}

TEST_F(HttpServerTest, StopWithOpenConnectionsAndHeldRespondersIsClean) {
  std::vector<std::shared_ptr<Responder>> held;
  std::atomic<int> count{0};
  Serve(
      [&](HttpRequest&&, std::shared_ptr<Responder> responder) {
        held.push_back(std::move(responder));
        ++count;
      },
      [] {
        HttpOptions options;
        options.worker_threads = 1;
        return options;
      }());
  std::vector<std::unique_ptr<RawClient>> clients;
  for (int i = 0; i < 20; ++i) {
    clients.push_back(std::make_unique<RawClient>(server_->port()));
    if (i % 2 == 0) clients.back()->Send("GET / HTTP/1.1\r\nHost: h\r\n\r\n");
  }
  while (count < 10) std::this_thread::yield();
  server_->Stop();
  for (auto& responder : held) responder->Send(200, "text/plain", "late", {});
  held.clear();
  server_.reset();
}

TEST_F(HttpServerTest, StopLetsTheAnswersOutThatAreComplete) {
  const std::string body(8 << 20, 'x');  // more than the socket's buffers take
  std::atomic<bool> answering{false};
  Serve([&](HttpRequest&&, const std::shared_ptr<Responder>& responder) {
    answering = true;
    std::this_thread::sleep_for(std::chrono::milliseconds(20));  // Stop() comes before the answer
    responder->Send(200, "text/plain", body, {});
  });
  RawClient client(server_->port());
  client.Send("GET / HTTP/1.1\r\nHost: h\r\n\r\n");
  while (!answering) std::this_thread::yield();
  std::thread stop([&] { server_->Stop(); });
  const std::string answer = client.Receive();
  EXPECT_TRUE(answer.starts_with("HTTP/1.1 200 "));
  EXPECT_TRUE(answer.ends_with("\r\n\r\n" + body)) << answer.size();
  client.Close();
  stop.join();
}

TEST_F(HttpServerTest, StopDoesNotWaitForAClientThatTakesNothing) {
  std::atomic<bool> answered{false};
  Serve([&](HttpRequest&&, const std::shared_ptr<Responder>& responder) {
    responder->Send(200, "text/plain", std::string(32 << 20, 'x'), {});
    answered = true;
  });
  RawClient client(server_->port());
  client.Send("GET / HTTP/1.1\r\nHost: h\r\n\r\n");
  while (!answered) std::this_thread::yield();
  const auto start = std::chrono::steady_clock::now();
  server_->Stop();
  EXPECT_LT(std::chrono::steady_clock::now() - start, std::chrono::seconds(4));
}

TEST_F(HttpServerTest, SaysWhenThePortIsTaken) {
  ServeEcho();
  HttpOptions options;
  options.port = server_->port();
  const auto second = HttpServer::Start(options, [](HttpRequest&&, const std::shared_ptr<Responder>&) {});
  ASSERT_FALSE(second.ok());
  EXPECT_NE(second.status().message().find("--port"), std::string::npos);
}

}  // namespace
}  // namespace triaxial
