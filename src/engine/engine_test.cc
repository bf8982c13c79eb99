#include "engine/engine.h"

#include <gtest/gtest.h>

#include <condition_variable>
#include <future>
#include <limits>
#include <mutex>
#include <new>
#include <random>
#include <set>
#include <thread>

#include "engine/fake_model.h"
#include "kv/policy.h"

namespace triaxial {
namespace {

constexpr std::chrono::seconds kPatience(20);

// What a client hears.
class Listener {
 public:
  std::function<void(TokenEvent&&)> Callback() {
    return [this](TokenEvent&& event) {
      const std::lock_guard lock(mutex_);
      EXPECT_EQ(last_.finish, FinishReason::kNone) << "an event after the last one";
      if (event.token >= 0) tokens_.push_back(event.token);
      last_ = std::move(event);
      changed_.notify_all();
    };
  }
  TokenEvent Wait() {
    std::unique_lock lock(mutex_);
    EXPECT_TRUE(changed_.wait_for(lock, kPatience, [this] { return last_.finish != FinishReason::kNone; }));
    return last_;
  }
  void WaitForTokens(size_t count) {
    std::unique_lock lock(mutex_);
    EXPECT_TRUE(changed_.wait_for(lock, kPatience, [&] { return tokens_.size() >= count; }));
  }
  std::vector<int32_t> tokens() const {
    const std::lock_guard lock(mutex_);
    return tokens_;
  }
  bool finished() const {
    const std::lock_guard lock(mutex_);
    return last_.finish != FinishReason::kNone;
  }

 private:
  mutable std::mutex mutex_;
  std::condition_variable changed_;
  std::vector<int32_t> tokens_;
  TokenEvent last_;
};

// Lets a number of model steps pass, then holds the engine thread.
class Gate {
 public:
  void Open(int steps) {
    const std::lock_guard lock(mutex_);
    allowed_ += steps;
    changed_.notify_all();
  }
  void OpenForGood() { Open(1 << 30); }
  void Pass() {
    std::unique_lock lock(mutex_);
    ++arrived_;
    changed_.notify_all();
    EXPECT_TRUE(changed_.wait_for(lock, kPatience, [this] { return allowed_ > 0; }));
    --allowed_;
  }
  // Until the engine has come to its step number `step` (from 1) and waits or has passed.
  void WaitForStep(int step) {
    std::unique_lock lock(mutex_);
    EXPECT_TRUE(changed_.wait_for(lock, kPatience, [&] { return arrived_ >= step; }));
  }

 private:
  std::mutex mutex_;
  std::condition_variable changed_;
  int allowed_ = 0;
  int arrived_ = 0;
};

Policy PolicyNamed(const char* name) { return LoadPolicy(name).value(); }

// The paper's policy with a window of BF16, so that blocks are converted while the sequence grows.
Policy PolicyWithWindow() {
  Policy policy = PolicyNamed("paper");
  policy.recent_window = 100;
  return policy;
}

std::unique_ptr<Engine> Start(std::unique_ptr<FakeModel> model, EngineOptions options) {
  if (options.policy.name.empty()) options.policy = PolicyNamed("paper");
  PreprocessorConfig preprocessor;
  preprocessor.merge_size = 1;
  GenerationConfig generation;
  generation.eos_token_ids = {FakeModel::kEos};
  Result<std::unique_ptr<Engine>> engine =
      Engine::Create(std::move(model), preprocessor, generation, MarkupIds{}, options);
  EXPECT_TRUE(engine.ok()) << engine.status().message();
  return std::move(engine).value();
}

// Text of several turns and roles, so that blocks take different formats.
Request RequestOf(std::vector<int32_t> tokens, int max_tokens, uint32_t seed = 1) {
  std::mt19937 random(seed);
  Request request;
  int32_t turn = 0;
  for (int32_t begin = 0; begin < static_cast<int32_t>(tokens.size());) {
    const int32_t end = std::min<int32_t>(begin + 1 + static_cast<int32_t>(random() % 100),
                                          static_cast<int32_t>(tokens.size()));
    turn += random() % 2;
    request.prompt.spans.push_back(
        {begin, end, 0, turn, Modal::kText, static_cast<Semantic>(random() % kSemantics)});
    begin = end;
  }
  request.prompt.tokens = std::move(tokens);
  request.sampling.max_tokens = max_tokens;
  return request;
}

std::vector<int32_t> RandomTokens(size_t count, uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<int32_t> tokens(count);
  for (int32_t& token : tokens) token = static_cast<int32_t>(random() % 99);
  return tokens;
}

Result<RequestId> Submit(Engine* engine, Request request, Listener* listener) {
  request.on_event = listener->Callback();
  return engine->Submit(std::move(request));
}

void ExpectEmpty(Engine* engine) {
  engine->Drain(20);
  const EngineSnapshot snapshot = engine->Snapshot();
  EXPECT_EQ(snapshot.running, 0);
  EXPECT_EQ(snapshot.waiting, 0);
  EXPECT_EQ(snapshot.kv.total_bytes(), 0);
  EXPECT_EQ(snapshot.kv_usage, 0);
  for (const int64_t tokens : snapshot.tokens_by_tag) EXPECT_EQ(tokens, 0);
}

int64_t Bf16Blocks(int64_t count) { return count * BlockBytes(FakeModel().geometry(), Format::kBf16); }

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

TEST(Engine, ReadsImagesInChunksAndEncodesEachOnce) {
  for (const int32_t step_tokens : {512, 16}) {
    auto model = std::make_unique<FakeModel>();
    FakeModel* fake = model.get();
    EngineOptions options;
    options.max_running = 4;
    options.max_step_tokens = step_tokens;
    options.kv_memory = Bf16Blocks(100);
    const std::unique_ptr<Engine> engine = Start(std::move(model), options);
    std::vector<int32_t> tokens = RandomTokens(300, 4);
    std::vector<int32_t> meaning = tokens;
    std::vector<PromptImage> images;
    for (const int32_t begin : {5, 65, 200}) {
      auto patches = std::make_shared<ImagePatches>();
      patches->grid_h = 6;
      patches->grid_w = 10;
      patches->hash_lo = static_cast<uint64_t>(begin);
      for (int32_t i = 0; i < 60; ++i) {
        tokens[static_cast<size_t>(begin + i)] = FakeModel::kImagePad;
        meaning[static_cast<size_t>(begin + i)] = FakeModel::VisualToken(patches->hash_lo, i);
      }
      images.push_back({begin, 60, patches});
    }
    Request request = RequestOf(tokens, 40);
    request.prompt.images = images;
    Listener listener;
    Listener other;
    ASSERT_TRUE(Submit(engine.get(), RequestOf(RandomTokens(33, 5), 50), &other).ok());
    ASSERT_TRUE(Submit(engine.get(), std::move(request), &listener).ok());
    EXPECT_NE(listener.Wait().finish, FinishReason::kError);
    EXPECT_EQ(listener.tokens(), FakeModel::Continue(meaning, 40));
    EXPECT_EQ(fake->encoded, 3);
    ExpectEmpty(engine.get());
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
  refused(RequestOf(RandomTokens(999, 1), 5), Code::kResourceExhausted, "--kv-memory");
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

TEST(Engine, QueueIsBounded) {
  auto gate = std::make_shared<Gate>();
  auto model = std::make_unique<FakeModel>();
  model->on_forward = [gate](const Batch&) { gate->Pass(); };
  EngineOptions options;
  options.max_running = 1;
  options.max_queued = 3;
  options.kv_memory = Bf16Blocks(50);
  const std::unique_ptr<Engine> engine = Start(std::move(model), options);
  std::vector<Listener> listeners(5);
  ASSERT_TRUE(Submit(engine.get(), RequestOf({1, 2}, 3), &listeners[0]).ok());
  gate->WaitForStep(1);  // the first one runs
  for (int i = 1; i <= 3; ++i) ASSERT_TRUE(Submit(engine.get(), RequestOf({1, 2}, 3), &listeners[i]).ok());
  const Result<RequestId> fifth = Submit(engine.get(), RequestOf({1, 2}, 3), &listeners[4]);
  ASSERT_FALSE(fifth.ok());
  EXPECT_EQ(fifth.status().code(), Code::kResourceExhausted);
  gate->OpenForGood();
  for (int i = 0; i <= 3; ++i) EXPECT_EQ(listeners[i].Wait().finish, FinishReason::kLength);
  EXPECT_TRUE(Submit(engine.get(), RequestOf({1, 2}, 3), &listeners[4]).ok());
  ExpectEmpty(engine.get());
}

TEST(Engine, CancelsInEveryPhase) {
  auto gate = std::make_shared<Gate>();
  auto model = std::make_unique<FakeModel>();
  model->on_forward = [gate](const Batch&) { gate->Pass(); };
  EngineOptions options;
  options.max_running = 2;
  options.max_step_tokens = 50;
  options.kv_memory = Bf16Blocks(100);
  const std::unique_ptr<Engine> engine = Start(std::move(model), options);
  Listener decoding, prefilling, queued;
  Request endless = RequestOf({1, 2, 3}, 0);
  endless.sampling.ignore_eos = true;
  const RequestId a = Submit(engine.get(), std::move(endless), &decoding).value();
  gate->Open(3);
  decoding.WaitForTokens(3);
  const RequestId b = Submit(engine.get(), RequestOf(RandomTokens(400, 1), 5), &prefilling).value();
  gate->WaitForStep(4);
  gate->Open(3);
  gate->WaitForStep(7);  // two or three of nine chunks are in the cache
  const RequestId c = Submit(engine.get(), RequestOf({5, 6}, 5), &queued).value();
  engine->Cancel(12345);
  engine->Cancel(c);
  engine->Cancel(b);
  engine->Cancel(a);
  engine->Cancel(a);
  gate->Open(1);
  for (Listener* listener : {&decoding, &prefilling, &queued}) {
    const TokenEvent last = listener->Wait();
    EXPECT_EQ(last.finish, FinishReason::kCancelled);
    EXPECT_EQ(last.token, -1);
  }
  EXPECT_TRUE(prefilling.tokens().empty());
  EXPECT_TRUE(queued.tokens().empty());
  EXPECT_EQ(queued.Wait().stats.kv.total_bytes(), 0);
  EXPECT_GT(prefilling.Wait().stats.kv.total_bytes(), 0);
  Listener after;
  gate->OpenForGood();
  ASSERT_TRUE(Submit(engine.get(), RequestOf({7}, 2), &after).ok());
  EXPECT_EQ(after.Wait().finish, FinishReason::kLength);
  ExpectEmpty(engine.get());
}

TEST(Engine, LongPrefillDoesNotStopDecoding) {
  auto model = std::make_unique<FakeModel>();
  std::vector<int32_t> rows_of_first;  // of the first sequence in each step
  model->on_forward = [&](const Batch& batch) {
    rows_of_first.push_back(batch.sequences[0].rows);
    EXPECT_LE(batch.rows(), 32);
  };
  auto gate = std::make_shared<Gate>();
  EngineOptions options;
  options.max_running = 4;
  options.max_step_tokens = 32;
  options.kv_memory = Bf16Blocks(200);
  Listener talking, reading, late;
  const std::unique_ptr<Engine> engine = Start(std::move(model), options);
  Request talk = RequestOf({1, 2, 3}, 200);
  talk.sampling.ignore_eos = true;
  ASSERT_TRUE(Submit(engine.get(), std::move(talk), &talking).ok());
  talking.WaitForTokens(1);
  ASSERT_TRUE(Submit(engine.get(), RequestOf(RandomTokens(3000, 2), 1), &reading).ok());
  ASSERT_TRUE(Submit(engine.get(), RequestOf({9}, 1), &late).ok());
  late.Wait();
  EXPECT_TRUE(reading.finished());  // first come, first served
  EXPECT_EQ(talking.Wait().finish, FinishReason::kLength);
  // Its 200 tokens came in 200 consecutive steps, whatever else was read meanwhile.
  for (size_t i = 1; i < 200; ++i) EXPECT_EQ(rows_of_first[i], 1) << i;
  ExpectEmpty(engine.get());
}

TEST(Engine, ARequestThatOutgrowsTheArenaFailsAlone) {
  EngineOptions options;
  options.policy = PolicyNamed("bf16");
  options.kv_memory = Bf16Blocks(6);
  const std::unique_ptr<Engine> engine = Start(std::make_unique<FakeModel>(), options);
  Listener grows, modest;
  Request endless = RequestOf(RandomTokens(100, 1), 0);
  endless.sampling.ignore_eos = true;
  ASSERT_TRUE(Submit(engine.get(), std::move(endless), &grows).ok());
  ASSERT_TRUE(Submit(engine.get(), RequestOf(RandomTokens(100, 2), 60), &modest).ok());
  const TokenEvent last = grows.Wait();
  EXPECT_EQ(last.finish, FinishReason::kError);
  EXPECT_EQ(last.error.code(), Code::kResourceExhausted);
  EXPECT_GE(grows.tokens().size(), 6u * 64 - 100);
  modest.Wait();
  EXPECT_EQ(modest.tokens(), FakeModel::Continue(RandomTokens(100, 2), 60));
  ExpectEmpty(engine.get());
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

TEST(Engine, AFailedStepFailsItsRequestsOnly) {
  struct Failure {
    std::function<void()> what;
    const char* message;
  };
  const Failure failures[] = {{[] { throw std::bad_alloc(); }, "bad_alloc"},
                              {[] { throw std::runtime_error("the kernel broke"); }, "the kernel broke"},
                              {[] { throw 5; }, "unknown"}};
  for (const Failure& failure : failures) {
    auto model = std::make_unique<FakeModel>();
    auto gate = std::make_shared<Gate>();
    int step = 0;
    model->on_forward = [&](const Batch&) {
      gate->Pass();
      if (++step == 5) failure.what();
    };
    EngineOptions options;
    options.max_running = 2;
    options.kv_memory = Bf16Blocks(100);
    std::vector<Listener> listeners(3);
    const std::unique_ptr<Engine> engine = Start(std::move(model), options);
    for (Listener& listener : listeners) {
      Request request = RequestOf(RandomTokens(100, 1), 20);
      request.sampling.ignore_eos = true;
      ASSERT_TRUE(Submit(engine.get(), std::move(request), &listener).ok());
    }
    gate->OpenForGood();
    int failed = 0;
    for (Listener& listener : listeners) {
      const TokenEvent last = listener.Wait();
      if (last.finish == FinishReason::kLength) continue;
      EXPECT_EQ(last.finish, FinishReason::kError);
      EXPECT_EQ(last.error.code(), Code::kInternal);
      EXPECT_NE(last.error.message().find(failure.message), std::string::npos) << last.error.message();
      ++failed;
    }
    EXPECT_GE(failed, 1);
    EXPECT_EQ(listeners[2].Wait().finish, FinishReason::kLength);  // it waited meanwhile
    ExpectEmpty(engine.get());
  }
}

TEST(Engine, AnImageThatFailsIsItsRequestsTrouble) {
  auto model = std::make_unique<FakeModel>();
  model->on_encode = [](const ImagePatches&) { throw std::bad_alloc(); };
  EngineOptions options;
  options.kv_memory = Bf16Blocks(100);
  const std::unique_ptr<Engine> engine = Start(std::move(model), options);
  auto patches = std::make_shared<ImagePatches>();
  patches->grid_h = patches->grid_w = 2;
  Request request = RequestOf({1, 99, 99, 99, 99, 2}, 3);
  request.prompt.images = {{1, 4, patches}};
  Listener text, image;
  ASSERT_TRUE(Submit(engine.get(), RequestOf({1, 2, 3}, 30), &text).ok());
  ASSERT_TRUE(Submit(engine.get(), std::move(request), &image).ok());
  EXPECT_EQ(image.Wait().error.code(), Code::kInternal);
  text.Wait();
  EXPECT_EQ(text.tokens(), FakeModel::Continue({1, 2, 3}, 30));
  ExpectEmpty(engine.get());
}

TEST(Engine, LogitsWithoutANumberFailTheRequest) {
  auto model = std::make_unique<FakeModel>();
  model->on_logits = [](std::span<float> logits) {
    for (float& x : logits) x = std::numeric_limits<float>::quiet_NaN();
  };
  EngineOptions options;
  options.kv_memory = Bf16Blocks(10);
  const std::unique_ptr<Engine> engine = Start(std::move(model), options);
  Listener listener;
  ASSERT_TRUE(Submit(engine.get(), RequestOf({1, 2, 3}, 30), &listener).ok());
  EXPECT_EQ(listener.Wait().error.code(), Code::kInternal);
  ExpectEmpty(engine.get());
}

TEST(Engine, AReceiverThatThrowsIsCancelled) {
  EngineOptions options;
  options.kv_memory = Bf16Blocks(10);
  const std::unique_ptr<Engine> engine = Start(std::make_unique<FakeModel>(), options);
  Request request = RequestOf({1, 2, 3}, 0);
  request.sampling.ignore_eos = true;
  std::promise<FinishReason> finish;
  request.on_event = [&](TokenEvent&& event) {
    if (event.finish != FinishReason::kNone) return finish.set_value(event.finish);
    throw std::runtime_error("socket closed");
  };
  ASSERT_TRUE(engine->Submit(std::move(request)).ok());
  EXPECT_EQ(finish.get_future().get(), FinishReason::kCancelled);
  ExpectEmpty(engine.get());
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
  EXPECT_EQ(blocks[3].tokens, 8);
  EXPECT_EQ(blocks[1].position, 64);
  EXPECT_EQ(Tag::FromIndex(blocks[1].token[5].tag), (Tag{Temporal::kM1, Modal::kText, Semantic::kObs}));
  EXPECT_EQ(Tag::FromIndex(blocks[3].token[0].tag), (Tag{Temporal::kCurrent, Modal::kText, Semantic::kUser}));
  EXPECT_GE(engine->InspectBlocks(id).size(), 4u);  // the same from another thread
  EXPECT_TRUE(engine->InspectBlocks(777).empty());
  engine->Cancel(id);
  EXPECT_TRUE(engine->InspectBlocks(id).empty());
}

TEST(Engine, DrainFinishesWhatItCanAndCancelsTheRest) {
  EngineOptions options;
  options.kv_memory = Bf16Blocks(3000);
  {
    const std::unique_ptr<Engine> engine = Start(std::make_unique<FakeModel>(), options);
    Listener listener;
    ASSERT_TRUE(Submit(engine.get(), RequestOf({1, 2, 3}, 20), &listener).ok());
    engine->Drain(20);
    EXPECT_TRUE(listener.finished());
    EXPECT_NE(listener.Wait().finish, FinishReason::kCancelled);
  }
  Listener endless;
  Request request = RequestOf({1, 2, 3}, 0);
  request.sampling.ignore_eos = true;
  {
    const std::unique_ptr<Engine> engine = Start(std::make_unique<FakeModel>(), options);
    ASSERT_TRUE(Submit(engine.get(), request, &endless).ok());
    engine->Drain(0.05);
    EXPECT_EQ(endless.Wait().finish, FinishReason::kCancelled);
    EXPECT_EQ(engine->Snapshot().kv.total_bytes(), 0);
  }
  Listener dropped;
  {
    const std::unique_ptr<Engine> engine = Start(std::make_unique<FakeModel>(), options);
    ASSERT_TRUE(Submit(engine.get(), request, &dropped).ok());
    dropped.WaitForTokens(1);
  }
  EXPECT_EQ(dropped.Wait().finish, FinishReason::kCancelled);
}

// Many threads, an arena for a few sequences, clients that leave at any moment.
TEST(Engine, SurvivesACrowd) {
  EngineOptions options;
  options.policy = PolicyNamed("bf16");
  options.kv_memory = Bf16Blocks(16);
  options.max_running = 6;
  options.max_step_tokens = 96;
  options.max_queued = 12;
  const std::unique_ptr<Engine> engine = Start(std::make_unique<FakeModel>(), options);
  std::atomic<int> answered = 0;
  std::atomic<int> cancelled = 0;
  std::atomic<int> refused = 0;
  const auto deadline = std::chrono::steady_clock::now() + std::chrono::milliseconds(1500);
  const auto client = [&](uint32_t seed) {
    std::mt19937 random(seed);
    while (std::chrono::steady_clock::now() < deadline) {
      const std::vector<int32_t> prompt = RandomTokens(1 + random() % 200, static_cast<uint32_t>(random()));
      const int max_tokens = 1 + static_cast<int>(random() % 300);
      Listener listener;
      const Result<RequestId> id = Submit(engine.get(), RequestOf(prompt, max_tokens, seed), &listener);
      if (!id.ok()) {
        EXPECT_EQ(id.status().code(), Code::kResourceExhausted);
        ++refused;
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
        continue;
      }
      const bool leaves = random() % 3 == 0;
      if (leaves) {
        std::this_thread::sleep_for(std::chrono::microseconds(random() % 3000));
        engine->Cancel(*id);
      }
      if (random() % 4 == 0) (void)engine->InspectBlocks(*id);
      const TokenEvent last = listener.Wait();
      if (last.finish == FinishReason::kCancelled) {
        EXPECT_TRUE(leaves);
        ++cancelled;
      } else if (last.finish == FinishReason::kError) {
        EXPECT_EQ(last.error.code(), Code::kResourceExhausted) << last.error.message();
        EXPECT_GT(prompt.size() + listener.tokens().size(), 900u);
      } else {
        EXPECT_EQ(listener.tokens(), FakeModel::Continue(prompt, static_cast<size_t>(max_tokens)));
        ++answered;
      }
    }
  };
  std::vector<std::thread> clients;
  for (uint32_t i = 0; i < 16; ++i) clients.emplace_back(client, i);
  for (std::thread& thread : clients) thread.join();
  EXPECT_GT(answered, 20);
  EXPECT_GT(cancelled, 5);
  ExpectEmpty(engine.get());
  EXPECT_GT(engine->Snapshot().preemptions, 0);
}

}  // namespace
}  // namespace triaxial
