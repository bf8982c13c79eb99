// The engine's own Scheduler and KvCache, driven by a recording on a simulated clock: what is admitted,
// stored, found again, demoted and preempted is what the server would do; only the time of a step is
// calculated (replay/step_time.h), and answers are those of the recording.
#ifndef TRIAXIAL_REPLAY_SIMULATION_H_
#define TRIAXIAL_REPLAY_SIMULATION_H_

#include <array>
#include <cstdint>
#include <functional>
#include <optional>
#include <vector>

#include "base/status.h"
#include "kv/need.h"
#include "kv/policy.h"
#include "replay/arrivals.h"
#include "replay/device.h"
#include "replay/step_time.h"
#include "replay/time_series.h"

namespace triaxial {

// Loss of one token of a tag stored at a format, as a priced policy has it.
using DistortionTable = std::array<std::array<float, kFormats>, kTags>;

struct SimulationOptions {
  Policy policy;
  double budget_bits = 0;  // of a priced policy; 0: its own
  KvGeometry geometry;
  int64_t kv_bytes = 0;  // of the arena
  int32_t max_running = 256;
  int32_t max_step_tokens = 2048;
  int32_t max_model_len = 0;  // longer requests are refused
  // Requests that the scheduler holds waiting, as --max-num-seqs of a server bounds its queue; the others
  // wait at the door in order of arrival, and their waiting counts.
  int32_t max_queued = 256;
  ModelCost cost;
  DeviceSpec device;
  std::optional<DistortionTable> distortion;  // by which the loss is predicted
};

struct SimulationResult {
  int64_t requests = 0;  // all: finished + refused + failed
  int64_t finished = 0;
  int64_t refused = 0;  // longer than the model or than the KV memory takes
  int64_t failed = 0;   // outgrew the KV memory
  double seconds = 0;   // simulated, to the last answer
  int64_t steps = 0;
  int64_t prompt_tokens = 0;  // of finished requests, likewise generated_tokens
  int64_t generated_tokens = 0;

  // Means over the time in which the cache held anything.
  double effective_bits = 0;  // metadata and tails included
  double block_bits = 0;      // of complete blocks alone
  double rounding_loss = 0;   // share of the bytes of complete blocks that no token needs
  // Share of the KV memory that the formats of what is stored ask for, tails included, in the steps that had
  // to drop blocks or preempt: the rest is lost to rounding, to free rows between blocks and to the room that
  // the scheduler keeps. nullopt: there was none.
  std::optional<double> filled;
  double tail_share = 0;  // of all bytes in use, that are BF16 tails
  std::array<double, kFormats> share_of_tokens{};
  int64_t capacity_tokens = 0;  // that would fill the KV memory at this mix
  double mean_running = 0;
  int32_t peak_running = 0;
  double peak_usage = 0;    // share of the KV memory in use, at its highest
  int64_t peak_tokens = 0;  // in the cache

  double hit_rate = 0;           // share of looked-up prompt tokens that were found, when first admitted
  int64_t prefilled_tokens = 0;  // prompt tokens that were computed, again after a preemption too
  int64_t demotions = 0;         // of blocks, for age, pressure or budget
  std::array<int64_t, kCauses> demotions_by_cause{};
  int64_t evictions = 0;
  int64_t preemptions = 0;
  int64_t compactions = 0;
  std::vector<float> ttft;  // seconds, of every finished request, sorted; from its arrival at the door
  std::vector<float> tpot;  // seconds per token after the first, of answers of two and more, sorted
  // Mean over finished requests of the distortion per token at the formats that their blocks had in the end.
  std::optional<double> predicted_loss;

  TimeSeries series{512};
};

// Smallest value that at least a share `q` of the sorted values do not pass; 0 of none.
double Percentile(const std::vector<float>& sorted, double q);

// `progress` is called now and then with the number of requests done. Errors: InvalidArgument,
// ResourceExhausted (the KV memory is less than a block).
Result<SimulationResult> Simulate(const Recording& recording, const ArrivalOptions& arrivals,
                                  const SimulationOptions& options,
                                  const std::function<void(int64_t done)>& progress);

}  // namespace triaxial

#endif  // TRIAXIAL_REPLAY_SIMULATION_H_
