// The engine thread's work: take messages, plan, run a step, sample, tell. Owns model, arena and cache.
#ifndef TRIAXIAL_ENGINE_ENGINE_LOOP_H_
#define TRIAXIAL_ENGINE_ENGINE_LOOP_H_

#include <memory>
#include <mutex>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "engine/engine.h"
#include "engine/executor.h"
#include "engine/mailbox.h"
#include "engine/prepare.h"
#include "engine/sampler.h"
#include "engine/scheduler.h"
#include "kv/arena.h"
#include "kv/cache.h"

namespace triaxial {

class EngineLoop {
 public:
  // `context` and `mailbox` must outlive it.
  EngineLoop(std::unique_ptr<Model> model, std::unique_ptr<KvMemory> memory, const EngineContext& context,
             const EngineOptions& options, Mailbox* mailbox);

  // Until the mailbox is stopped; then all requests have had their last event.
  void Run();

  // Thread-safe; as of the end of the last step.
  EngineSnapshot Snapshot() const;
  // Only on the engine thread.
  std::vector<KvBlock> BlocksOf(RequestId id) const;

 private:
  void TakeMail();
  void RunStep();
  bool EncodeImages();
  void NoteAdmissions();
  void TakeToken(size_t item);
  void FailStep(std::string_view what);
  void FailForMemory(RequestState* request);
  void Finish(RequestState* request, FinishReason reason, Status error);
  void Finish(RequestState* request, TokenEvent&& event);
  void Send(RequestState* request, TokenEvent&& event);
  void RemoveFinished();
  RequestStats StatsOf(const RequestState& request) const;
  void CheckIdleCache() const;
  void PublishSnapshot();

  const EngineContext& context_;
  Mailbox* mailbox_;
  std::unique_ptr<Model> model_;
  std::unique_ptr<KvMemory> memory_;
  KvCache cache_;
  Scheduler scheduler_;
  Executor executor_;
  Sampler sampler_;
  std::unordered_map<RequestId, std::unique_ptr<RequestState>> requests_;
  std::vector<RequestId> finished_;  // to be removed from requests_
  Mail mail_;                        // these three keep their memory between steps
  Plan plan_;
  Step step_;

  int64_t prompt_tokens_ = 0;
  int64_t generation_tokens_ = 0;
  int64_t steps_ = 0;

  mutable std::mutex snapshot_mutex_;
  EngineSnapshot snapshot_;
};

}  // namespace triaxial

#endif  // TRIAXIAL_ENGINE_ENGINE_LOOP_H_
