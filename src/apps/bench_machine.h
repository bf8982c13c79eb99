// What a measurement must be read against: the machine, the source it was built from, and the bandwidth of
// memory, measured in the same run.
#ifndef TRIAXIAL_APPS_BENCH_MACHINE_H_
#define TRIAXIAL_APPS_BENCH_MACHINE_H_

#include <functional>
#include <string>

#include "base/json.h"

namespace triaxial {

// Seconds of the fastest call within a budget of seconds: other work on the machine only ever slows a call
// down.
double BestSeconds(double budget, const std::function<void()>& fn);

// GB/s over all compute threads and more memory than caches hold; a copy counts what it reads and writes.
double CopyBandwidth();
double ReadBandwidth();

// {"command", "cpu", "threads", "load_average" (before the run), "gpu" (where there is one), "date" (UTC),
// "commit" (of the working directory; where that is no repository, the environment's TRIAXIAL_COMMIT)}.
Json DescribeRun();

}  // namespace triaxial

#endif  // TRIAXIAL_APPS_BENCH_MACHINE_H_
