#include "engine/engine_loop.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <exception>
#include <new>
#include <utility>

#include "base/check.h"
#include "base/log.h"
#include "base/reserve.h"

namespace triaxial {
namespace {

double Seconds(Clock::time_point from, Clock::time_point to) {
  return std::chrono::duration<double>(to - from).count();
}

// What ends a request is said even where memory for a sentence is missing: so few letters fit into the string
// itself.
template <typename... Args>
std::string Sentence(fmt::format_string<Args...> text, Args&&... args) {
  try {
    return fmt::format(text, std::forward<Args>(args)...);
  } catch (const std::bad_alloc&) {
    return "out of memory";
  }
}

}  // namespace

EngineLoop::EngineLoop(std::unique_ptr<Model> model, std::unique_ptr<KvMemory> memory,
                       std::unique_ptr<StoreThread> store, const EngineContext& context,
                       const EngineOptions& options, Mailbox* mailbox)
    : context_(context),
      mailbox_(mailbox),
      model_(std::move(model)),
      memory_(std::move(memory)),
      store_(std::move(store)),
      backing_(memory_.get(), store_.get()),
      cache_(context.geometry, memory_->total_rows(), context.needs),
      scheduler_({options.max_running, options.max_step_tokens}, &cache_, &backing_),
      executor_(model_.get(), memory_.get(), context.preprocessor),
      check_when_idle_(options.check_when_idle) {
  events_.reserve(2);
}

void EngineLoop::Run() {
  Clock::time_point since = Clock::now();
  while (true) {
    if (mailbox_->has_mail()) TakeMail();
    if (scheduler_.idle()) {
      if (check_when_idle_) {
        CHECK(CheckIntegrity().code() != Code::kInternal);
        CHECK(cache_.free_rows() + cache_.cached_rows() == cache_.total_rows());
      }
      SendEvents();
      if (!mailbox_->Wait()) return SaveSessions();
      since = Clock::now();
      continue;
    }
    if (may_be_late_) FailLate();
    if (any_deaf_) CancelDeaf();
    RunStep();
    const Clock::time_point now = Clock::now();
    busy_seconds_ += Seconds(std::exchange(since, now), now);
  }
}

void EngineLoop::TakeMail() {
  next_plan_ready_ = false;
  mailbox_->Take(&mail_);
  for (std::unique_ptr<RequestState>& request : mail_.submitted) Accept(std::move(request));
  const auto cancel = [this](RequestState* request) {
    if (!request->finished) Finish(request, FinishReason::kCancelled, OkStatus());
  };
  for (const RequestId id : mail_.cancelled) {
    if (const auto it = requests_.find(id); it != requests_.end()) cancel(it->second.get());
  }
  if (mail_.cancel_all) {
    for (auto& [id, request] : requests_) cancel(request.get());
  }
  for (Inspection& inspection : mail_.inspections) {
    try {
      inspection.blocks.set_value(BlocksOf(inspection.id));
    } catch (const std::bad_alloc&) {
      inspection.blocks.set_exception(std::current_exception());
    }
  }
  for (std::promise<Status>& check : mail_.checks) check.set_value(CheckIntegrity());
  mail_.checks.clear();
  mail_.submitted.clear();
  mail_.cancelled.clear();
  mail_.inspections.clear();
  mail_.cancel_all = false;
}

void EngineLoop::Accept(std::unique_ptr<RequestState> request) {
  RequestState* accepted = request.get();
  may_be_late_ = may_be_late_ || request->deadline != Clock::time_point::max();
  try {
    ReserveAtLeast(&events_, 2 * (requests_.size() + 2));
    std::unique_ptr<RequestState>& place = requests_[request->id];
    place = std::move(request);
    scheduler_.Enqueue(accepted);
  } catch (const std::bad_alloc&) {
    Finish(accepted, FinishReason::kError,
           Internal(Sentence("the server has no memory left to queue the request; send it again")));
    SendEvents();
  }
}

void EngineLoop::RunStep() {
  try {
    if (std::exchange(next_plan_ready_, false)) {
      std::swap(plan_, next_plan_);
    } else {
      scheduler_.MakePlan(&plan_);
    }
    if (!EncodeImages()) return;
    scheduler_.Commit(plan_, &step_);
    NoteAdmissions();
    if (step_.empty()) {
      SendEvents();
    } else {
      if (!model_->samples()) WhileModelRuns();  // which then computes on this thread
      const Clock::time_point begin = Clock::now();
      executor_.Run(step_, [this] { WhileModelRuns(); });
      model_seconds_ += Seconds(begin, Clock::now());
    }
    if (scheduler_.waits_for_blocks()) backing_.WaitForFetched();
  } catch (const std::exception& e) {
    return FailStep(e.what());
  } catch (...) {
    return FailStep("unknown exception");
  }
  if (scheduler_.FinishStep()) next_plan_ready_ = false;
  ++steps_;
  for (size_t i = 0; i < step_.items.size(); ++i) {
    try {
      TakeToken(i);
    } catch (const std::exception& e) {
      Fail(step_.items[i].sequence, e.what());
    }
  }
  auto* fails = static_cast<RequestState*>(plan_.fail);
  if (fails != nullptr && !fails->finished) FailForMemory(fails);
}

// Nothing here may touch what the step reads: no blocks are freed, and nobody is removed from the scheduler.
void EngineLoop::WhileModelRuns() {
  SendEvents();
  try {
    scheduler_.MakePlan(&next_plan_);
    next_plan_ready_ = next_plan_.stands_after_step();
  } catch (const std::bad_alloc&) {  // it will be made when the step is over, or fail there
  }
}

// What the vision tower throws is the trouble of that picture's request alone; false: plan anew without it.
bool EngineLoop::EncodeImages() {
  for (const Plan::Rows& rows : plan_.rows) {
    auto* request = static_cast<RequestState*>(rows.sequence);
    if (rows.begin >= request->prompt_tokens) continue;
    try {
      const Clock::time_point begin = Clock::now();
      executor_.EncodeImages(request, rows.begin, rows.count);
      model_seconds_ += Seconds(begin, Clock::now());
    } catch (const std::exception& e) {
      Finish(request, FinishReason::kError,
             Internal(Sentence("an image of the request could not be encoded: {}", e.what())));
      return false;
    }
  }
  return true;
}

void EngineLoop::NoteAdmissions() {
  for (const Plan::Rows& rows : plan_.rows) {
    auto* request = static_cast<RequestState*>(rows.sequence);
    if (request->cache_id == 0 || std::exchange(request->started, true)) continue;
    request->admitted = Clock::now();
    request->first_step = cache_.step();
    prefix_queries_ += request->prompt_tokens;
    prefix_hits_ += request->cached_tokens;
    mailbox_->LeaveQueue(request->tenant);
  }
}

// Those whose time is up, wherever they are.
void EngineLoop::FailLate() {
  const Clock::time_point now = Clock::now();
  may_be_late_ = false;
  for (auto& [id, request] : requests_) {
    if (request->finished || request->deadline == Clock::time_point::max()) continue;
    if (request->deadline > now) {
      may_be_late_ = true;
      continue;
    }
    Finish(request.get(), FinishReason::kError,
           DeadlineExceeded(Sentence("the request took longer than the {} s that it allows: {} of {} prompt "
                                     "tokens and {} output tokens were done; allow more, or send it again",
                                     request->request.timeout_seconds,
                                     std::min(request->computed, request->prompt_tokens),
                                     request->prompt_tokens, request->output_tokens())));
  }
}

// Samples the next token of a sequence if the step reached its last one.
void EngineLoop::TakeToken(size_t item) {
  const std::span<const float> logits = executor_.Logits(item);
  if (logits.empty()) return;
  auto* request = static_cast<RequestState*>(step_.items[item].sequence);
  const SamplingParams& sampling = request->request.sampling;
  TokenEvent event;
  SampledToken sampled;
  if (const std::optional<int32_t> token = executor_.Sampled(item)) {
    sampled.token = *token;
  } else {
    sampled = sampler_.Sample(sampling, request->history, request->seed,
                              static_cast<uint64_t>(request->output_tokens()), logits, &event.top);
  }
  if (sampled.token < 0) {
    return Finish(request, FinishReason::kError,
                  Internal("the model produced no finite logits; its weights may be damaged"));
  }
  if (request->output_tokens() == 0) {
    request->first_token = Clock::now();
    prompt_tokens_ += request->prompt_tokens;
  }
  ++generation_tokens_;
  const Tag tag{Temporal::kCurrent, Modal::kText, request->tagger.Next(sampled.token)};
  const auto index = static_cast<size_t>(tag.index());
  request->tokens.push_back(sampled.token);
  request->kv_tokens.push_back({ContentId::OfToken(sampled.token), static_cast<uint8_t>(index)});
  request->history.Add(sampled.token);

  event.id = request->id;
  event.token = sampled.token;
  event.logprob = sampled.logprob;
  if (std::binary_search(request->stop_ids.begin(), request->stop_ids.end(), sampled.token)) {
    event.finish = FinishReason::kStop;
  } else if (static_cast<int32_t>(request->tokens.size()) >= request->max_length) {
    event.finish = FinishReason::kLength;
  }
  if (event.finish != FinishReason::kNone) return Finish(request, std::move(event));
  events_.emplace_back(request, std::move(event));
}

// Whatever a step left behind belongs to the sequences that it had got to: they fail, the others go on. Where
// there are none, it failed on its way to the last that it had planned, or before it had planned anything.
void EngineLoop::FailStep(std::string_view what) {
  spdlog::error("a step failed: {}", what);
  const std::span<Sequence* const> lost = scheduler_.AbortStep();
  for (Sequence* sequence : lost) Fail(sequence, what);
  if (!lost.empty()) return;
  Sequence* last = plan_.rows.empty() ? scheduler_.last_running() : plan_.rows.back().sequence;
  if (last != nullptr) Fail(last, what);
}

void EngineLoop::Fail(Sequence* sequence, std::string_view what) {
  auto* request = static_cast<RequestState*>(sequence);
  if (request->finished) return;
  Finish(request, FinishReason::kError, Internal(Sentence("the step of this request failed: {}", what)));
}

void EngineLoop::FailForMemory(RequestState* request) {
  Finish(
      request, FinishReason::kError,
      ResourceExhausted(Sentence(
          "after {} prompt and {} output tokens the KV cache of {} bytes has no room for the request, even "
          "alone; raise --kv-memory, ask for fewer tokens or choose a policy with fewer bits",
          request->prompt_tokens, request->output_tokens(), memory_->bytes())));
}

void EngineLoop::Finish(RequestState* request, FinishReason reason, Status error) {
  TokenEvent event;
  event.finish = reason;
  event.error = std::move(error);
  Finish(request, std::move(event));
}

// Frees the request's memory; its last event goes to those to be sent.
void EngineLoop::Finish(RequestState* request, TokenEvent&& event) {
  next_plan_ready_ = false;
  event.id = request->id;
  event.stats = StatsOf(*request);
  if (request->cache_id != 0) {
    constexpr size_t kRemembered = 256;
    if (recent_.size() == kRemembered) recent_.pop_front();
    try {
      recent_.emplace_back(request->id, cache_.Handles(request->cache_id));
    } catch (const std::bad_alloc&) {  // then its blocks cannot be asked for
    }
  }
  scheduler_.Remove(request);
  if (!request->started) mailbox_->LeaveQueue(request->tenant);
  request->finished = any_finished_ = true;
  events_.emplace_back(request, std::move(event));
}

// Who hears of an end finds it counted.
void EngineLoop::SendEvents() {
  PublishSnapshot();
  for (auto& [request, event] : events_) {
    if (event.finish == FinishReason::kNone) {
      if (!request->deaf && !Send(request, std::move(event))) request->deaf = any_deaf_ = true;
      continue;
    }
    TokenEvent again;  // if it cannot be delivered: somebody waits for an end
    again.id = request->id;
    again.finish = FinishReason::kError;
    again.stats = event.stats;
    if (Send(request, std::move(event))) continue;
    again.error = Internal(Sentence("the end of the answer could not be delivered"));
    Send(request, std::move(again));
  }
  events_.clear();
  if (!std::exchange(any_finished_, false)) return;
  std::erase_if(requests_, [](const auto& entry) { return entry.second->finished; });
}

void EngineLoop::CancelDeaf() {
  any_deaf_ = false;
  for (auto& [id, request] : requests_) {
    if (request->deaf && !request->finished) Finish(request.get(), FinishReason::kCancelled, OkStatus());
  }
}

// False if the receiver failed.
bool EngineLoop::Send(RequestState* request, TokenEvent&& event) {
  if (!request->request.on_event) return true;
  try {
    request->request.on_event(std::move(event));
    return true;
  } catch (const std::exception& e) {
    spdlog::error("the receiver of request {} failed: {}", request->id, e.what());
    return false;
  }
}

RequestStats EngineLoop::StatsOf(const RequestState& request) const {
  const Clock::time_point now = Clock::now();
  RequestStats stats;
  stats.prompt_tokens = request.prompt_tokens;
  stats.completion_tokens = request.output_tokens();
  stats.cached_tokens = request.cached_tokens;
  if (request.cache_id != 0) {
    stats.kv = cache_.Usage(request.cache_id);
    cache_.ForEachBlock(request.cache_id, [&](const KvBlock& block) {
      stats.demotions += static_cast<int32_t>(
          std::count_if(block.history.begin(), block.history.end(),
                        [&](const KvChange& change) { return change.step >= request.first_step; }));
    });
  }
  stats.effective_bits = stats.kv.effective_bits(context_.geometry);
  stats.queue_seconds = Seconds(request.submitted, request.started ? request.admitted : now);
  stats.ttft_seconds = request.output_tokens() > 0 ? Seconds(request.submitted, request.first_token) : 0;
  stats.total_seconds = Seconds(request.submitted, now);
  return stats;
}

std::vector<KvBlock> EngineLoop::BlocksOf(RequestId id) const {
  std::vector<KvBlock> blocks;
  const auto running = requests_.find(id);
  if (running != requests_.end() && running->second->cache_id != 0) {
    cache_.ForEachBlock(running->second->cache_id, [&](const KvBlock& block) { blocks.push_back(block); });
    return blocks;
  }
  const auto finished =
      std::find_if(recent_.begin(), recent_.end(), [id](const auto& r) { return r.first == id; });
  if (finished == recent_.end()) return blocks;
  for (const BlockHandle& handle : finished->second) {
    if (const KvBlock* block = cache_.Block(handle)) blocks.push_back(*block);
  }
  return blocks;
}

Status EngineLoop::CheckIntegrity() {
  Status integrity;
  try {
    integrity = cache_.CheckIntegrity();
  } catch (const std::bad_alloc&) {
    return ResourceExhausted(Sentence("the machine has no memory left for counting the cache; try again"));
  }
  if (integrity.ok()) return integrity;
  ++integrity_errors_;
  spdlog::critical("the KV cache lost track of its blocks, and forgets what nobody uses: {}",
                   integrity.message());
  cache_.DropCached();
  return integrity;
}

// What nobody uses goes to sleep, for a server to come.
void EngineLoop::SaveSessions() {
  if (store_ == nullptr) return;
  Status saved;
  try {
    cache_.SleepAll([this](const KvBlock& block, const BlockKey& key, const BlockKey& parent) {
      store_->Drain();  // so that none is dropped
      backing_.Sleep(block, key, parent);
    });
    saved = store_->Save();
  } catch (const std::bad_alloc&) {
    saved = Internal("out of memory");
  }
  const BlockStoreStats stats = store_->Stats();
  if (!saved.ok()) spdlog::warn("sessions could not all be saved: {}", saved.message());
  spdlog::info("{} blocks sleep on disk, {} bytes", stats.disk_blocks, stats.disk_bytes);
}

void EngineLoop::PublishSnapshot() {
  const std::lock_guard lock(snapshot_mutex_);
  snapshot_.running = scheduler_.running();
  snapshot_.waiting = scheduler_.waiting();
  snapshot_.kv = cache_.Usage();
  snapshot_.tokens_by_tag = cache_.TokensByTag();
  snapshot_.effective_bits = snapshot_.kv.effective_bits(context_.geometry);
  snapshot_.kv_usage = 1.0 - static_cast<double>(cache_.free_rows() + cache_.cached_rows()) /
                                 static_cast<double>(cache_.total_rows());
  snapshot_.prefix_queries = prefix_queries_;
  snapshot_.prefix_hits = prefix_hits_;
  snapshot_.cached_tokens = cache_.cached_tokens();
  snapshot_.price = cache_.price();
  snapshot_.demotions = cache_.demotions();
  snapshot_.evictions = cache_.evictions();
  snapshot_.integrity_errors = integrity_errors_;
  snapshot_.preemptions = scheduler_.preemptions();
  snapshot_.prompt_tokens = prompt_tokens_;
  snapshot_.generation_tokens = generation_tokens_;
  snapshot_.steps = steps_;
  snapshot_.model_seconds = model_seconds_;
  snapshot_.host_seconds = busy_seconds_ - model_seconds_;
}

EngineSnapshot EngineLoop::Snapshot() const {
  std::unique_lock lock(snapshot_mutex_);
  EngineSnapshot snapshot = snapshot_;
  lock.unlock();
  if (store_ != nullptr) snapshot.store = store_->Stats();
  return snapshot;
}

}  // namespace triaxial
