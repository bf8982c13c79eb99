#include "serve/metrics.h"

#include <prometheus/counter.h>
#include <prometheus/gauge.h>
#include <prometheus/histogram.h>
#include <prometheus/registry.h>
#include <prometheus/text_serializer.h>

#include <array>
#include <mutex>

#include "kv/tag.h"

namespace triaxial {
namespace {

using prometheus::Histogram;
const Histogram::BucketBoundaries kSeconds = {0.001, 0.005, 0.01, 0.025, 0.05, 0.1,  0.25, 0.5,
                                              1.0,   2.5,   5.0,  10.0,  20.0, 40.0, 80.0, 160.0};
const Histogram::BucketBoundaries kTokenSeconds = {0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025,
                                                   0.05,   0.1,   0.25,   0.5,   1.0,  2.5};

}  // namespace

struct Metrics::Impl {
  prometheus::Registry registry;
  prometheus::Labels model;

  prometheus::Gauge& Gauge(const char* name, const char* help, const prometheus::Labels& labels = {}) {
    return prometheus::BuildGauge().Name(name).Help(help).Labels(model).Register(registry).Add(labels);
  }
  prometheus::Counter& Counter(const char* name, const char* help, const prometheus::Labels& labels = {}) {
    return prometheus::BuildCounter().Name(name).Help(help).Labels(model).Register(registry).Add(labels);
  }
  prometheus::Histogram& Seconds(const char* name, const char* help,
                                 const Histogram::BucketBoundaries& buckets = kSeconds) {
    return prometheus::BuildHistogram().Name(name).Help(help).Labels(model).Register(registry).Add({},
                                                                                                   buckets);
  }
  // Counters that the engine keeps are raised to its value.
  static void Raise(prometheus::Counter* counter, double value) {
    const double step = value - counter->Value();
    if (step > 0) counter->Increment(step);
  }

  explicit Impl(const std::string& name) : model{{"model_name", name}} {}

  std::mutex render;
  prometheus::Gauge& running = Gauge("triaxial_num_requests_running",
                                     "Requests that hold KV blocks and are being decoded or prefilled.");
  prometheus::Gauge& waiting = Gauge("triaxial_num_requests_waiting", "Requests in the queue.");
  prometheus::Gauge& usage = Gauge("triaxial_kv_cache_usage_perc", "Share of the KV arena in use, 0 to 1.");
  prometheus::Counter& prefix_queries =
      Counter("triaxial_prefix_cache_queries_total", "Prompt tokens looked up in the prefix cache.");
  prometheus::Counter& prefix_hits =
      Counter("triaxial_prefix_cache_hits_total", "Prompt tokens found in the prefix cache.");
  prometheus::Counter& evictions =
      Counter("triaxial_kv_evictions_total", "Cached blocks dropped to make room.");
  prometheus::Counter& woken =
      Counter("triaxial_kv_blocks_woken_total", "Sleeping blocks read back into the arena.");
  prometheus::Counter& corrupt = Counter("triaxial_kv_store_corrupt_total",
                                         "Sleeping blocks or files that failed their checksum; ignored.");
  prometheus::Counter& integrity =
      Counter("triaxial_kv_integrity_errors_total", "Violations found by checks of the cache.");
  prometheus::Gauge& cached =
      Gauge("triaxial_kv_cached_tokens", "Tokens in KV blocks that no running request uses.");
  prometheus::Counter& preemptions =
      Counter("triaxial_num_preemptions_total", "Sequences preempted for memory.");
  prometheus::Counter& prompt_tokens = Counter("triaxial_prompt_tokens_total", "Prompt tokens processed.");
  prometheus::Counter& generation_tokens = Counter("triaxial_generation_tokens_total", "Tokens generated.");
  prometheus::Counter& model_seconds =
      Counter("triaxial_engine_model_seconds_total", "Seconds that the engine's thread spent in the model.");
  prometheus::Counter& host_seconds =
      Counter("triaxial_engine_host_seconds_total", "Seconds that it spent in all else while it had work.");
  prometheus::Histogram& ttft =
      Seconds("triaxial_time_to_first_token_seconds", "From arrival to the first token.");
  prometheus::Histogram& itl =
      Seconds("triaxial_inter_token_latency_seconds", "Mean time between a request's tokens.", kTokenSeconds);
  prometheus::Histogram& e2e =
      Seconds("triaxial_e2e_request_latency_seconds", "From arrival to the last token.");
  prometheus::Histogram& queue =
      Seconds("triaxial_request_queue_time_seconds", "From arrival to the first step.");
  prometheus::Gauge& price =
      Gauge("triaxial_kv_price", "Price of a byte of KV cache; 0 under a fixed policy.");
  prometheus::Gauge& bits =
      Gauge("triaxial_kv_effective_bits", "Stored bits per KV element, metadata and tails included.");

  void SetBytesAndTokens(const EngineSnapshot& snapshot);
  void SetTags(const EngineSnapshot& snapshot);
  void RaiseDemotions(const EngineSnapshot& snapshot);
};

void Metrics::Impl::SetBytesAndTokens(const EngineSnapshot& snapshot) {
  for (int f = 0; f < kFormats; ++f) {
    const prometheus::Labels labels = {{"format", std::string(Name(static_cast<Format>(f)))}};
    Gauge("triaxial_kv_bytes", "Bytes of KV blocks in use.", labels)
        .Set(static_cast<double>(snapshot.kv.bytes[static_cast<size_t>(f)]));
    Gauge("triaxial_kv_tokens", "Tokens in KV blocks.", labels)
        .Set(static_cast<double>(snapshot.kv.tokens[static_cast<size_t>(f)]));
  }
  cached.Set(static_cast<double>(snapshot.cached_tokens));
  const auto sleeping = [&](const char* tier, int64_t bytes) {
    Gauge("triaxial_kv_sleeping_bytes", "Bytes of KV blocks that sleep outside the arena.", {{"tier", tier}})
        .Set(static_cast<double>(bytes));
  };
  sleeping("host", snapshot.store.host_bytes);
  sleeping("disk", snapshot.store.disk_bytes);
}

void Metrics::Impl::SetTags(const EngineSnapshot& snapshot) {
  for (int t = 0; t < kTags; ++t) {
    const Tag tag = Tag::FromIndex(t);
    Gauge("triaxial_kv_tokens_by_tag", "Tokens in KV blocks by tag.",
          {{"temporal", std::string(Name(tag.temporal))},
           {"modal", std::string(Name(tag.modal))},
           {"semantic", std::string(Name(tag.semantic))}})
        .Set(static_cast<double>(snapshot.tokens_by_tag[static_cast<size_t>(t)]));
  }
}

void Metrics::Impl::RaiseDemotions(const EngineSnapshot& snapshot) {
  for (size_t from = 0; from < kFormats; ++from) {
    for (size_t to = 0; to < from; ++to) {
      for (size_t cause = 0; cause < kCauses; ++cause) {
        Raise(&Counter("triaxial_kv_demotions_total", "Blocks stored anew with fewer bits.",
                       {{"from", std::string(Name(static_cast<Format>(from)))},
                        {"to", std::string(Name(static_cast<Format>(to)))},
                        {"cause", std::string(Name(static_cast<Cause>(cause)))}}),
              snapshot.demotions[from][to][cause]);
      }
    }
  }
}

Metrics::Metrics(const std::string& model_name) : impl_(std::make_unique<Impl>(model_name)) {
  for (const char* reason : {"stop", "length", "abort", "error"}) {
    impl_->Counter("triaxial_request_success_total", "Requests that ended, by reason.",
                   {{"finished_reason", reason}});
  }
}

Metrics::~Metrics() = default;

void Metrics::ObserveFinished(const RequestStats& stats, FinishReason reason) {
  const char* name = reason == FinishReason::kStop     ? "stop"
                     : reason == FinishReason::kLength ? "length"
                     : reason == FinishReason::kError  ? "error"
                                                       : "abort";
  impl_
      ->Counter("triaxial_request_success_total", "Requests that ended, by reason.",
                {{"finished_reason", name}})
      .Increment();
  impl_->queue.Observe(stats.queue_seconds);
  impl_->e2e.Observe(stats.total_seconds);
  if (stats.completion_tokens > 0) impl_->ttft.Observe(stats.ttft_seconds);
  if (stats.completion_tokens > 1) {
    impl_->itl.Observe((stats.total_seconds - stats.ttft_seconds) / (stats.completion_tokens - 1));
  }
}

void Metrics::CountRefused(Code code) {
  impl_
      ->Counter("triaxial_requests_refused_total", "Requests that were not accepted.",
                {{"reason", code == Code::kResourceExhausted ? "full"
                            : code == Code::kUnavailable     ? "unavailable"
                                                             : "invalid"}})
      .Increment();
}

std::string Metrics::Render(const EngineSnapshot& snapshot) {
  const std::lock_guard lock(impl_->render);
  impl_->running.Set(snapshot.running);
  impl_->waiting.Set(snapshot.waiting);
  impl_->usage.Set(snapshot.kv_usage);
  impl_->bits.Set(snapshot.effective_bits);
  Impl::Raise(&impl_->preemptions, static_cast<double>(snapshot.preemptions));
  Impl::Raise(&impl_->prompt_tokens, static_cast<double>(snapshot.prompt_tokens));
  Impl::Raise(&impl_->generation_tokens, static_cast<double>(snapshot.generation_tokens));
  Impl::Raise(&impl_->prefix_queries, static_cast<double>(snapshot.prefix_queries));
  Impl::Raise(&impl_->prefix_hits, static_cast<double>(snapshot.prefix_hits));
  Impl::Raise(&impl_->evictions, static_cast<double>(snapshot.evictions));
  Impl::Raise(&impl_->woken, static_cast<double>(snapshot.store.woken));
  Impl::Raise(&impl_->corrupt, static_cast<double>(snapshot.store.corrupt));
  Impl::Raise(&impl_->integrity, static_cast<double>(snapshot.integrity_errors));
  Impl::Raise(&impl_->model_seconds, snapshot.model_seconds);
  Impl::Raise(&impl_->host_seconds, snapshot.host_seconds);
  impl_->price.Set(snapshot.price);
  impl_->SetBytesAndTokens(snapshot);
  impl_->SetTags(snapshot);
  impl_->RaiseDemotions(snapshot);
  return prometheus::TextSerializer().Serialize(impl_->registry.Collect());
}

}  // namespace triaxial
