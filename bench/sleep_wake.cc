// What a conversation that goes to sleep, or wakes, costs those who talk meanwhile: the longest time between
// two tokens of a bystander, and the most that the engine's thread computed between two. The engine is the
// real one; the model has the shapes of Qwen3-VL-2B and only takes time.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cstring>
#include <ctime>
#include <future>
#include <memory>
#include <mutex>
#include <thread>
#include <utility>
#include <vector>

#include "engine/engine.h"

namespace triaxial {
namespace {

using Clock = std::chrono::steady_clock;

struct Options {
  int tokens = 32768;
  double step_ms = 20;
  BlockStoreOptions store = {.host_bytes = int64_t{2} << 30, .disk_bytes = int64_t{8} << 30};
};

double Milliseconds(Clock::duration time) { return std::chrono::duration<double, std::milli>(time).count(); }

class IdleModel final : public Model {
 public:
  explicit IdleModel(double step_ms) : step_(step_ms) {
    config_.text = {.hidden_size = 1, .num_layers = 28, .num_heads = 16, .num_kv_heads = 8, .head_dim = 128};
    config_.text.vocab_size = 8;
    config_.text.max_position_embeddings = 1 << 20;
  }
  const ModelConfig& config() const override { return config_; }
  KvGeometry geometry() const override { return {28, 8, 128, Codec::kPaper}; }
  const KvCalibration& calibration() const override { return calibration_; }
  int64_t parameters() const override { return 0; }
  int64_t decode_weight_bytes() const override { return 0; }
  // Every byte that a step stores is written, so that memory is as it would be.
  void Forward(const Batch& batch, KvMemory* memory, float* logits) override {
    auto* arena = static_cast<KvArena*>(memory);
    const KvGeometry g = geometry();
    for (const KvStore& store : batch.stores) {
      const auto bytes = static_cast<size_t>(UnitsOf(g, store.format, store.capacity) * UnitRowBytes(g));
      for (int layer = 0; layer < g.num_layers; ++layer) {
        std::memset(arena->LayerData(layer) + store.unit_row * UnitRowBytes(g), store.row_begin + 1, bytes);
      }
    }
    std::fill_n(logits, batch.logits_rows.size() * 8, 0.0f);
    for (size_t row = 0; row < batch.logits_rows.size(); ++row) logits[8 * row + 1] = 1;
    std::this_thread::sleep_for(step_);
  }
  VisualFeatures Encode(const ImagePatches&, const PreprocessorConfig&) override { return {}; }

 private:
  std::chrono::duration<double, std::milli> step_;
  ModelConfig config_;
  KvCalibration calibration_;
};

Request RequestOf(int tokens, int32_t kind, int max_tokens) {
  Request request;
  request.prompt.tokens.resize(static_cast<size_t>(tokens));
  for (size_t t = 0; t < request.prompt.tokens.size(); ++t) {
    request.prompt.tokens[t] = t % 7 == 0 ? kind : static_cast<int32_t>(t % 5);
  }
  request.prompt.spans = {{0, tokens, 0, 0, Modal::kText, Semantic::kUser}};
  request.sampling.max_tokens = max_tokens;
  request.sampling.ignore_eos = true;
  return request;
}

double ThreadMilliseconds() {
  timespec time;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return 1e3 * static_cast<double>(time.tv_sec) + 1e-6 * static_cast<double>(time.tv_nsec);
}

// Times between a bystander's tokens, on the clock and of the engine's thread.
struct Gap {
  double wall;
  double computed;
};
class Gaps {
 public:
  void Add() {  // on the engine's thread
    const std::lock_guard lock(mutex_);
    const Clock::time_point now = Clock::now();
    const double computed = ThreadMilliseconds();
    if (last_ != Clock::time_point()) gaps_.push_back({Milliseconds(now - last_), computed - last_computed_});
    last_ = now;
    last_computed_ = computed;
  }
  std::vector<Gap> Take() {
    const std::lock_guard lock(mutex_);
    return std::exchange(gaps_, {});
  }

 private:
  std::mutex mutex_;
  Clock::time_point last_;
  double last_computed_ = 0;
  std::vector<Gap> gaps_;
};

int Run(const Options& options) {
  EngineOptions engine_options;
  engine_options.policy = LoadPolicy("int2").value();
  engine_options.store = options.store;
  auto model = std::make_unique<IdleModel>(options.step_ms);
  // One conversation and a quarter of another.
  const int64_t blocks = options.tokens / kBlockTokens * 5 / 4 + 16;
  engine_options.kv_memory = blocks * BlockBytes(model->geometry(), Format::kK2V2);
  Result<std::unique_ptr<Engine>> created =
      Engine::Create(std::move(model), {}, GenerationConfig{}, MarkupIds{}, engine_options);
  if (!created.ok()) return fmt::print(stderr, "{}\n", created.status().message()), 1;
  const std::unique_ptr<Engine> engine = *std::move(created);

  Gaps gaps;
  Request bystander = RequestOf(100, 5, 1 << 19);
  bystander.on_event = [&](TokenEvent&& event) {
    if (event.token >= 0) gaps.Add();
  };
  if (!engine->Submit(std::move(bystander)).ok()) return 1;
  fmt::print("{} tokens, {:.0f} ms a step, {} MiB on host, {}\n", options.tokens, options.step_ms,
             options.store.host_bytes >> 20,
             options.store.disk_dir.empty() ? "no disk" : "disk in " + options.store.disk_dir);
  fmt::print("{:36} {:>8} {:>8} {:>9} {:>9} {:>9} {:>9}\n", "milliseconds", "cached", "TTFT", "median",
             "longest", "computed", "longest");
  const auto ask = [&](const char* what, int32_t kind) {
    std::promise<RequestStats> done;
    Request request = RequestOf(options.tokens, kind, 1);
    request.on_event = [&](TokenEvent&& event) {
      if (event.finish != FinishReason::kNone) done.set_value(event.stats);
    };
    gaps.Take();
    if (!engine->Submit(std::move(request)).ok()) return;
    const RequestStats stats = done.get_future().get();
    std::vector<double> wall = {0}, computed = {0};
    for (const Gap& gap : gaps.Take()) {
      wall.push_back(gap.wall);
      computed.push_back(gap.computed);
    }
    std::sort(wall.begin(), wall.end());
    std::sort(computed.begin(), computed.end());
    fmt::print("{:36} {:8} {:8.0f} {:9.1f} {:9.1f} {:9.1f} {:9.1f}\n", what, stats.cached_tokens,
               1000 * stats.ttft_seconds, wall[wall.size() / 2], wall.back(), computed[computed.size() / 2],
               computed.back());
  };
  ask("a stranger is read (new memory)", 4);
  ask("the first is read, others sleep", 6);
  ask("the second is read, the first sleeps", 7);
  ask("the first wakes, the second sleeps", 6);
  ask("the second wakes, the first sleeps", 7);
  const BlockStoreStats store = engine->Snapshot().store;
  fmt::print("{} blocks went to sleep, {} woke, {} were dropped\n", store.stored, store.woken, store.dropped);
  return 0;
}

}  // namespace
}  // namespace triaxial

int main(int argc, char** argv) {
  triaxial::Options options;
  CLI::App app("The longest pause of a bystander while conversations sleep and wake.");
  app.add_option("--tokens", options.tokens, "Tokens of each conversation.")
      ->check(CLI::Range(1024, 1 << 19))
      ->capture_default_str();
  app.add_option("--step-ms", options.step_ms, "Time that a step of the model takes.")->capture_default_str();
  app.add_option("--host-bytes", options.store.host_bytes, "Of the host area.")->capture_default_str();
  app.add_option("--disk-dir", options.store.disk_dir, "Folder of blocks on disk.");
  CLI11_PARSE(app, argc, argv);
  return triaxial::Run(options);
}
