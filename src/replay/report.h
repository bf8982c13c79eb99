// Results of a replay as JSON.
#ifndef TRIAXIAL_REPLAY_REPORT_H_
#define TRIAXIAL_REPLAY_REPORT_H_

#include <string>
#include <vector>

#include "base/json.h"
#include "replay/simulation.h"

namespace triaxial {

struct PolicyRun {
  Policy policy;
  SimulationResult result;
  double wall_seconds = 0;  // that the simulation took
};

// {"policies": [{"name", "effective_bits", "capacity_tokens", "rounding_loss", "hit_rate", "demotions",
// "preemptions", "throughput", "ttft_p50", "ttft_p99", "predicted_loss", ...}]}; docs/replay.md explains
// every key. throughput is in generated tokens per second, times are in seconds; predicted_loss is null
// without a priced policy.
Json ReportJson(const std::vector<PolicyRun>& runs);
// The curves of a run: {"interval", "running": [...], ...}, a value per interval, rates per second; fields of
// formats by name.
Json SeriesJson(const TimeSeries& series);

}  // namespace triaxial

#endif  // TRIAXIAL_REPLAY_REPORT_H_
