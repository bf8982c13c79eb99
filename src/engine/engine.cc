#include "engine/engine.h"

#include <fmt/format.h>

#include <algorithm>
#include <future>
#include <limits>
#include <thread>
#include <utility>

#include "base/checked_math.h"
#include "base/parallel.h"
#include "engine/engine_loop.h"
#include "engine/mailbox.h"
#include "engine/prepare.h"

namespace triaxial {
namespace {

class EngineImpl : public Engine {
 public:
  EngineImpl(std::unique_ptr<Model> model, std::unique_ptr<KvMemory> memory,
             std::unique_ptr<StoreThread> store, EngineContext context, const EngineOptions& options)
      : context_(std::move(context)),
        seed_(options.seed != 0 ? options.seed
                                : static_cast<uint64_t>(Clock::now().time_since_epoch().count())),
        mailbox_(options.max_queued),
        loop_(std::move(model), std::move(memory), std::move(store), context_, options, &mailbox_),
        // The number of compute threads belongs to the thread that set it; now another one computes.
        thread_([this, threads = ComputeThreads()] {
          SetComputeThreads(threads);
          loop_.Run();
        }) {}

  ~EngineImpl() override {
    mailbox_.Stop();
    thread_.join();
  }

  Result<RequestId> Submit(Request request) override {
    const Clock::time_point now = Clock::now();
    ASSIGN_OR_RETURN(std::unique_ptr<RequestState> state, PrepareRequest(std::move(request), context_));
    state->submitted = now;
    if (state->request.timeout_seconds > 0) {
      state->deadline = now + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(
                                  std::min(state->request.timeout_seconds, 1e6)));
    }
    const SamplingParams& sampling = state->request.sampling;
    state->seed = sampling.has_seed ? sampling.seed : seed_ + next_seed_++;
    return mailbox_.Submit(std::move(state));
  }

  void Cancel(RequestId id) override { mailbox_.Cancel(id); }

  void Drain(double seconds) override {
    mailbox_.Close();
    if (mailbox_.WaitUntilIdle(seconds)) return;
    mailbox_.CancelAll();
    mailbox_.WaitUntilIdle(std::numeric_limits<int32_t>::max());
  }

  Status CheckIntegrity() override {
    if (std::this_thread::get_id() == thread_.get_id()) return loop_.CheckIntegrity();
    return mailbox_.Check().get();
  }

  std::vector<KvBlock> InspectBlocks(RequestId id) override {
    if (std::this_thread::get_id() == thread_.get_id()) return loop_.BlocksOf(id);  // from an event
    return mailbox_.Inspect(id).get();
  }

  EngineSnapshot Snapshot() const override { return loop_.Snapshot(); }
  const ModelConfig& config() const override { return context_.config; }
  const KvGeometry& geometry() const override { return context_.geometry; }
  const Policy& policy() const override { return context_.policy; }
  int32_t max_model_len() const override { return context_.max_model_len; }

 private:
  const EngineContext context_;
  const uint64_t seed_;
  std::atomic<uint64_t> next_seed_ = 0;
  Mailbox mailbox_;
  EngineLoop loop_;
  std::thread thread_;
};

// What the model's machine has to spare, but no more than all sequences at full length need in BF16.
int64_t DefaultKvMemory(const Model& model, int32_t max_model_len, int32_t max_running) {
  const KvGeometry geometry = model.geometry();
  const int64_t blocks = CeilDiv(max_model_len, kBlockTokens) + 2;  // a tail, and one of growth
  return std::min(model.FreeMemory(), BlockBytes(geometry, Format::kBf16) * blocks * max_running);
}

Status CheckOptions(const EngineOptions& options, const TextConfig& config) {
  if (options.max_model_len < 0 || options.max_model_len > config.max_position_embeddings) {
    return InvalidArgument(fmt::format(
        "a sequence length of {} is asked for; the model's is {}, so choose 1 to {}, or 0 for that",
        options.max_model_len, config.max_position_embeddings, config.max_position_embeddings));
  }
  if (options.max_running < 1) {
    return InvalidArgument(
        fmt::format("{} sequences may run together; it must be 1 or more", options.max_running));
  }
  if (options.max_step_tokens < options.max_running) {
    return InvalidArgument(
        fmt::format("a step of {} tokens has no room for {} running sequences; allow at least one token each",
                    options.max_step_tokens, options.max_running));
  }
  if (options.max_queued < 1) {
    return InvalidArgument(fmt::format("{} requests may wait; it must be 1 or more", options.max_queued));
  }
  if (options.kv_memory < 0) {
    return InvalidArgument(
        fmt::format("the KV cache may take {} bytes; it must be 0 (chosen from the machine's "
                    "memory) or more",
                    options.kv_memory));
  }
  return OkStatus();
}

}  // namespace

Result<std::unique_ptr<Engine>> Engine::Create(std::unique_ptr<Model> model,
                                               const PreprocessorConfig& preprocessor,
                                               const GenerationConfig& generation, const MarkupIds& markup,
                                               const EngineOptions& options) {
  RETURN_IF_ERROR(CheckOptions(options, model->config().text));
  EngineContext context;
  context.config = model->config();
  context.geometry = model->geometry();
  context.preprocessor = preprocessor;
  context.generation = generation;
  context.markup = markup;
  context.policy = options.policy;
  context.max_model_len =
      options.max_model_len > 0 ? options.max_model_len : context.config.text.max_position_embeddings;
  const int64_t bytes = options.kv_memory > 0
                            ? options.kv_memory
                            : DefaultKvMemory(*model, context.max_model_len, options.max_running);
  ASSIGN_OR_RETURN(std::unique_ptr<KvMemory> memory, model->AllocateKv(bytes));
  context.total_rows = memory->total_rows();
  context.needs = NeedsOf(options.policy, context.geometry, model->calibration(), model->dummy_weights(),
                          options.kv_budget_bits);
  std::unique_ptr<StoreThread> store;
  if (options.store.host_bytes > 0 || !options.store.disk_dir.empty()) {
    BlockStoreOptions store_options = options.store;
    store_options.fingerprint += fmt::format(
        ";layout={};codec={};layers={};heads={};dim={}", memory->layout(), Name(context.geometry.codec),
        context.geometry.num_layers, context.geometry.num_kv_heads, context.geometry.head_dim);
    ASSIGN_OR_RETURN(std::unique_ptr<BlockStore> opened, BlockStore::Open(store_options));
    store = std::make_unique<StoreThread>(std::move(opened), BlockBytes(context.geometry, Format::kK4V4));
  }
  return std::unique_ptr<Engine>(
      new EngineImpl(std::move(model), std::move(memory), std::move(store), std::move(context), options));
}

}  // namespace triaxial
