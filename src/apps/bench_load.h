// Load on a server: streams that ask for the sessions of a workload, and what was seen of the answers in a
// window of time. Everything runs on the caller's thread, inside the calls.
#ifndef TRIAXIAL_APPS_BENCH_LOAD_H_
#define TRIAXIAL_APPS_BENCH_LOAD_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "apps/bench_client.h"
#include "apps/bench_workload.h"
#include "base/status.h"

namespace triaxial {

// Of a sample: all zero where it is empty.
struct BenchSpread {
  double mean = 0, p50 = 0, p90 = 0, p99 = 0, max = 0;
};
BenchSpread SpreadOf(std::vector<double> values);

// The server's gauges at one moment (GET /metrics); -1 where it has none of that name.
struct BenchGauges {
  double seconds = 0;  // since the window began
  double running = -1, waiting = -1;
  double kv_usage = -1;                  // share of the arena, 0..1
  double kv_bytes = -1, kv_tokens = -1;  // in use by requests
  double cached_tokens = -1;             // kept for later requests
  double effective_bits = -1;
  double generated = -1;  // counters since the server started
  double prefix_queries = -1, prefix_hits = -1;
  double preemptions = -1, demotions = -1;
  double model_seconds = -1, host_seconds = -1;
};

struct BenchWindow {
  double seconds = 0;
  int64_t requests = 0;       // that ended in the window
  int64_t refused = 0;        // 429 or 503; asked again after a second
  double output_tokens = 0;   // received in the window, of unfinished answers too
  int64_t prompt_tokens = 0;  // of the requests that ended
  int64_t cached_tokens = 0;  // of those
  double request_bits = 0;    // effective bits of the ended requests' blocks, weighted by tokens
  std::vector<double> ttft;   // seconds to the first token, of those whose first came in the window
  std::vector<double> tpot;   // seconds a token after the first, of the requests that ended
  std::vector<BenchGauges> gauges;
  double client_busy = 0;  // share of the time that this client computed
};

class BenchLoad {
 public:
  // The workload must outlive it. Its sessions are taken from `first_session` on.
  BenchLoad(const BenchEndpoint& endpoint, std::string model, BenchWorkload* workload, int64_t first_session);
  ~BenchLoad();  // hangs up
  BenchLoad(const BenchLoad&) = delete;
  BenchLoad& operator=(const BenchLoad&) = delete;

  // As many streams from now on; a number below the present one is ignored. Streams that run go on.
  void Grow(int streams);
  int64_t next_session() const;
  // No more sessions than these are begun, counted from now; a stream without one ends.
  void LimitSessions(int64_t sessions);
  // Runs until each stream has had a first token, or `seconds` have passed.
  Status WarmUp(double seconds);
  // Runs until `seconds` have passed, or all streams have ended. `progress` is called now and then.
  Result<BenchWindow> Measure(double seconds, const std::function<void(const BenchWindow&)>& progress);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// Sends GET `target` once and yields the body. Unavailable, or Internal if the answer is not 200.
Result<std::string> BenchGet(const BenchEndpoint& endpoint, const std::string& target);
// The first model of GET /v1/models.
Result<std::string> BenchModelName(const BenchEndpoint& endpoint);

// Reads the Prometheus text format; names with the prefix triaxial_ (or vllm:).
BenchGauges ReadGauges(std::string_view metrics);

}  // namespace triaxial

#endif  // TRIAXIAL_APPS_BENCH_LOAD_H_
