// What tests of the engine share: clients that listen, gates that hold the engine, requests with mixed tags.
#ifndef TRIAXIAL_ENGINE_ENGINE_TESTING_H_
#define TRIAXIAL_ENGINE_ENGINE_TESTING_H_

#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <utility>
#include <vector>

#include "engine/engine.h"
#include "engine/fake_model.h"
#include "kv/policy.h"

namespace triaxial {

inline constexpr std::chrono::seconds kPatience(20);

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

inline Policy PolicyNamed(const char* name) { return LoadPolicy(name).value(); }

// The paper's policy with a window of BF16, so that blocks are converted while the sequence grows.
inline Policy PolicyWithWindow() {
  Policy policy = PolicyNamed("paper");
  policy.recent_window = 100;
  return policy;
}

inline std::unique_ptr<Engine> Start(std::unique_ptr<FakeModel> model, EngineOptions options) {
  if (options.policy.name.empty()) options.policy = PolicyNamed("paper");
  options.check_when_idle = true;
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
inline Request RequestOf(std::vector<int32_t> tokens, int max_tokens, uint32_t seed = 1) {
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

inline std::vector<int32_t> RandomTokens(size_t count, uint32_t seed) {
  std::mt19937 random(seed);
  std::vector<int32_t> tokens(count);
  for (int32_t& token : tokens) token = static_cast<int32_t>(random() % 99);
  return tokens;
}

inline Result<RequestId> Submit(Engine* engine, Request request, Listener* listener) {
  request.on_event = listener->Callback();
  return engine->Submit(std::move(request));
}

inline void ExpectEmpty(Engine* engine) {
  engine->Drain(20);
  const EngineSnapshot snapshot = engine->Snapshot();
  EXPECT_EQ(snapshot.running, 0);
  EXPECT_EQ(snapshot.waiting, 0);
  EXPECT_EQ(snapshot.kv_usage, 0);
  EXPECT_EQ(snapshot.kv.total_tokens(), snapshot.cached_tokens) << "what is left is cached";
  EXPECT_EQ(snapshot.integrity_errors, 0);
  EXPECT_TRUE(engine->CheckIntegrity().ok());
}

inline int64_t Bf16Blocks(int64_t count) { return count * BlockBytes(FakeModel().geometry(), Format::kBf16); }

}  // namespace triaxial

#endif  // TRIAXIAL_ENGINE_ENGINE_TESTING_H_
