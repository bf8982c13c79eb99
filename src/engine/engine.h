// The engine: one thread that schedules, runs the model and mutates the KV cache; everybody else talks to it
// by messages.
#ifndef TRIAXIAL_ENGINE_ENGINE_H_
#define TRIAXIAL_ENGINE_ENGINE_H_

#include <array>
#include <atomic>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/status.h"
#include "engine/request.h"
#include "io/model_config.h"
#include "kv/block_store.h"
#include "kv/need.h"
#include "kv/policy.h"
#include "model/model.h"
#include "text/token_tagger.h"

namespace triaxial {

struct EngineOptions {
  Policy policy;
  int64_t kv_memory = 0;          // bytes of the arena; 0: a quarter of the machine's memory, at most what
                                  // max_model_len * max_running needs in BF16
  int32_t max_model_len = 0;      // tokens; 0: the model's max_position_embeddings
  int32_t max_running = 64;       // sequences decoded together
  int32_t max_step_tokens = 512;  // rows of a step: decode rows first, the rest is prefill
  double kv_budget_bits = 0;      // of a priced policy: effective bits at rest; 0: the policy's own
  // Where idle blocks sleep. Its fingerprint names checkpoint and calibration; the engine adds codec and
  // layout.
  BlockStoreOptions store;
  bool check_when_idle = false;  // KvCache::CheckIntegrity whenever nothing runs; it costs milliseconds
  int32_t max_queued = 256;      // waiting requests; more are refused with ResourceExhausted, and so is a
                                 // tenant that holds more places than are free (engine/mailbox.h)
  uint64_t seed = 0;             // of requests without one; 0: from the clock
};

// Everything that metrics and pages want to know, copied at the end of a step; `store` when it is asked for.
struct EngineSnapshot {
  int32_t running = 0;
  int32_t waiting = 0;
  KvUsage kv;
  std::array<int64_t, kTags> tokens_by_tag{};
  double effective_bits = 0;
  double kv_usage = 0;  // share of unit rows in use, 0..1
  int64_t preemptions = 0;
  int64_t prefix_queries = 0;  // prompt tokens looked up among cached blocks, and those found
  int64_t prefix_hits = 0;
  int64_t cached_tokens = 0;  // in blocks that no running request uses
  double price = 0;           // distortion per byte, of a priced policy
  // Blocks by [from][to][cause] and blocks dropped from the cache.
  std::array<std::array<std::array<int64_t, kCauses>, kFormats>, kFormats> demotions{};
  int64_t evictions = 0;
  int64_t integrity_errors = 0;
  BlockStoreStats store;  // blocks that sleep in host memory and files
  int64_t prompt_tokens = 0;
  int64_t generation_tokens = 0;
  int64_t steps = 0;
  // Of the engine's thread while it had work: in the model, and in all else (plans, bookkeeping, events).
  double model_seconds = 0;
  double host_seconds = 0;
};

class Engine {
 public:
  // Takes the model and starts the thread. Errors: InvalidArgument, ResourceExhausted (arena).
  static Result<std::unique_ptr<Engine>> Create(std::unique_ptr<Model> model,
                                                const PreprocessorConfig& preprocessor,
                                                const GenerationConfig& generation, const MarkupIds& markup,
                                                const EngineOptions& options);
  virtual ~Engine() = default;  // cancels what runs and joins the thread

  // Thread-safe. Refuses at once: InvalidArgument (empty, too long, bad sampling), TooLarge (the prompt
  // can never fit in the arena), ResourceExhausted (queue full), Unavailable (shutting down).
  virtual Result<RequestId> Submit(Request request) = 0;
  // Thread-safe; the request's memory is free at the next step. Its last event has FinishReason::kCancelled.
  // Unknown ids are ignored.
  virtual void Cancel(RequestId id) = 0;
  virtual EngineSnapshot Snapshot() const = 0;
  // Refuses new requests and waits until the running ones have finished or `seconds` have passed (then
  // cancels them).
  virtual void Drain(double seconds) = 0;

  virtual const ModelConfig& config() const = 0;
  virtual const KvGeometry& geometry() const = 0;
  virtual const Policy& policy() const = 0;
  virtual int32_t max_model_len() const = 0;
  // Per block of a running or recently finished request: position, tokens, need, format, users, history.
  // Thread-safe; empty for unknown ids. Called from on_event, it counts what the step under way computes.
  virtual std::vector<KvBlock> InspectBlocks(RequestId id) = 0;
  // Counts the cache again between two steps. A violation is reported and counted; then nothing cached is
  // found any more, and what runs goes on. Thread-safe.
  virtual Status CheckIntegrity() = 0;
};

}  // namespace triaxial

#endif  // TRIAXIAL_ENGINE_ENGINE_H_
