// Every allocation of memory on the engine's thread, from one step of the model to the next, is refused once,
// alone and with some that follow: the requests concerned end with an error, the others rightly, and nothing
// is left behind.
#include <gtest/gtest.h>

#include <atomic>
#include <future>
#include <new>

#include "base/failing_memory_testing.h"
#include "engine/engine_testing.h"

namespace triaxial {
namespace {

struct Outcome {
  int64_t refused = 0;
  int right = 0;
  int failed = 0;
};

// One talks, one is in the middle of its prefill, one waits; during the step one more arrives, the waiting
// one is cancelled, somebody asks for blocks and for a check.
Outcome RunWithRefusals(int armed_step, int64_t first, int64_t count) {
  SCOPED_TRACE(testing::Message() << "step " << armed_step << ", allocation " << first << " and " << count - 1
                                  << " more");
  std::promise<void> arrived;
  std::promise<void> goes_on;
  std::atomic<int64_t> refused = 0;
  int step = 0;
  auto model = std::make_unique<FakeModel>();
  model->on_forward = [&](const Batch&) {
    ++step;
    if (step == armed_step) {
      arrived.set_value();
      goes_on.get_future().wait_for(kPatience);
      RefuseMemory(first, count);
    } else if (step > armed_step) {
      refused = StopRefusing();
    }
  };
  EngineOptions options;
  options.policy = PolicyWithWindow();
  options.max_running = 3;
  options.max_step_tokens = 32;
  options.kv_memory = Bf16Blocks(14);
  options.store.host_bytes = Bf16Blocks(50);
  const std::unique_ptr<Engine> engine = Start(std::move(model), options);
  struct Client {
    std::vector<int32_t> prompt;
    int tokens;
    Listener listener;
  };
  std::vector<Client> clients(5);
  const auto submit = [&](size_t i, size_t prompt, int tokens) {
    clients[i].prompt = RandomTokens(prompt, static_cast<uint32_t>(i));
    clients[i].tokens = tokens;
    return Submit(engine.get(), RequestOf(clients[i].prompt, tokens), &clients[i].listener).value();
  };
  submit(0, 20, 150);
  submit(1, 300, 3);
  submit(2, 40, 90);
  const RequestId waits = submit(3, 50, 5);
  EXPECT_EQ(arrived.get_future().wait_for(kPatience), std::future_status::ready);
  submit(4, 100, 20);
  engine->Cancel(waits);
  std::future<void> asks = std::async(std::launch::async, [&] {
    try {
      engine->InspectBlocks(1);
    } catch (const std::bad_alloc&) {
    }
    const Status status = engine->CheckIntegrity();
    EXPECT_TRUE(status.ok() || status.code() == Code::kResourceExhausted) << status.message();
  });
  goes_on.set_value();

  Outcome outcome;
  for (size_t i = 0; i < clients.size(); ++i) {
    const Client& client = clients[i];
    const TokenEvent last = clients[i].listener.Wait();
    const std::vector<int32_t> right = FakeModel::Continue(client.prompt, static_cast<size_t>(client.tokens));
    if (last.finish == FinishReason::kError) {
      EXPECT_EQ(last.error.code(), Code::kInternal);
      EXPECT_FALSE(last.error.message().empty());
      ++outcome.failed;
    } else if (last.finish != FinishReason::kCancelled) {
      EXPECT_EQ(client.listener.tokens(), right) << i;
      ++outcome.right;
    }
  }
  asks.get();
  // If all of them failed there are refusals left.
  for (int i = 0; i < 30; ++i) {
    Listener after;
    EXPECT_TRUE(Submit(engine.get(), RequestOf({1, 2, 3}, 5), &after).ok());
    if (after.Wait().finish == FinishReason::kError && i < 29) continue;
    EXPECT_EQ(after.tokens(), FakeModel::Continue({1, 2, 3}, 5));
    break;
  }
  ExpectEmpty(engine.get());
  outcome.refused = refused;
  return outcome;
}

TEST(EngineMemory, AStepWithoutMemoryFailsWhomItConcerns) {
  int64_t runs = 0, partial = 0, survived = 0;
  for (const int armed_step : {2, 4, 8, 9, 15, 40, 100}) {
    for (const int64_t count : {1, 20}) {
      Outcome outcome{1, 0, 0};
      for (int64_t first = 1; outcome.refused > 0; ++first, ++runs) {
        outcome = RunWithRefusals(armed_step, first, count);
        ASSERT_FALSE(HasFailure());
        if (outcome.failed > 0 && outcome.right > 0) ++partial;
        if (outcome.refused > 0 && outcome.failed == 0) ++survived;
      }
    }
  }
  std::printf("%ld runs, %ld with failed requests beside right ones, %ld without any\n",
              static_cast<long>(runs), static_cast<long>(partial), static_cast<long>(survived));
  EXPECT_GT(runs, 200);
  EXPECT_GT(partial, runs / 2);
}

}  // namespace
}  // namespace triaxial
