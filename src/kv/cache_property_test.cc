// Long random runs of the cache; cache_simulation_testing.h says against what.
#include <gtest/gtest.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "kv/cache_simulation_testing.h"

namespace triaxial {
namespace {

TEST(KvCachePropertyTest, RandomOperationsKeepEveryTokenInItsPlace) {
  // TRIAXIAL_OPERATIONS=1000000 for a long run.
  const char* wanted = std::getenv("TRIAXIAL_OPERATIONS");
  std::array<int64_t, 12> met{};
  const int operations = wanted != nullptr ? std::atoi(wanted) : 8000;
  for (const SimulationSetting& setting : {SimulationSetting{1, 2000, operations, false, 0, false},
                                           SimulationSetting{2, 900, operations, false, 100, false},
                                           SimulationSetting{3, 1500, operations, true, 0, false},
                                           SimulationSetting{4, 500, operations, true, 0, true},
                                           SimulationSetting{5, 2500, operations, true, 130, false},
                                           SimulationSetting{6, 300, operations, false, 0, true}}) {
    SCOPED_TRACE("seed " + std::to_string(setting.seed));
    Simulation s(setting);
    s.Run();
    std::printf(
        "%5ld rows%s: %ld operations, %ld tokens, %ld found, %ld gaps, %ld aged, %ld for the budget, %ld "
        "demoted, %ld to sleep, "
        "%ld woken, %ld refused, %ld scattered, %ld moves, %ld aborts\n",
        static_cast<long>(setting.rows), setting.priced ? ", priced" : "", s.operations, s.appended, s.found,
        s.gaps, s.aged, s.within_budget, s.demoted, s.evicted, s.woken, s.refused, s.fragmented, s.moved,
        s.aborted);
    const std::array<int64_t, 12> run = {s.appended,      s.found,      s.gaps,    s.aged,
                                         s.within_budget, s.demoted,    s.evicted, s.woken,
                                         s.refused,       s.fragmented, s.moved,   s.aborted};
    for (size_t i = 0; i < met.size(); ++i) met[i] += run[i];
    if (HasFailure()) return;
  }
  for (const int64_t count : met) EXPECT_GT(count, 20) << "what never happens is not tested";
}

TEST(KvCachePropertyTest, AnArenaWithoutRoomForABlockRefusesForEver) {
  KvCache cache(kSimulationGeometry, 9, TagNeeds::ByIndex());
  KvAppend append;
  const std::vector<KvToken> tokens(64, KvToken{});
  const SequenceId id = cache.CreateSequence({.salt = "", .tokens = tokens});
  for (int i = 0; i < 300; ++i) {
    EXPECT_EQ(cache.Append(id, tokens, &append).code(), Code::kResourceExhausted);
    EXPECT_EQ(cache.Reclaim(64, nullptr, {}), 9);
    cache.FinishStep();
  }
  EXPECT_TRUE(cache.CheckIntegrity().ok());
}

}  // namespace
}  // namespace triaxial
