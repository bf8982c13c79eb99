// Which kernels a stretch of GPU work ran and how long each took, as the driver recorded it (CUPTI, of the
// CUDA toolkit).
#ifndef TRIAXIAL_APPS_BENCH_TRACE_H_
#define TRIAXIAL_APPS_BENCH_TRACE_H_

#include <cstdint>
#include <string>
#include <vector>

#include "base/status.h"

namespace triaxial::cuda {

struct TracedKernel {
  std::string name;  // demangled, without arguments; "copy" for a copy
  int64_t begin_ns = 0, end_ns = 0;
  int registers = 0;         // a thread
  int64_t local_bytes = 0;   // a thread: spills and arrays
  int64_t shared_bytes = 0;  // a block
};

// One at a time in a process.
class StepTrace {
 public:
  StepTrace() = default;
  ~StepTrace();
  StepTrace(const StepTrace&) = delete;
  StepTrace& operator=(const StepTrace&) = delete;
  // Unavailable if this machine has no CUPTI, or something else is tracing.
  Status Start();
  // What has run since; call it when the device is idle.
  std::vector<TracedKernel> Stop();

 private:
  bool running_ = false;
};

}  // namespace triaxial::cuda

#endif  // TRIAXIAL_APPS_BENCH_TRACE_H_
