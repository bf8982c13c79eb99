// Every allocation of unit rows fails once, whether rows are free or not. The linker puts the failing
// allocator between the cache and the arena's, so that neither knows of it.
#include <gtest/gtest.h>

#include <optional>

#include "kv/cache_simulation_testing.h"

namespace triaxial {
namespace {

int64_t allocations = 0;
int64_t fails_at = 0;  // counted from 1; 0: none
int64_t faults = 0;

}  // namespace
}  // namespace triaxial

// The mangled names of UnitAllocator::Allocate; --wrap in CMakeLists.txt binds the cache's calls to the
// first.
using AllocatedRow = std::optional<uint32_t>;
extern "C" AllocatedRow __real__ZN8triaxial13UnitAllocator8AllocateEib(triaxial::UnitAllocator* allocator,
                                                                       int rows, bool from_top);
extern "C" AllocatedRow __wrap__ZN8triaxial13UnitAllocator8AllocateEib(triaxial::UnitAllocator* allocator,
                                                                       int rows, bool from_top) {
  using namespace triaxial;
  if (++allocations == fails_at) {
    ++faults;
    return std::nullopt;
  }
  return __real__ZN8triaxial13UnitAllocator8AllocateEib(allocator, rows, from_top);
}

namespace triaxial {
namespace {

// Runs the same operations with the k-th allocation failing; false once there are fewer than k.
bool RunWithFault(const SimulationSetting& setting, int64_t k) {
  SCOPED_TRACE(testing::Message() << "seed " << setting.seed << ", allocation " << k);
  allocations = faults = 0;
  fails_at = k;
  Simulation simulation(setting);
  simulation.faults_so_far = [] { return faults; };
  simulation.Run();
  EXPECT_EQ(faults, allocations >= k ? 1 : 0);
  return faults > 0;
}

TEST(KvCacheFaultsTest, EveryAllocationMayFailOnce) {
  for (const SimulationSetting& setting :
       {SimulationSetting{11, 20000, 150, false, 0, false},
        SimulationSetting{12, 900, 250, false, 100, false}, SimulationSetting{13, 600, 300, true, 0, true},
        SimulationSetting{14, 1500, 250, true, 130, false}}) {
    int64_t k = 1;
    while (RunWithFault(setting, k) && !HasFailure()) ++k;
    if (HasFailure()) return;
    EXPECT_GT(k, 50) << "few allocations prove little";
  }
}

}  // namespace
}  // namespace triaxial
