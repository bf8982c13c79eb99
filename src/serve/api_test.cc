// The routes over real sockets, with an engine that says what the test tells it.
#include "serve/api.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdlib>
#include <mutex>

#include "base/file.h"
#include "base/temp_dir_testing.h"
#include "serve/api_keys.h"
#include "serve/http_testing.h"
#include "text/conversation.h"

namespace triaxial {
namespace {

class FakeEngine : public Engine {
 public:
  explicit FakeEngine(const ServedModel& model)
      : config_(model.config),
        geometry_{2, 1, 64, Codec::kPaper},
        end_(model.tokenizer->AddedId("<|im_end|>")) {}

  Result<RequestId> Submit(Request request) override {
    const std::lock_guard lock(mutex_);
    if (!refusal.ok()) return refusal;
    TokenEvent event;
    event.id = ++last_id_;
    for (const int32_t token : answer) {
      event.token = token;
      request.on_event(TokenEvent(event));
    }
    event.stats = stats;
    event.token = failure.ok() ? end_ : -1;
    event.finish = failure.ok() ? FinishReason::kStop : FinishReason::kError;
    event.error = failure;
    request.on_event(std::move(event));
    requests_.push_back(std::move(request));
    return last_id_;
  }
  void Cancel(RequestId) override {}
  EngineSnapshot Snapshot() const override { return snapshot; }
  void Drain(double) override {}
  const ModelConfig& config() const override { return config_; }
  const KvGeometry& geometry() const override { return geometry_; }
  const Policy& policy() const override { return policy_; }
  int32_t max_model_len() const override { return 1000; }
  std::vector<KvBlock> InspectBlocks(RequestId id) override {
    std::vector<KvBlock> blocks(1);
    blocks[0].position = static_cast<int32_t>(id);  // so that the test sees which request was asked for
    blocks[0].tokens = 1;
    return blocks;
  }

  Status CheckIntegrity() override { return integrity; }
  Status integrity;

  Request last() {
    const std::lock_guard lock(mutex_);
    return requests_.back();
  }

  // Set between requests.
  std::vector<int32_t> answer;
  RequestStats stats;
  Status refusal;  // of Submit
  Status failure;  // after the answer's tokens
  EngineSnapshot snapshot;

 private:
  const ModelConfig config_;
  const KvGeometry geometry_;
  const Policy policy_;
  const int32_t end_;
  std::mutex mutex_;
  RequestId last_id_ = 0;
  std::vector<Request> requests_;
};

struct Answer {
  int status = 0;
  std::string head, body;
  Json json() const { return Json::parse(body, nullptr, false); }
};

class ApiTest : public testing::Test {
 protected:
  void Serve(ApiOptions options = {}) {
    Result<ServedModel> model = LoadServedModel("models/pocket-agent", "");
    ASSERT_TRUE(model.ok()) << model.status().message();
    auto engine = std::make_unique<FakeEngine>(*model);
    engine_ = engine.get();
    engine_->answer = model->tokenizer->Encode("Hello there", ParseSpecial::kNone);
    options.http.port = 0;
    auto server = ApiServer::Start(std::move(*model), std::move(engine), std::move(options));
    ASSERT_TRUE(server.ok()) << server.status().message();
    server_ = std::move(*server);
  }

  Answer Ask(const std::string& method, const std::string& path, const std::string& body = "",
             const std::string& key = "") {
    RawClient client(server_->port());
    client.Send(method + " " + path + " HTTP/1.1\r\nHost: h\r\nConnection: close\r\n" +
                (key.empty() ? "" : "Authorization: Bearer " + key + "\r\n") +
                "Content-Length: " + std::to_string(body.size()) + "\r\n\r\n" + body);
    const std::string text = client.Receive();
    Answer answer;
    const size_t end = text.find("\r\n\r\n");
    if (!text.starts_with("HTTP/1.1 ") || end == std::string::npos) return answer;
    answer.status = std::atoi(text.c_str() + 9);
    answer.head = text.substr(0, end + 2);
    answer.body = text.substr(end + 4);
    return answer;
  }
  Answer Chat(Json fields = Json::object(), const std::string& key = "") {
    fields["messages"] = Json::array({{{"role", "user"}, {"content", "Hi."}}});
    return Ask("POST", "/v1/chat/completions", fields.dump(), key);
  }

  FakeEngine* engine_ = nullptr;
  std::unique_ptr<ApiServer> server_;
};

TEST_F(ApiTest, FieldsOfTheMemoryEconomyReachTheEngine) {
  ApiOptions options;
  options.request_timeout = 40;
  Serve(std::move(options));
  ASSERT_EQ(Chat().status, 200);
  EXPECT_EQ(engine_->last().salt, SaltOf("", ""));
  EXPECT_EQ(engine_->last().tenant, "");
  EXPECT_EQ(engine_->last().min_format, Format::kK2V2);
  EXPECT_EQ(engine_->last().priority, 0);
  EXPECT_EQ(engine_->last().timeout_seconds, 40);
  const Json fields = {{"cache_salt", "blue"}, {"kv_min_format", "k4v4"}, {"priority", -7}, {"timeout", 2.5}};
  Json completion = fields;
  completion["prompt"] = "Hi.";
  for (const Answer& answer : {Chat(fields), Ask("POST", "/v1/completions", completion.dump())}) {
    ASSERT_EQ(answer.status, 200) << answer.body;
    EXPECT_EQ(engine_->last().salt, SaltOf("", "blue"));
    EXPECT_EQ(engine_->last().min_format, Format::kK4V4);
    EXPECT_EQ(engine_->last().priority, -7);
    EXPECT_EQ(engine_->last().timeout_seconds, 2.5);
  }
}

TEST_F(ApiTest, WrongValuesOfTheseFieldsAreRefusedByName) {
  Serve();
  const std::vector<std::pair<std::string, std::vector<Json>>> wrong = {
      {"cache_salt", {5, true, Json::array(), std::string(257, 'x')}},
      {"kv_min_format", {5, "", "fp64", "K4V4", Json::object()}},
      {"priority", {"high", 1.5, 101, -101, true, 1e30}},
      {"timeout", {"soon", 0, -1, true, 86401, 1e300, Json::array()}}};
  for (const auto& [field, values] : wrong) {
    for (const Json& value : values) {
      const Answer answer = Chat({{field, value}});
      EXPECT_EQ(answer.status, 400) << field << " " << value;
      EXPECT_NE(answer.json()["error"]["message"].get<std::string>().find(field), std::string::npos)
          << answer.body;
    }
    EXPECT_EQ(Chat({{field, nullptr}}).status, 200);
  }
}

TEST_F(ApiTest, KeysNeverShareASalt) {
  ApiOptions options;
  options.api_keys = {"one", "two"};
  Serve(std::move(options));
  EXPECT_EQ(Chat().status, 401);
  EXPECT_EQ(Chat({}, "three").status, 401);
  std::vector<std::string> salts;
  for (const char* key : {"one", "two"}) {
    for (const char* salt : {"", "blue"}) {
      ASSERT_EQ(Chat({{"cache_salt", salt}}, key).status, 200);
      salts.push_back(engine_->last().salt);
      EXPECT_FALSE(engine_->last().tenant.empty());
      EXPECT_EQ(engine_->last().tenant.find(key), std::string::npos);
    }
  }
  std::sort(salts.begin(), salts.end());
  EXPECT_EQ(std::unique(salts.begin(), salts.end()), salts.end());
}

TEST_F(ApiTest, UsageSaysWhatWasCachedAndDemoted) {
  Serve();
  engine_->stats.prompt_tokens = 100;
  engine_->stats.cached_tokens = 64;
  engine_->stats.completion_tokens = 2;
  engine_->stats.demotions = 3;
  const Json usage = Chat().json()["usage"];
  EXPECT_EQ(usage["prompt_tokens_details"]["cached_tokens"], 64);
  EXPECT_EQ(usage["kv_demotions"], 3);
  const Answer streamed = Chat({{"stream", true}, {"stream_options", {{"include_usage", true}}}});
  EXPECT_NE(streamed.body.find("\"cached_tokens\":64"), std::string::npos) << streamed.body;
}

TEST_F(ApiTest, ADeadlineThatPassedIs504) {
  Serve();
  engine_->failure = DeadlineExceeded("the request took longer than its timeout of 2 s");
  const Answer whole = Chat();
  EXPECT_EQ(whole.status, 504);
  EXPECT_EQ(whole.json()["error"]["type"], "timeout_error");
  EXPECT_EQ(whole.json()["error"]["code"], 504);
  EXPECT_EQ(whole.head.find("Retry-After"), std::string::npos) << whole.head;
  const Answer streamed = Chat({{"stream", true}});  // its head was out before
  EXPECT_EQ(streamed.status, 200);
  EXPECT_NE(streamed.body.find("\"code\":504"), std::string::npos) << streamed.body;
}

TEST_F(ApiTest, AFullQueueSaysWhenToComeAgain) {
  Serve();
  engine_->stats.total_seconds = 6;
  engine_->stats.queue_seconds = 2;
  ASSERT_EQ(Chat().status, 200);
  engine_->snapshot.running = 2;
  engine_->snapshot.waiting = 10;
  engine_->refusal = ResourceExhausted("10 requests are waiting already; retry later");
  const Answer answer = Chat();
  EXPECT_EQ(answer.status, 429);
  EXPECT_NE(answer.head.find("\r\nRetry-After: 20\r\n"), std::string::npos) << answer.head;
  EXPECT_EQ(answer.json()["error"]["retry_after_seconds"], 20);
  EXPECT_EQ(answer.json()["error"]["type"], "rate_limit_error");
  engine_->refusal = Unavailable("the server is shutting down");
  const Answer stopping = Chat();
  EXPECT_EQ(stopping.status, 503);
  EXPECT_NE(stopping.head.find("\r\nRetry-After: 1\r\n"), std::string::npos) << stopping.head;
}

TEST_F(ApiTest, TheBlocksOfAnAnswerAreShownToWhoAskedForIt) {
  ApiOptions options;
  options.api_keys = {"one", "two"};
  Serve(std::move(options));
  ASSERT_EQ(Chat({}, "two").status, 200);
  const std::string id = Chat({}, "one").json()["id"].get<std::string>();
  const Answer blocks = Ask("GET", "/v1/kv/" + id + "?x=1", "", "one");
  ASSERT_EQ(blocks.status, 200) << blocks.body;
  EXPECT_EQ(blocks.json()["id"], id);
  EXPECT_EQ(blocks.json()["blocks"][0]["position"], 2);
  EXPECT_EQ(Ask("GET", "/v1/kv/" + id, "", "two").status, 404);
  EXPECT_EQ(Ask("GET", "/v1/kv/" + id).status, 401);
  for (const char* unknown : {"", "chatcmpl-0", "2", "%00", "../models"}) {
    const Answer answer = Ask("GET", std::string("/v1/kv/") + unknown, "", "one");
    EXPECT_EQ(answer.status, 404) << unknown;
    EXPECT_EQ(answer.json()["error"]["type"], "not_found_error") << unknown;
  }
  EXPECT_EQ(Ask("DELETE", "/v1/kv/" + id, "", "one").status, 405);
  engine_->snapshot.evictions = 5;
  EXPECT_EQ(Ask("GET", "/v1/kv").status, 401);
  EXPECT_EQ(Ask("GET", "/v1/kv", "", "two").json()["evictions"], 5);
}

TEST_F(ApiTest, TheCacheIsCountedOnDemand) {
  Serve({});
  EXPECT_EQ(Ask("POST", "/v1/kv/check").json(), (Json{{"ok", true}, {"error", nullptr}}));
  engine_->integrity = Internal("block 3 lies in two places");
  const Answer answer = Ask("POST", "/v1/kv/check");
  EXPECT_EQ(answer.status, 200);
  EXPECT_EQ(answer.json(), (Json{{"ok", false}, {"error", "block 3 lies in two places"}}));
}

TEST_F(ApiTest, TenantsCannotKeepTheEngineCounting) {
  ApiOptions options;
  options.api_keys = {"one", "two"};
  Serve(std::move(options));
  EXPECT_EQ(Ask("POST", "/v1/kv/check").status, 401);
  EXPECT_EQ(Ask("POST", "/v1/kv/check", "", "one").status, 200);
  const Answer again = Ask("POST", "/v1/kv/check", "", "two");
  EXPECT_EQ(again.status, 429);
  const int seconds = again.json()["error"]["retry_after_seconds"].get<int>();
  EXPECT_GE(seconds, 1);
  EXPECT_LE(seconds, 10);
}

TEST_F(ApiTest, RecordsWhatFinishedAndNothingElse) {
  const TempDir directory;
  const std::string path = directory.File("chats.jsonl");
  ApiOptions options;
  options.recorder = ConversationRecorder::Open(path, 1 << 20).value();
  Serve(std::move(options));
  const Json tools = Json::array({{{"type", "function"}, {"function", {{"name", "look"}}}}});
  const Json messages = Json::array({{{"role", "user"}, {"content", "Hi."}}});
  EXPECT_EQ(Chat().status, 200);
  EXPECT_EQ(Chat({{"stream", true}, {"tools", tools}}).status, 200);
  EXPECT_EQ(Chat({{"tools", tools}, {"tool_choice", "none"}}).status, 200);
  EXPECT_EQ(Ask("POST", "/v1/completions", R"({"prompt": "Hi."})").status, 200);
  engine_->failure = Internal("broken");
  EXPECT_EQ(Chat().status, 500);
  EXPECT_EQ(Chat({{"stream", true}}).status, 200);  // fails after its first words
  engine_->refusal = ResourceExhausted("full");
  EXPECT_EQ(Chat().status, 429);
  EXPECT_EQ(Chat({{"priority", 1000}}).status, 400);
  server_.reset();
  const std::string text = ReadFile(path, 1 << 20).value();
  std::vector<Json> lines;
  for (size_t begin = 0; begin < text.size();) {
    const size_t end = text.find('\n', begin);
    ASSERT_NE(end, std::string::npos);
    lines.push_back(Json::parse(text.substr(begin, end - begin)));
    begin = end + 1;
  }
  ASSERT_EQ(lines.size(), 3u) << text;
  for (const Json& line : lines) {
    ASSERT_EQ(line["messages"].size(), 2u);
    EXPECT_EQ(line["messages"][0], messages[0]);
    EXPECT_EQ(line["messages"][1]["role"], "assistant");
    // Whatever the model thought and said is there, and reads back.
    const auto conversation =
        ParseConversation(line["messages"], line.contains("tools") ? line["tools"] : Json(nullptr));
    ASSERT_TRUE(conversation.ok()) << conversation.status().message();
    EXPECT_NE(line["messages"][1].dump().find("Hello there"), std::string::npos) << line;
  }
  EXPECT_FALSE(lines[0].contains("tools"));
  EXPECT_EQ(lines[1]["tools"], tools);
  EXPECT_FALSE(lines[2].contains("tools")) << "they were kept out of the prompt";
}

}  // namespace
}  // namespace triaxial
