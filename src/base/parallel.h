// One pool of compute threads for the whole process: OpenMP's, which oneDNN uses too, so that they never
// compete.
#ifndef TRIAXIAL_BASE_PARALLEL_H_
#define TRIAXIAL_BASE_PARALLEL_H_

#include <omp.h>

#include <cstdint>

namespace triaxial {

// Threads that a parallel loop may use; SetComputeThreads(0) restores the default (all cores of the process).
int ComputeThreads();
void SetComputeThreads(int threads);

// Calls fn(i) for i in [0, n), spread over the compute threads in chunks handed out dynamically. Only the
// engine thread (or a main without an engine) may call it. fn must not throw.
template <typename Fn>
void ParallelFor(int64_t n, const Fn& fn) {
  if (n <= 1) {
    if (n == 1) fn(int64_t{0});
    return;
  }
#pragma omp parallel for schedule(dynamic)
  for (int64_t i = 0; i < n; ++i) fn(i);
}

}  // namespace triaxial

#endif  // TRIAXIAL_BASE_PARALLEL_H_
