// The parts of the server that need neither sockets nor an engine.
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdio>
#include <fstream>
#include <set>

#include "serve/api_keys.h"
#include "serve/completion_ids.h"
#include "serve/kv_page.h"
#include "serve/metrics.h"
#include "serve/openai.h"
#include "serve/request_log.h"
#include "serve/retry.h"

namespace triaxial {
namespace {

TEST(ApiKeysTest, WithoutKeysEverybodyIsOneTenant) {
  const ApiKeys keys({});
  EXPECT_EQ(keys.Tenant(""), "");
  EXPECT_EQ(keys.Tenant("Bearer whatever"), "");
}

TEST(ApiKeysTest, AKeyHasANameThatIsStableAndDoesNotGiveItAway) {
  const ApiKeys keys({"secret-1", "secret-2"});
  for (const char* wrong : {"", "Bearer ", "Bearer secret", "Bearer secret-3", "Bearer secret-11", "secret-1",
                            "bearer secret-1", "Basic secret-1"}) {
    EXPECT_FALSE(keys.Tenant(wrong)) << wrong;
  }
  const auto first = keys.Tenant("Bearer secret-1"), second = keys.Tenant("Bearer secret-2");
  ASSERT_TRUE(first && second);
  EXPECT_NE(*first, *second);
  EXPECT_NE(*first, "");
  EXPECT_EQ(first->find("secret"), std::string::npos);
  EXPECT_EQ(ApiKeys({"other", "secret-1"}).Tenant("Bearer secret-1"), first) << "other keys do not matter";
}

TEST(ApiKeysTest, SaltsOfDifferentPairsDiffer) {
  std::set<std::string> salts;
  for (const char* tenant : {"", "a", "ab", "1", "1:", ":"}) {
    for (const char* salt : {"", "a", "b", "ab", "1:a", ":", "0:"}) salts.insert(SaltOf(tenant, salt));
  }
  salts.insert(SaltOf("", std::string("\0", 1)));
  EXPECT_EQ(salts.size(), 6u * 7u + 1);
}

TEST(CompletionIdsTest, KeepsTheNewestAndTellsOnlyTheOwner) {
  CompletionIds ids;
  for (int i = 0; i < 1500; ++i) ids.Add("cmpl-" + std::to_string(i), i % 2 == 0 ? "even" : "odd", i);
  EXPECT_FALSE(ids.Find("cmpl-475", "odd"));
  EXPECT_EQ(ids.Find("cmpl-476", "even"), 476);
  EXPECT_EQ(ids.Find("cmpl-1499", "odd"), 1499);
  EXPECT_FALSE(ids.Find("cmpl-1499", "even"));
  EXPECT_FALSE(ids.Find("cmpl-1499", ""));
  EXPECT_FALSE(ids.Find("cmpl-1500", "odd"));
}

RequestStats Ran(double seconds, double queued) {
  RequestStats stats;
  stats.queue_seconds = queued;
  stats.total_seconds = queued + seconds;
  return stats;
}

TEST(RetryEstimateTest, IsTheTimeInWhichTheQueueDrains) {
  RetryEstimate estimate;
  EngineSnapshot snapshot;
  snapshot.running = 4;
  snapshot.waiting = 12;
  EXPECT_EQ(estimate.Seconds(snapshot), 1) << "nothing is known yet";
  estimate.Observe(Ran(5, 100));
  EXPECT_EQ(estimate.Seconds(snapshot), 15);
  snapshot.waiting = 1000;
  EXPECT_EQ(estimate.Seconds(snapshot), 60);
  snapshot.waiting = 0;
  EXPECT_EQ(estimate.Seconds(snapshot), 1);
  snapshot.running = 0;
  snapshot.waiting = 3;
  EXPECT_EQ(estimate.Seconds(snapshot), 15);
  for (int i = 0; i < 100; ++i) estimate.Observe(Ran(0.5, 0));  // the load has changed
  EXPECT_EQ(estimate.Seconds(snapshot), 2);
}

TEST(RequestLogTest, SaysWhatTheRequestTook) {
  RequestStats stats;
  stats.prompt_tokens = 1210;
  stats.cached_tokens = 1152;
  stats.completion_tokens = 25;
  stats.demotions = 3;
  stats.kv.bytes[static_cast<size_t>(Format::kBf16)] = 1 << 20;
  stats.kv.bytes[static_cast<size_t>(Format::kK4V4)] = 3 << 19;
  stats.ttft_seconds = 0.25;
  stats.total_seconds = 1.25;
  EXPECT_EQ(FinishedLine("chatcmpl-1", "", "stop", stats),
            "chatcmpl-1 stop: 1210 + 25 tokens (1152 cached), KV 2.50 MiB (k4v4 1.50, bf16 1.00), 3 demoted, "
            "TTFT 0.250 s, 24.0 tokens/s");
  EXPECT_EQ(FinishedLine("cmpl-2", "a1b2", "abort", RequestStats{.prompt_tokens = 7}),
            "cmpl-2 of a1b2 abort: 7 + 0 tokens (0 cached)");
}

EngineSnapshot BusySnapshot() {
  EngineSnapshot snapshot;
  snapshot.kv.bytes = {10, 20, 30, 40};
  snapshot.kv.tokens = {1, 2, 3, 4};
  snapshot.cached_tokens = 6;
  snapshot.price = 0.125;
  snapshot.demotions[static_cast<size_t>(Format::kBf16)][0][static_cast<size_t>(Cause::kAge)] = 5;
  snapshot.demotions[2][1][static_cast<size_t>(Cause::kPressure)] = 7;
  snapshot.evictions = 8;
  snapshot.prefix_queries = 100;
  snapshot.prefix_hits = 60;
  snapshot.integrity_errors = 2;
  snapshot.store.host_bytes = 11;
  snapshot.store.disk_bytes = 12;
  snapshot.store.woken = 13;
  snapshot.store.corrupt = 14;
  return snapshot;
}

TEST(KvPageTest, TheWholeCache) {
  const Json json = KvSnapshotJson(BusySnapshot());
  EXPECT_EQ(json["bytes"], 100);
  EXPECT_EQ(json["tokens"], 10);
  EXPECT_EQ(json["formats"]["k2v2"], (Json{{"bytes", 10}, {"tokens", 1}}));
  EXPECT_EQ(json["cached_tokens"], 6);
  EXPECT_EQ(json["price"], 0.125);
  ASSERT_EQ(json["demotions"].size(), 2u);
  EXPECT_EQ(json["demotions"][0],
            (Json{{"from", "k4v4"}, {"to", "k4v2"}, {"cause", "pressure"}, {"blocks", 7}}));
  EXPECT_EQ(json["demotions"][1], (Json{{"from", "bf16"}, {"to", "k2v2"}, {"cause", "age"}, {"blocks", 5}}));
  EXPECT_EQ(json["sleeping"]["host"]["bytes"], 11);
  EXPECT_EQ(json["sleeping"]["disk"]["bytes"], 12);
  EXPECT_EQ(json["sleeping"]["corrupt"], 14);
  EXPECT_EQ(json["integrity_errors"], 2);
}

TEST(KvPageTest, TheBlocksOfAnAnswer) {
  const KvGeometry geometry = {2, 1, 64, Codec::kPaper};
  std::vector<KvBlock> blocks(2);
  blocks[0].tokens = kBlockTokens;
  blocks[0].format = Format::kK4V4;
  blocks[0].users = 2;
  const Tag old{Temporal::kM1, Modal::kText, Semantic::kObs}, now{};
  for (size_t i = 0; i < kBlockTokens; ++i) {
    blocks[0].tags[i] = static_cast<uint8_t>((i < 12 ? old : now).index());
  }
  blocks[0].need.wish = Format::kK2V2;
  blocks[0].history = {{Format::kBf16, Format::kK4V4, Cause::kAge, 0.5, 3}};
  blocks[1].position = 64;  // a tail with room for a quarter of a block
  blocks[1].capacity = 16;
  const Json json = KvBlocksJson("chatcmpl-1", blocks, geometry);
  EXPECT_EQ(json["id"], "chatcmpl-1");
  ASSERT_EQ(json["blocks"].size(), 2u);
  const Json& first = json["blocks"][0];
  EXPECT_EQ(first["position"], 0);
  EXPECT_EQ(first["tokens"], 64);
  EXPECT_EQ(first["format"], "k4v4");
  EXPECT_EQ(first["bytes"], BlockBytes(geometry, Format::kK4V4));
  EXPECT_EQ(first["wish"], "k2v2");
  EXPECT_EQ(first["history"][0],
            (Json{{"from", "bf16"}, {"to", "k4v4"}, {"cause", "age"}, {"price", 0.5}, {"step", 3}}));
  EXPECT_EQ(first["users"], 2);
  EXPECT_EQ(first["tags"], (Json{{"current/text/user", 52}, {"m1/text/obs", 12}}));
  EXPECT_EQ(json["blocks"][1]["tags"], Json::object());
  EXPECT_EQ(json["formats"]["k4v4"], (Json{{"bytes", BlockBytes(geometry, Format::kK4V4)}, {"tokens", 64}}));
  EXPECT_EQ(json["formats"]["bf16"],
            (Json{{"bytes", BlockBytes(geometry, Format::kBf16) / 4}, {"tokens", 0}}));
}

TEST(MetricsTest, ShowTheMemoryEconomyUnderFixedNames) {
  Metrics metrics("m");
  const auto expect = [&](const std::string& text, const std::string& line) {
    EXPECT_NE(text.find("\n" + line + "\n"), std::string::npos) << line << "\n" << text;
  };
  std::string text = metrics.Render(BusySnapshot());
  expect(text, "triaxial_kv_price{model_name=\"m\"} 0.125");
  expect(text, "triaxial_kv_demotions_total{model_name=\"m\",cause=\"age\",from=\"bf16\",to=\"k2v2\"} 5");
  expect(text, "triaxial_kv_demotions_total{model_name=\"m\",cause=\"window\",from=\"bf16\",to=\"k2v2\"} 0");
  expect(text, "triaxial_prefix_cache_queries_total{model_name=\"m\"} 100");
  expect(text, "triaxial_prefix_cache_hits_total{model_name=\"m\"} 60");
  expect(text, "triaxial_kv_evictions_total{model_name=\"m\"} 8");
  expect(text, "triaxial_kv_sleeping_bytes{model_name=\"m\",tier=\"host\"} 11");
  expect(text, "triaxial_kv_sleeping_bytes{model_name=\"m\",tier=\"disk\"} 12");
  expect(text, "triaxial_kv_blocks_woken_total{model_name=\"m\"} 13");
  expect(text, "triaxial_kv_store_corrupt_total{model_name=\"m\"} 14");
  expect(text, "triaxial_kv_integrity_errors_total{model_name=\"m\"} 2");
  expect(text, "triaxial_kv_cached_tokens{model_name=\"m\"} 6");
  EngineSnapshot later = BusySnapshot();
  later.evictions = 9;
  text = metrics.Render(later);
  expect(text, "triaxial_kv_evictions_total{model_name=\"m\"} 9");
}

TEST(OpenAiTest, ErrorsSayWhenToComeAgain) {
  EXPECT_EQ(HttpStatus(Code::kDeadlineExceeded), 504);
  const Json late = ErrorJson(DeadlineExceeded("too late"))["error"];
  EXPECT_EQ(late["type"], "timeout_error");
  EXPECT_EQ(late["code"], 504);
  EXPECT_FALSE(late.contains("retry_after_seconds"));
  EXPECT_EQ(ErrorJson(ResourceExhausted("full"), 17)["error"]["retry_after_seconds"], 17);
}

}  // namespace
}  // namespace triaxial
