// How requests end, and what the engine survives.
#include <gtest/gtest.h>

#include <atomic>
#include <deque>
#include <future>
#include <limits>
#include <new>
#include <random>
#include <stdexcept>
#include <thread>

#include "engine/engine_testing.h"

namespace triaxial {
namespace {

TEST(EngineLifecycle, QueueIsBounded) {
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

TEST(EngineLifecycle, AKeyLeavesPlacesInTheQueueToOthers) {
  auto gate = std::make_shared<Gate>();
  auto model = std::make_unique<FakeModel>();
  model->on_forward = [gate](const Batch&) { gate->Pass(); };
  EngineOptions options;
  options.max_running = 1;
  options.max_queued = 6;
  options.kv_memory = Bf16Blocks(50);
  const std::unique_ptr<Engine> engine = Start(std::move(model), options);
  std::deque<Listener> listeners;
  const auto submit = [&](const char* tenant) {
    Request request = RequestOf({1, 2}, 3);
    request.tenant = tenant;
    const Result<RequestId> id = Submit(engine.get(), std::move(request), &listeners.emplace_back());
    if (id.ok()) return true;
    EXPECT_EQ(id.status().code(), Code::kResourceExhausted);
    listeners.pop_back();
    return false;
  };
  ASSERT_TRUE(submit("greedy"));
  gate->WaitForStep(1);  // it runs
  int held = 0;
  while (submit("greedy")) ++held;
  EXPECT_EQ(held, 3) << "half of the places";
  EXPECT_TRUE(submit("second"));
  EXPECT_TRUE(submit("second"));
  EXPECT_FALSE(submit("second")) << "one is free, and it has two";
  EXPECT_FALSE(submit("greedy"));
  EXPECT_TRUE(submit("third"));
  EXPECT_FALSE(submit("fourth")) << "the queue is full";
  gate->OpenForGood();
  for (Listener& listener : listeners) EXPECT_EQ(listener.Wait().finish, FinishReason::kLength);
  EXPECT_TRUE(submit("greedy"));
  EXPECT_EQ(listeners.back().Wait().finish, FinishReason::kLength);
  ExpectEmpty(engine.get());
}

TEST(EngineLifecycle, CancelsInEveryPhase) {
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

TEST(EngineLifecycle, CancelsWhileBlocksAreDemoted) {
  std::promise<void> converting;
  std::promise<void> released;
  bool first = true;
  auto model = std::make_unique<FakeModel>();
  model->on_forward = [&](const Batch& batch) {
    if (batch.converts.empty() || !std::exchange(first, false)) return;
    converting.set_value();
    released.get_future().wait_for(kPatience);
  };
  EngineOptions options;
  options.policy = PolicyWithWindow();
  options.kv_memory = Bf16Blocks(100);
  const std::unique_ptr<Engine> engine = Start(std::move(model), options);
  Listener leaves, stays;
  const std::vector<int32_t> prompt = RandomTokens(150, 1), other = RandomTokens(150, 2);
  Request request = RequestOf(prompt, 0);
  request.sampling.ignore_eos = true;
  const RequestId id = Submit(engine.get(), std::move(request), &leaves).value();
  leaves.WaitForTokens(1);
  ASSERT_TRUE(Submit(engine.get(), RequestOf(other, 150), &stays).ok());
  ASSERT_EQ(converting.get_future().wait_for(kPatience), std::future_status::ready);
  engine->Cancel(id);
  released.set_value();
  EXPECT_EQ(leaves.Wait().finish, FinishReason::kCancelled);
  stays.Wait();
  EXPECT_EQ(stays.tokens(), FakeModel::Continue(other, 150));
  ExpectEmpty(engine.get());
}

TEST(EngineLifecycle, CancelsWhileBlocksWake) {
  auto gate = std::make_shared<Gate>();
  std::atomic<bool> gated = false;
  int steps = 0;
  auto model = std::make_unique<FakeModel>();
  model->on_forward = [&](const Batch&) {
    if (gated) gate->Pass();
    ++steps;
  };
  EngineOptions options;
  options.policy = PolicyNamed("bf16");
  options.kv_memory = Bf16Blocks(20);
  options.store.host_bytes = Bf16Blocks(100);
  const std::unique_ptr<Engine> engine = Start(std::move(model), options);
  const auto run = [&](const std::vector<int32_t>& prompt) {
    Listener listener;
    ASSERT_TRUE(Submit(engine.get(), RequestOf(prompt, 1), &listener).ok());
    EXPECT_EQ(listener.Wait().error.message(), "");
  };
  const std::vector<int32_t> prompt = RandomTokens(600, 1);
  run(prompt);
  for (uint32_t seed = 2; seed < 5; ++seed) run(RandomTokens(900, seed));  // they put it to sleep
  for (int i = 0; i < 2000 && engine->Snapshot().store.host_blocks < 9; ++i) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
  }
  ASSERT_GE(engine->Snapshot().store.host_blocks, 9);

  Listener runs, wakes, again;
  gated = true;
  Request endless = RequestOf({1, 2, 3}, 100);
  endless.sampling.ignore_eos = true;
  ASSERT_TRUE(Submit(engine.get(), std::move(endless), &runs).ok());
  gate->WaitForStep(1);
  const RequestId id = Submit(engine.get(), RequestOf(prompt, 5), &wakes).value();
  // Until it is admitted: its blocks are awake.
  for (int step = 2; engine->Snapshot().running < 2 && step < 90; ++step) {
    std::this_thread::sleep_for(std::chrono::milliseconds(2));  // for the thread that fetches them
    gate->Open(1);
    gate->WaitForStep(step);
  }
  engine->Cancel(id);
  gate->OpenForGood();
  const TokenEvent last = wakes.Wait();
  EXPECT_EQ(last.finish, FinishReason::kCancelled);
  EXPECT_EQ(last.stats.cached_tokens, 576);
  EXPECT_EQ(engine->Snapshot().store.woken, 9);
  EXPECT_EQ(runs.Wait().finish, FinishReason::kLength);
  ASSERT_TRUE(Submit(engine.get(), RequestOf(prompt, 20), &again).ok());
  EXPECT_EQ(again.Wait().stats.cached_tokens, 576) << "what woke is still there";
  EXPECT_EQ(again.tokens(), FakeModel::Continue(prompt, 20));
  ExpectEmpty(engine.get());
}

TEST(EngineLifecycle, LongPrefillDoesNotStopDecoding) {
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

TEST(EngineLifecycle, ARequestThatOutgrowsTheArenaFailsAlone) {
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
  // A tail that grows needs its new place beside the old one: the last 32 tokens' room serves for that.
  EXPECT_GE(grows.tokens().size(), 6u * 64 - 100 - 32);
  modest.Wait();
  EXPECT_EQ(modest.tokens(), FakeModel::Continue(RandomTokens(100, 2), 60));
  ExpectEmpty(engine.get());
}

TEST(EngineLifecycle, AFailedStepFailsItsRequestsOnly) {
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

TEST(EngineLifecycle, AnImageThatFailsIsItsRequestsTrouble) {
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

TEST(EngineLifecycle, LogitsWithoutANumberFailTheRequest) {
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

TEST(EngineLifecycle, AReceiverThatThrowsIsCancelled) {
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

TEST(EngineLifecycle, DrainFinishesWhatItCanAndCancelsTheRest) {
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
    EXPECT_EQ(engine->Snapshot().kv_usage, 0);
  }
  Listener dropped;
  {
    const std::unique_ptr<Engine> engine = Start(std::make_unique<FakeModel>(), options);
    ASSERT_TRUE(Submit(engine.get(), request, &dropped).ok());
    dropped.WaitForTokens(1);
  }
  EXPECT_EQ(dropped.Wait().finish, FinishReason::kCancelled);
}

TEST(EngineLifecycle, SurvivesACrowd) {
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
