#include "engine/engine_loop.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <exception>
#include <utility>

#include "base/check.h"
#include "base/log.h"

namespace triaxial {
namespace {

double Seconds(Clock::time_point from, Clock::time_point to) {
  return std::chrono::duration<double>(to - from).count();
}

}  // namespace

EngineLoop::EngineLoop(std::unique_ptr<Model> model, std::unique_ptr<KvMemory> memory,
                       const EngineContext& context, const EngineOptions& options, Mailbox* mailbox)
    : context_(context),
      mailbox_(mailbox),
      model_(std::move(model)),
      memory_(std::move(memory)),
      cache_(context.geometry, memory_->total_rows()),
      scheduler_({options.max_running, options.max_step_tokens, context.policy.recent_window}, &cache_,
                 [this](uint32_t from, uint32_t to, int rows) { memory_->Move(from, to, rows); }),
      executor_(model_.get(), memory_.get(), context.preprocessor) {}

void EngineLoop::Run() {
  while (true) {
    if (mailbox_->has_mail()) TakeMail();
    if (scheduler_.idle()) {
      CheckIdleCache();
      PublishSnapshot();
      if (!mailbox_->Wait()) return;
      continue;
    }
    RunStep();
    RemoveFinished();
    PublishSnapshot();
  }
}

void EngineLoop::TakeMail() {
  mailbox_->Take(&mail_);
  for (std::unique_ptr<RequestState>& request : mail_.submitted) {
    scheduler_.Enqueue(request.get());
    const RequestId id = request->id;
    requests_.emplace(id, std::move(request));
  }
  const auto cancel = [this](RequestState* request) {
    if (!request->finished) Finish(request, FinishReason::kCancelled, OkStatus());
  };
  for (const RequestId id : mail_.cancelled) {
    if (const auto it = requests_.find(id); it != requests_.end()) cancel(it->second.get());
  }
  if (mail_.cancel_all) {
    for (auto& [id, request] : requests_) cancel(request.get());
  }
  RemoveFinished();
  for (Inspection& inspection : mail_.inspections) inspection.blocks.set_value(BlocksOf(inspection.id));
  mail_.submitted.clear();
  mail_.cancelled.clear();
  mail_.inspections.clear();
  mail_.cancel_all = false;
}

void EngineLoop::RunStep() {
  try {
    scheduler_.MakePlan(&plan_);
    if (!EncodeImages()) return;
    scheduler_.Commit(plan_, &step_);
    NoteAdmissions();
    if (!step_.items.empty()) executor_.Run(step_);
    cache_.FinishStep();
    ++steps_;
    for (size_t i = 0; i < step_.items.size(); ++i) TakeToken(i);
  } catch (const std::exception& e) {
    FailStep(e.what());
  } catch (...) {
    FailStep("unknown exception");
  }
  if (plan_.fail != nullptr) FailForMemory(static_cast<RequestState*>(plan_.fail));
}

// What the vision tower throws is the trouble of that picture's request alone; false: plan anew without it.
bool EngineLoop::EncodeImages() {
  for (const Plan::Rows& rows : plan_.rows) {
    auto* request = static_cast<RequestState*>(rows.sequence);
    if (request->computed >= request->prompt_tokens) continue;
    try {
      executor_.EncodeImages(request, rows.count);
    } catch (const std::exception& e) {
      Finish(request, FinishReason::kError,
             Internal(fmt::format("an image of the request could not be encoded: {}", e.what())));
      return false;
    }
  }
  return true;
}

void EngineLoop::NoteAdmissions() {
  for (const Step::Item& item : step_.items) {
    auto* request = static_cast<RequestState*>(item.sequence);
    if (std::exchange(request->started, true)) continue;
    request->admitted = Clock::now();
    mailbox_->LeaveQueue();
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
  request->kv_tokens.push_back({static_cast<uint8_t>(index), context_.wishes[index]});
  request->history.Add(sampled.token);

  event.id = request->id;
  event.token = sampled.token;
  event.logprob = sampled.logprob;
  if (std::binary_search(request->stop_ids.begin(), request->stop_ids.end(), sampled.token)) {
    event.finish = FinishReason::kStop;
  } else if (static_cast<int32_t>(request->tokens.size()) >= request->max_length) {
    event.finish = FinishReason::kLength;
  }
  if (event.finish == FinishReason::kNone) {
    Send(request, std::move(event));
  } else {
    Finish(request, std::move(event));
  }
}

// Whatever the kernels left behind belongs to the step's sequences: they fail, the others go on.
void EngineLoop::FailStep(std::string_view what) {
  spdlog::error("a step failed: {}", what);
  cache_.FinishStep();
  for (const Plan::Rows& rows : plan_.rows) {
    auto* request = static_cast<RequestState*>(rows.sequence);
    if (request->finished) continue;
    Finish(request, FinishReason::kError, Internal(fmt::format("the step of this request failed: {}", what)));
  }
}

void EngineLoop::FailForMemory(RequestState* request) {
  Finish(
      request, FinishReason::kError,
      ResourceExhausted(fmt::format(
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

// Frees the request's memory, then sends its last event.
void EngineLoop::Finish(RequestState* request, TokenEvent&& event) {
  event.id = request->id;
  event.stats = StatsOf(*request);
  scheduler_.Remove(request);
  if (!request->started) mailbox_->LeaveQueue();
  request->finished = true;
  finished_.push_back(request->id);
  Send(request, std::move(event));
}

void EngineLoop::Send(RequestState* request, TokenEvent&& event) {
  if (!request->request.on_event) return;
  try {
    request->request.on_event(std::move(event));
  } catch (const std::exception& e) {
    spdlog::error("the receiver of request {} failed and is cancelled: {}", request->id, e.what());
    mailbox_->Cancel(request->id);
  }
}

void EngineLoop::RemoveFinished() {
  for (const RequestId id : finished_) requests_.erase(id);
  finished_.clear();
}

RequestStats EngineLoop::StatsOf(const RequestState& request) const {
  const Clock::time_point now = Clock::now();
  RequestStats stats;
  stats.prompt_tokens = request.prompt_tokens;
  stats.completion_tokens = request.output_tokens();
  if (request.cache_id != 0) stats.kv = cache_.Usage(request.cache_id);
  stats.effective_bits = stats.kv.effective_bits(context_.geometry);
  stats.queue_seconds = Seconds(request.submitted, request.started ? request.admitted : now);
  stats.ttft_seconds = request.output_tokens() > 0 ? Seconds(request.submitted, request.first_token) : 0;
  stats.total_seconds = Seconds(request.submitted, now);
  return stats;
}

std::vector<KvBlock> EngineLoop::BlocksOf(RequestId id) const {
  std::vector<KvBlock> blocks;
  const auto it = requests_.find(id);
  if (it == requests_.end() || it->second->cache_id == 0) return blocks;
  for (const KvBlock* block : cache_.Blocks(it->second->cache_id)) blocks.push_back(*block);
  return blocks;
}

void EngineLoop::CheckIdleCache() const {
  const Status integrity = cache_.CheckIntegrity();
  if (!integrity.ok()) spdlog::critical("the KV cache lost track of its blocks: {}", integrity.message());
  CHECK(integrity.ok() && cache_.free_rows() == cache_.total_rows());
}

void EngineLoop::PublishSnapshot() {
  const std::lock_guard lock(snapshot_mutex_);
  snapshot_.running = scheduler_.running();
  snapshot_.waiting = scheduler_.waiting();
  snapshot_.kv = cache_.Usage();
  snapshot_.tokens_by_tag = cache_.TokensByTag();
  snapshot_.effective_bits = snapshot_.kv.effective_bits(context_.geometry);
  snapshot_.kv_usage =
      1.0 - static_cast<double>(cache_.free_rows()) / static_cast<double>(cache_.total_rows());
  snapshot_.preemptions = scheduler_.preemptions();
  snapshot_.prompt_tokens = prompt_tokens_;
  snapshot_.generation_tokens = generation_tokens_;
  snapshot_.steps = steps_;
}

EngineSnapshot EngineLoop::Snapshot() const {
  const std::lock_guard lock(snapshot_mutex_);
  return snapshot_;
}

}  // namespace triaxial
