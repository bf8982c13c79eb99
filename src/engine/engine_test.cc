// What requests get: answers, refusals, figures.
#include "engine/engine.h"

#include <gtest/gtest.h>

#include <condition_variable>
#include <future>
#include <mutex>
#include <set>

#include "engine/engine_testing.h"

namespace triaxial {
namespace {

struct Setting {
  Policy policy;
  Codec codec;
  int32_t max_running;
  int32_t max_step_tokens;
  int64_t kv_memory;
};

// Whatever runs beside it and however it is cut into steps, a request's answer is that of its tokens alone.
TEST(Engine, AnswersAsIfEachRequestWereAlone) {
  const Setting settings[] = {
      {PolicyNamed("bf16"), Codec::kRotated, 64, 512, Bf16Blocks(2000)},
      {PolicyNamed("paper"), Codec::kPaper, 8, 64, Bf16Blocks(2000)},
      {PolicyNamed("int2"), Codec::kRotated, 3, 7, Bf16Blocks(300)},
      {PolicyWithWindow(), Codec::kPaper, 16, 130, Bf16Blocks(2000)},
      {PolicyNamed("bf16"), Codec::kPaper, 64, 200, Bf16Blocks(14)},  // preempts all the time
      {PolicyWithWindow(), Codec::kPaper, 64, 200, Bf16Blocks(16)},
  };
  for (const Setting& setting : settings) {
    SCOPED_TRACE(testing::Message() << setting.policy.name << " " << setting.policy.recent_window << " "
                                    << setting.kv_memory);
    EngineOptions options;
    options.policy = setting.policy;
    options.max_running = setting.max_running;
    options.max_step_tokens = setting.max_step_tokens;
    options.kv_memory = setting.kv_memory;
    const std::unique_ptr<Engine> engine = Start(std::make_unique<FakeModel>(setting.codec), options);
    constexpr size_t kRequests = 30;
    std::vector<Listener> listeners(kRequests);
    std::vector<std::vector<int32_t>> prompts;
    for (size_t i = 0; i < kRequests; ++i) {
      prompts.push_back(RandomTokens(1 + i * i % 400, static_cast<uint32_t>(i)));
      ASSERT_TRUE(
          Submit(engine.get(), RequestOf(prompts[i], 150, static_cast<uint32_t>(i)), &listeners[i]).ok());
    }
    for (size_t i = 0; i < kRequests; ++i) {
      const TokenEvent last = listeners[i].Wait();
      const std::vector<int32_t> expected = FakeModel::Continue(prompts[i], 150);
      EXPECT_EQ(listeners[i].tokens(), expected) << last.error.message();
      const bool stopped = expected.back() == FakeModel::kEos;
      EXPECT_EQ(last.finish, stopped ? FinishReason::kStop : FinishReason::kLength);
      EXPECT_EQ(last.token, expected.back());
      EXPECT_EQ(last.stats.prompt_tokens, static_cast<int32_t>(prompts[i].size()));
      EXPECT_EQ(last.stats.completion_tokens, static_cast<int32_t>(expected.size()));
      // The last token's keys and values are never computed.
      EXPECT_EQ(last.stats.kv.total_tokens(), static_cast<int64_t>(prompts[i].size() + expected.size()) - 1);
      EXPECT_GT(last.stats.effective_bits, 0);
      EXPECT_LE(last.stats.queue_seconds, last.stats.ttft_seconds);
      EXPECT_LE(last.stats.ttft_seconds, last.stats.total_seconds);
    }
    ExpectEmpty(engine.get());
    EXPECT_EQ(engine->Snapshot().preemptions > 0, setting.kv_memory <= Bf16Blocks(16));
  }
}

// 300 tokens with three pictures of 60; `meaning` is what the fake model reads.
Request RequestWithImages(uint32_t seed, std::vector<int32_t>* meaning) {
  std::vector<int32_t> tokens = RandomTokens(300, seed);
  *meaning = tokens;
  std::vector<PromptImage> images;
  for (const int32_t begin : {5, 65, 200}) {
    auto patches = std::make_shared<ImagePatches>();
    patches->grid_h = 6;
    patches->grid_w = 10;
    patches->hash_lo = static_cast<uint64_t>(begin) + seed;
    for (int32_t i = 0; i < 60; ++i) {
      tokens[static_cast<size_t>(begin + i)] = FakeModel::kImagePad;
      (*meaning)[static_cast<size_t>(begin + i)] = FakeModel::VisualToken(patches->hash_lo, i);
    }
    images.push_back({begin, 60, patches});
  }
  Request request = RequestOf(std::move(tokens), 150, seed);
  request.prompt.images = std::move(images);
  return request;
}

TEST(Engine, ReadsImagesInChunks) {
  struct ImageSetting {
    int32_t max_step_tokens;
    int64_t blocks;
    bool preempts;
  };
  for (const ImageSetting& setting : {ImageSetting{512, 200, false}, {16, 200, false}, {50, 18, true}}) {
    SCOPED_TRACE(setting.max_step_tokens);
    auto model = std::make_unique<FakeModel>();
    FakeModel* fake = model.get();
    EngineOptions options;
    options.policy = PolicyNamed("bf16");
    options.max_running = 4;
    options.max_step_tokens = setting.max_step_tokens;
    options.kv_memory = Bf16Blocks(setting.blocks);
    const std::unique_ptr<Engine> engine = Start(std::move(model), options);
    constexpr size_t kRequests = 8;
    std::vector<Listener> listeners(kRequests);
    std::vector<std::vector<int32_t>> meanings(kRequests);
    for (size_t i = 0; i < kRequests; ++i) {
      Request request = RequestWithImages(static_cast<uint32_t>(i), &meanings[i]);
      ASSERT_TRUE(Submit(engine.get(), std::move(request), &listeners[i]).ok());
    }
    for (size_t i = 0; i < kRequests; ++i) {
      EXPECT_NE(listeners[i].Wait().finish, FinishReason::kError);
      EXPECT_EQ(listeners[i].tokens(), FakeModel::Continue(meanings[i], 150));
    }
    ExpectEmpty(engine.get());
    EXPECT_EQ(engine->Snapshot().preemptions > 0, setting.preempts);
    if (setting.preempts) {
      EXPECT_GT(fake->encoded, 3 * static_cast<int>(kRequests));
    } else {
      EXPECT_EQ(fake->encoded, 3 * static_cast<int>(kRequests));
    }
  }
}

TEST(Engine, RefusesAtOnceWhatCannotRun) {
  EngineOptions options;
  options.max_model_len = 1000;
  options.kv_memory = Bf16Blocks(4);
  const std::unique_ptr<Engine> engine = Start(std::make_unique<FakeModel>(), options);
  const auto refused = [&](Request request, Code code, const char* names) {
    const Result<RequestId> id = engine->Submit(std::move(request));
    ASSERT_FALSE(id.ok());
    EXPECT_EQ(id.status().code(), code) << id.status().message();
    EXPECT_NE(id.status().message().find(names), std::string::npos) << id.status().message();
  };
  refused(RequestOf({}, 5), Code::kInvalidArgument, "empty");
  refused(RequestOf(RandomTokens(1000, 1), 5), Code::kInvalidArgument, "1000 tokens");
  refused(RequestOf(RandomTokens(999, 1), 5), Code::kTooLarge, "--kv-memory");
  refused(RequestOf({1, 2, 101}, 5), Code::kInvalidArgument, "token 2 of the prompt is 101");
  refused(RequestOf({-1}, 5), Code::kInvalidArgument, "-1");
  Request request = RequestOf({1, 2, 3}, 5);
  request.sampling.top_p = 2;
  refused(request, Code::kInvalidArgument, "top_p");
  request = RequestOf({1, 2, 3}, 5);
  request.prompt.spans.back().end = 2;
  refused(request, Code::kInvalidArgument, "spans cover 2");
  request = RequestOf({1, 2, 3}, 5);
  request.prompt.spans = {{0, 1}, {2, 3}};
  refused(request, Code::kInvalidArgument, "gaps");
  request = RequestOf({1, 2, 3}, 5);
  auto patches = std::make_shared<ImagePatches>();
  patches->grid_h = patches->grid_w = 1;
  request.prompt.images = {{1, 2, patches}};
  refused(request, Code::kInvalidArgument, "image 0");
  request.prompt.images = {{1, 1, patches}, {1, 1, patches}};
  refused(request, Code::kInvalidArgument, "image 1");
  request.prompt.images = {{1, 1, nullptr}};
  refused(request, Code::kInvalidArgument, "image 0");
  engine->Drain(1);
  refused(RequestOf({1}, 1), Code::kUnavailable, "shutting down");
}

TEST(Engine, RefusesOptionsThatCannotWork) {
  const auto refused = [](auto set, const char* names) {
    EngineOptions options;
    options.policy = PolicyNamed("paper");
    set(&options);
    const auto engine = Engine::Create(std::make_unique<FakeModel>(), {}, {}, {}, options);
    ASSERT_FALSE(engine.ok()) << names;
    EXPECT_EQ(engine.status().code(), Code::kInvalidArgument);
    EXPECT_NE(engine.status().message().find(names), std::string::npos) << engine.status().message();
  };
  refused([](EngineOptions* o) { o->max_model_len = 100001; }, "100000");
  refused([](EngineOptions* o) { o->max_running = 0; }, "1 or more");
  refused([](EngineOptions* o) { o->max_step_tokens = 63; }, "step of 63");
  refused([](EngineOptions* o) { o->max_queued = 0; }, "0 requests may wait");
  refused([](EngineOptions* o) { o->kv_memory = 100; }, "");
}

TEST(Engine, StopsWhereItIsTold) {
  EngineOptions options;
  options.kv_memory = Bf16Blocks(100);
  options.max_model_len = 600;
  const std::unique_ptr<Engine> engine = Start(std::make_unique<FakeModel>(), options);
  std::vector<int32_t> prompt = RandomTokens(20, 1);
  while (FakeModel::Continue(prompt, 200).size() == 200 || FakeModel::Continue(prompt, 20).size() < 20) {
    prompt = RandomTokens(20, static_cast<uint32_t>(prompt[0] + 100 * prompt[1]));
  }
  const std::vector<int32_t> natural = FakeModel::Continue(prompt, 200);
  const auto run = [&](auto change) {
    Request request = RequestOf(prompt, 0);
    change(&request.sampling);
    Listener listener;
    EXPECT_TRUE(Submit(engine.get(), std::move(request), &listener).ok());
    const TokenEvent last = listener.Wait();
    return std::pair(listener.tokens(), last.finish);
  };
  EXPECT_EQ(run([](SamplingParams*) {}), std::pair(natural, FinishReason::kStop));
  const auto ignoring = run([](SamplingParams* p) { p->ignore_eos = true; });
  EXPECT_EQ(ignoring.first.size(), 580u);  // up to the model's length
  EXPECT_EQ(ignoring.second, FinishReason::kLength);
  EXPECT_TRUE(std::equal(natural.begin(), natural.end(), ignoring.first.begin()));
  const auto limited = run([](SamplingParams* p) { p->max_tokens = 7; });
  EXPECT_EQ(limited,
            std::pair(std::vector<int32_t>(natural.begin(), natural.begin() + 7), FinishReason::kLength));
  const int32_t stop = natural[10];
  const auto first = static_cast<size_t>(std::find(natural.begin(), natural.end(), stop) - natural.begin());
  const auto stopped = run([&](SamplingParams* p) {
    p->stop_token_ids = {5000, stop}, p->ignore_eos = true;
  });
  EXPECT_EQ(stopped,
            std::pair(std::vector<int32_t>(natural.begin(), natural.begin() + static_cast<long>(first) + 1),
                      FinishReason::kStop));
}

TEST(Engine, SeedsGiveTheSameAnswerInAnyCompany) {
  EngineOptions options;
  options.kv_memory = Bf16Blocks(300);
  const std::unique_ptr<Engine> engine = Start(std::make_unique<FakeModel>(), options);
  const auto request_with = [](uint64_t seed, bool has_seed) {
    Request request = RequestOf(RandomTokens(30, 1), 40);
    request.sampling.temperature = 5;
    request.sampling.ignore_eos = true;
    request.sampling.has_seed = has_seed;
    request.sampling.seed = seed;
    return request;
  };
  Listener alone;
  ASSERT_TRUE(Submit(engine.get(), request_with(11, true), &alone).ok());
  alone.Wait();
  std::vector<Listener> crowd(6);
  for (size_t i = 0; i < 6; ++i) {
    ASSERT_TRUE(Submit(engine.get(), request_with(i == 3 ? 11 : i, i < 4), &crowd[i]).ok());
  }
  std::set<std::vector<int32_t>> answers;
  for (Listener& listener : crowd) {
    listener.Wait();
    answers.insert(listener.tokens());
  }
  EXPECT_EQ(crowd[3].tokens(), alone.tokens());
  EXPECT_EQ(answers.size(), 6u);
}

TEST(Engine, ReportsLogprobs) {
  EngineOptions options;
  options.kv_memory = Bf16Blocks(10);
  const std::unique_ptr<Engine> engine = Start(std::make_unique<FakeModel>(), options);
  Request request = RequestOf({1, 2, 3}, 5);
  request.sampling.logprobs = 4;
  request.sampling.ignore_eos = true;
  std::mutex mutex;
  std::condition_variable changed;
  std::vector<TokenEvent> events;
  request.on_event = [&](TokenEvent&& event) {
    const std::lock_guard lock(mutex);
    events.push_back(std::move(event));
    changed.notify_all();
  };
  ASSERT_TRUE(engine->Submit(std::move(request)).ok());
  std::unique_lock lock(mutex);
  ASSERT_TRUE(changed.wait_for(lock, kPatience, [&] { return events.size() == 5; }));
  for (const TokenEvent& event : events) {
    ASSERT_EQ(event.top.size(), 4u);
    EXPECT_EQ(event.top[0].token, event.token);  // greedy
    EXPECT_EQ(event.top[0].logprob, event.logprob);
    EXPECT_LT(event.logprob, 0);
    EXPECT_GE(event.top[1].logprob, event.top[2].logprob);
  }
}

TEST(Engine, ShowsTheBlocksOfARunningRequest) {
  EngineOptions options;
  options.kv_memory = Bf16Blocks(100);
  const std::unique_ptr<Engine> engine = Start(std::make_unique<FakeModel>(), options);
  Request request = RequestOf(RandomTokens(200, 1), 0);
  request.sampling.ignore_eos = true;
  request.prompt.spans = {{0, 64, 0, 0, Modal::kText, Semantic::kInst},
                          {64, 128, 1, 0, Modal::kText, Semantic::kObs},
                          {128, 200, 2, 1, Modal::kText, Semantic::kUser}};
  std::promise<std::vector<KvBlock>> at_first_token;
  bool first = true;
  request.on_event = [&](TokenEvent&& event) {
    if (std::exchange(first, false)) at_first_token.set_value(engine->InspectBlocks(event.id));
  };
  const RequestId id = engine->Submit(std::move(request)).value();
  const std::vector<KvBlock> blocks = at_first_token.get_future().get();
  ASSERT_EQ(blocks.size(), 4u);
  EXPECT_EQ(blocks[0].format, Format::kK4V4);
  EXPECT_EQ(blocks[1].format, Format::kK2V2);
  EXPECT_EQ(blocks[2].format, Format::kK4V4);
  EXPECT_EQ(blocks[3].format, Format::kBf16);
  EXPECT_EQ(blocks[3].tokens, 8 + 1);  // the first token's is being computed
  EXPECT_EQ(blocks[1].position, 64);
  EXPECT_EQ(Tag::FromIndex(blocks[1].tags[5]), (Tag{Temporal::kM1, Modal::kText, Semantic::kObs}));
  EXPECT_EQ(Tag::FromIndex(blocks[3].tags[0]), (Tag{Temporal::kCurrent, Modal::kText, Semantic::kUser}));
  EXPECT_GE(engine->InspectBlocks(id).size(), 4u);  // the same from another thread
  EXPECT_TRUE(engine->InspectBlocks(777).empty());
  EXPECT_EQ(blocks[1].users, 1);
  EXPECT_EQ(blocks[1].need.wish, Format::kK2V2);
  engine->Cancel(id);
  // What it completed is still there for a while, and nobody's.
  const std::vector<KvBlock> left = engine->InspectBlocks(id);
  ASSERT_GE(left.size(), 3u);
  for (const KvBlock& block : left) {
    EXPECT_TRUE(block.complete());
    EXPECT_EQ(block.users, 0);
  }
}

// Many threads, an arena for a few sequences, clients that leave at any moment.

}  // namespace
}  // namespace triaxial
