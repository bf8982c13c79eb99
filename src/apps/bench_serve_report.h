// Results of `triaxial bench serve` as JSON and as a table.
#ifndef TRIAXIAL_APPS_BENCH_SERVE_REPORT_H_
#define TRIAXIAL_APPS_BENCH_SERVE_REPORT_H_

#include <string>

#include "apps/bench_load.h"
#include "base/json.h"

namespace triaxial {

// One measurement: a policy with so much KV memory under so many clients of a workload.
struct BenchPoint {
  std::string policy, kv_memory, workload;
  int concurrency = 0;
};

// See docs/performance.md for the fields.
Json BenchRunJson(const BenchPoint& point, const BenchWindow& window);

// Tables of a report's runs, one for each workload and KV memory; ratios are to the first policy.
void PrintServeReport(const Json& runs);

}  // namespace triaxial

#endif  // TRIAXIAL_APPS_BENCH_SERVE_REPORT_H_
