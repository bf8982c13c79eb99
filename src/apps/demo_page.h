// The demo's HTML page: the results, and what one request looks like inside the KV cache.
#ifndef TRIAXIAL_APPS_DEMO_PAGE_H_
#define TRIAXIAL_APPS_DEMO_PAGE_H_

#include <array>
#include <string>
#include <vector>

#include "apps/demo_player.h"
#include "apps/demo_trajectory.h"
#include "kv/cache.h"
#include "kv/policy.h"
#include "serve/served_model.h"

namespace triaxial {

// One policy's run of the demo.
struct DemoRun {
  Policy policy;
  TagNeeds needs;  // what the engine made of the policy
  PlayResult result;
};

// Ratios of a run, whole tail blocks included.
double EffectiveBits(const PlayResult& result, const KvGeometry& geometry);
// Bytes that BF16 would need for exactly the stored tokens, over the bytes that were taken.
double CapacityRatio(const PlayResult& result, const KvGeometry& geometry);

Json RunJson(const DemoRun& run, const KvGeometry& geometry);

// How the cache stores tokens: formats of the blocks in order of position, and what they take.
struct KvMap {
  std::vector<Format> blocks;
  KvUsage usage;
};
KvMap MapTokens(const std::vector<Tag>& tags, const TagNeeds& needs, const KvGeometry& geometry);

// A self-contained page: the runs as a table, and the last request of `trajectory` token by token under each
// policy.
Result<std::string> DemoPage(const ServedModel& model, const KvGeometry& geometry,
                             const std::vector<DemoRun>& runs, const Trajectory& trajectory);

}  // namespace triaxial

#endif  // TRIAXIAL_APPS_DEMO_PAGE_H_
