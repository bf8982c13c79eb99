// Every allocation of memory inside the cache's operations is refused once, alone and with all that follow:
// the operation fails and has changed nothing, or it does without. Then it is tried again until none is
// refused, so that the operation itself is checked, too.
#include <gtest/gtest.h>

#include <limits>
#include <map>
#include <new>
#include <set>
#include <string>

#include "base/failing_memory_testing.h"
#include "kv/cache_simulation_testing.h"

namespace triaxial {
namespace {

constexpr int64_t kAll = std::numeric_limits<int64_t>::max();

const std::set<std::string> kDoAPart = {"AgeBlocks", "KeepBudget", "KeepBudget", "Reclaim"};

struct Refusals {
  int64_t failed = 0;    // operations that said so
  int64_t survived = 0;  // and those that did without
};

// Runs `operation` with its first allocation refused, then its second, and so on until it does not throw.
template <typename Operation, typename Unchanged>
void Exhaust(const Operation& operation, const Unchanged& unchanged, Refusals* refusals) {
  for (int64_t n = 1;; ++n) {
    for (const int64_t count : {kAll, int64_t{1}}) {
      RefuseMemory(n, count);
      try {
        operation();
        refusals->survived += StopRefusing();
        return;
      } catch (const std::bad_alloc&) {
        EXPECT_GT(StopRefusing(), 0);
        ++refusals->failed;
      }
      unchanged();
      if (testing::Test::HasFailure()) return;
    }
  }
}

std::map<std::string, Refusals> RunWithRefusals(const SimulationSetting& setting) {
  std::map<std::string, Refusals> refusals;
  Simulation simulation(setting);
  simulation.run = [&](const char* name, const std::function<void()>& operation) {
    SCOPED_TRACE(name);
    const auto before = simulation.Figures();
    const bool may_do_a_part = kDoAPart.contains(name);
    const auto unchanged = [&] {
      simulation.Integrity();
      EXPECT_TRUE(may_do_a_part || simulation.Figures() == before);
    };
    Exhaust(operation, unchanged, &refusals[name]);
  };
  simulation.Run();
  return refusals;
}

TEST(KvCacheMemoryTest, RandomOperationsSurviveTheRefusalOfEveryAllocation) {
  std::map<std::string, Refusals> all;
  for (const SimulationSetting& setting :
       {SimulationSetting{21, 2000, 6000, false, 0, false},
        SimulationSetting{22, 900, 6000, true, 100, false}, SimulationSetting{23, 500, 6000, true, 0, true},
        SimulationSetting{24, 2500, 6000, true, 130, false}}) {
    SCOPED_TRACE("seed " + std::to_string(setting.seed));
    for (const auto& [name, refusals] : RunWithRefusals(setting)) {
      all[name].failed += refusals.failed;
      all[name].survived += refusals.survived;
    }
    if (HasFailure()) return;
  }
  for (const auto& [name, refusals] : all) {
    std::printf("%12s: failed %ld times, did without %ld times\n", name.c_str(),
                static_cast<long>(refusals.failed), static_cast<long>(refusals.survived));
  }
  for (const char* name :
       {"Append", "CreateSequence", "BeginWaking", "Wake", "Reclaim", "AgeBlocks", "Compact"}) {
    EXPECT_GT(all[name].failed, 20) << name;
  }
  for (const char* name : {"FreeSequence", "FinishStep", "AbortStep", "EndWaking", "DropCached"}) {
    EXPECT_EQ(all[name].failed, 0) << name << " needs no memory";
  }
  EXPECT_GT(all["FinishStep"].survived, 0) << "sequences that go on alone";
}

}  // namespace
}  // namespace triaxial
