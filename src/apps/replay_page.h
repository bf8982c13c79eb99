// The page that `triaxial replay --html` writes: self-contained, light and dark.
#ifndef TRIAXIAL_APPS_REPLAY_PAGE_H_
#define TRIAXIAL_APPS_REPLAY_PAGE_H_

#include <string>
#include <vector>

#include "replay/report.h"

namespace triaxial {

// `about` says what was replayed: {"model", "device", "source", "codec", "kv_memory", "weights", "workload",
// "requests", ...}.
std::string ReplayPage(const Json& about, const std::vector<PolicyRun>& runs);

}  // namespace triaxial

#endif  // TRIAXIAL_APPS_REPLAY_PAGE_H_
