// The engine thread's work: take messages, plan, run a step, sample, tell. Owns model, arena and cache. What
// need not be done between steps is done while the model runs, where it runs beside the host: the events of
// the step before are sent, and the next step is planned (and planned anew if what was expected did not
// happen).
#ifndef TRIAXIAL_ENGINE_ENGINE_LOOP_H_
#define TRIAXIAL_ENGINE_ENGINE_LOOP_H_

#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "engine/engine.h"
#include "engine/executor.h"
#include "engine/kv_backing.h"
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
  // `store` may be null.
  EngineLoop(std::unique_ptr<Model> model, std::unique_ptr<KvMemory> memory,
             std::unique_ptr<StoreThread> store, const EngineContext& context, const EngineOptions& options,
             Mailbox* mailbox);

  // Until the mailbox is stopped; then all requests have had their last event.
  void Run();

  // Thread-safe; as of the end of the last step, but for the blocks that sleep: as of now.
  EngineSnapshot Snapshot() const;
  // Only on the engine thread.
  std::vector<KvBlock> BlocksOf(RequestId id) const;
  Status CheckIntegrity();

 private:
  void TakeMail();
  void Accept(std::unique_ptr<RequestState> request);
  void RunStep();
  void WhileModelRuns();
  bool EncodeImages();
  void NoteAdmissions();
  void FailLate();
  void SaveSessions();
  void TakeToken(size_t item);
  void FailStep(std::string_view what);
  void Fail(Sequence* sequence, std::string_view what);
  void FailForMemory(RequestState* request);
  void Finish(RequestState* request, FinishReason reason, Status error);
  void Finish(RequestState* request, TokenEvent&& event);
  void SendEvents();
  bool Send(RequestState* request, TokenEvent&& event);
  void CancelDeaf();
  RequestStats StatsOf(const RequestState& request) const;
  void PublishSnapshot();

  const EngineContext& context_;
  Mailbox* mailbox_;
  std::unique_ptr<Model> model_;
  std::unique_ptr<KvMemory> memory_;
  std::unique_ptr<StoreThread> store_;
  MemoryBacking backing_;
  KvCache cache_;
  Scheduler scheduler_;
  Executor executor_;
  Sampler sampler_;
  std::unordered_map<RequestId, std::unique_ptr<RequestState>> requests_;
  // To be sent. There is room for two of each request, a token and an end, and for the end of one more that
  // cannot be accepted, so that nothing has to be allocated for them.
  std::vector<std::pair<RequestState*, TokenEvent>> events_;
  bool any_finished_ = false;  // some of requests_ are to be removed once their events are sent
  bool any_deaf_ = false;
  // Blocks of requests that finished lately, for those who ask.
  std::deque<std::pair<RequestId, std::vector<BlockHandle>>> recent_;
  Mail mail_;  // these four keep their memory between steps
  Plan plan_;
  Plan next_plan_;
  bool next_plan_ready_ = false;  // and still holds
  Step step_;

  const bool check_when_idle_;
  bool may_be_late_ = false;  // some request has a deadline
  int64_t prompt_tokens_ = 0;
  int64_t prefix_queries_ = 0;
  int64_t prefix_hits_ = 0;
  int64_t integrity_errors_ = 0;
  int64_t generation_tokens_ = 0;
  int64_t steps_ = 0;
  double busy_seconds_ = 0, model_seconds_ = 0;

  mutable std::mutex snapshot_mutex_;
  EngineSnapshot snapshot_;
};

}  // namespace triaxial

#endif  // TRIAXIAL_ENGINE_ENGINE_LOOP_H_
