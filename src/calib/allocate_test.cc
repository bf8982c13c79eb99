#include "calib/allocate.h"

#include <gtest/gtest.h>

#include <cmath>
#include <functional>
#include <random>

namespace triaxial {
namespace {

constexpr KvGeometry kGeometry = {1, 1, 128, Codec::kRotated};

struct Workload {
  TagNeeds needs;
  std::array<double, kTags> tokens{};
};

// `tags` tags with random counts, and losses that fall with bits but need not be convex.
Workload RandomWorkload(std::mt19937& random, int tags) {
  std::uniform_real_distribution<double> uniform(0, 1);
  Workload w;
  w.needs.priced = true;
  for (int i = 0; i < tags; ++i) {
    const auto t = static_cast<size_t>(i * 5 % kTags);
    w.tokens[t] = std::floor(std::exp(7 * uniform(random)));
    double loss = std::exp(6 * uniform(random));
    for (int f = 0; f < kFormats; ++f) {
      w.needs.loss[t][static_cast<size_t>(f)] =
          static_cast<Format>(f) == Format::kBf16 ? 0.0f : static_cast<float>(loss);
      loss *= uniform(random);
    }
    if (uniform(random) < 0.1) w.needs.floor[t] = Format::kK4V2;
  }
  return w;
}

Result<Allocation> Exact(const Workload& w, double budget) {
  return AllocateExactly(MakeAllocationProblem(w.needs, w.tokens, kGeometry), budget);
}

// The least loss within the budget, of all combinations.
double Enumerate(const AllocationProblem& problem, double budget) {
  double best = INFINITY;
  const std::function<void(size_t, double, double)> visit = [&](size_t i, double bits, double loss) {
    if (bits > budget * problem.tokens * (1 + 1e-9)) return;
    if (i == problem.items.size()) {
      best = std::min(best, loss);
      return;
    }
    const AllocationProblem::Item& item = problem.items[i];
    for (const Format format : item.formats) {
      const auto f = static_cast<size_t>(format);
      visit(i + 1, bits + item.tokens * problem.bits[f], loss + item.loss[f]);
    }
  };
  visit(0, 0, 0);
  return best;
}

TEST(AllocateTest, ExactEqualsEnumeration) {
  std::mt19937 random(1);
  for (int i = 0; i < 60; ++i) {
    const Workload w = RandomWorkload(random, 1 + i % 8);
    const AllocationProblem problem = MakeAllocationProblem(w.needs, w.tokens, kGeometry);
    for (const double budget : {2.3, 2.8, 3.25, 4.0, 4.25, 6.0, 12.0, 16.0}) {
      const double best = Enumerate(problem, budget);
      const Result<Allocation> exact = AllocateExactly(problem, budget);
      ASSERT_EQ(exact.ok(), std::isfinite(best)) << budget;
      if (!exact.ok()) continue;
      EXPECT_NEAR(exact->loss, best, 1e-9 * best);
      EXPECT_LE(exact->bits, budget * (1 + 1e-8));
      for (const AllocationProblem::Item& item : problem.items) {
        EXPECT_GE(exact->formats[static_cast<size_t>(item.tag)],
                  w.needs.floor[static_cast<size_t>(item.tag)]);
      }
    }
  }
}

TEST(AllocateTest, NothingBeatsExactAtEqualBytes) {
  std::mt19937 random(2);
  const Workload w = RandomWorkload(random, 22);
  const AllocationProblem problem = MakeAllocationProblem(w.needs, w.tokens, kGeometry);
  for (const double budget : {2.6, 2.8, 3.1, 4.5, 7.0}) {
    const Result<Allocation> exact = AllocateExactly(problem, budget);
    ASSERT_TRUE(exact.ok()) << exact.status().message();
    const Result<Allocation> greedy = AllocateGreedily(problem, budget, Format::kK2V2, Format::kK4V4);
    ASSERT_TRUE(greedy.ok()) << greedy.status().message();
    EXPECT_LE(greedy->bits, budget * (1 + 1e-8));
    EXPECT_LE(exact->loss, greedy->loss * (1 + 1e-9));
    const Result<Allocation> price = AllocateByPrice(w.needs, w.tokens, kGeometry, budget);
    ASSERT_TRUE(price.ok());
    EXPECT_LE(price->bits, budget * (1 + 1e-8)) << "a price never overdraws its budget";
    EXPECT_LE(exact->loss, price->loss * (1 + 1e-9));
    // Random allocations: upgrades in random order as long as they fit, so that all use up the budget.
    int compared = 0;
    for (int i = 0; i < 10000; ++i) {
      std::vector<size_t> at(problem.items.size(), 0);
      double bits = 0;
      double loss = 0;
      for (const auto& item : problem.items) {
        bits += item.tokens * problem.bits[static_cast<size_t>(item.formats[0])];
      }
      for (int tries = 0; tries < 200; ++tries) {
        const size_t k = random() % problem.items.size();
        const AllocationProblem::Item& item = problem.items[k];
        if (at[k] + 1 == item.formats.size()) continue;
        const double more = item.tokens * (problem.bits[static_cast<size_t>(item.formats[at[k] + 1])] -
                                           problem.bits[static_cast<size_t>(item.formats[at[k]])]);
        if (bits + more > budget * problem.tokens) continue;
        bits += more;
        ++at[k];
      }
      for (size_t k = 0; k < at.size(); ++k) {
        loss += problem.items[k].loss[static_cast<size_t>(problem.items[k].formats[at[k]])];
      }
      ASSERT_GE(loss, exact->loss * (1 - 1e-9));
      ++compared;
    }
    EXPECT_EQ(compared, 10000);
  }
}

TEST(AllocateTest, PriceIsExactAtTheBudgetsThatItReaches) {
  std::mt19937 random(3);
  const Workload w = RandomWorkload(random, 15);
  for (double budget = 2.6; budget < 16; budget += 0.7) {
    const Result<Allocation> price = AllocateByPrice(w.needs, w.tokens, kGeometry, budget);
    ASSERT_TRUE(price.ok());
    const Result<Allocation> exact = Exact(w, price->bits);
    ASSERT_TRUE(exact.ok());
    EXPECT_NEAR(exact->loss, price->loss, 1e-6 * price->loss) << "vertices of the hull are optimal";
  }
}

TEST(AllocateTest, BudgetsOutOfReachAreSaidToBe) {
  std::mt19937 random(4);
  Workload w = RandomWorkload(random, 10);
  w.needs.floor.fill(Format::kK2V2);
  const auto error = [&](double budget) {
    const Result<Allocation> exact = Exact(w, budget);
    EXPECT_FALSE(exact.ok());
    EXPECT_FALSE(AllocateByPrice(w.needs, w.tokens, kGeometry, budget).ok());
    return exact.ok() ? "" : exact.status().message();
  };
  EXPECT_NE(error(2.0).find("less than the 2.25"), std::string::npos) << error(2.0);
  EXPECT_NE(error(NAN).find("raise it"), std::string::npos);
  EXPECT_NE(error(17).find("more than the 16 of bf16"), std::string::npos) << error(17);
  EXPECT_EQ(Exact(w, 2.25)->bits, 2.25);
  EXPECT_EQ(Exact(w, 16)->loss, 0) << "all in bf16";
  w.needs.floor.fill(Format::kK4V4);
  EXPECT_NE(error(3).find("remove pins"), std::string::npos) << error(3);
  w.tokens.fill(0);
  EXPECT_NE(error(3).find("no tokens"), std::string::npos) << error(3);
}

TEST(AllocateTest, OneTagTakesTheBestFormatThatFits) {
  Workload w;
  w.needs.priced = true;
  w.tokens[7] = 100;
  for (int f = 0; f < kFormats; ++f) {
    w.needs.loss[7][static_cast<size_t>(f)] = static_cast<float>(kFormats - 1 - f);
  }
  EXPECT_EQ(Exact(w, 2.3)->formats[7], Format::kK2V2);
  EXPECT_EQ(Exact(w, 3.25)->formats[7], Format::kK4V2);
  EXPECT_EQ(Exact(w, 4.3)->formats[7], Format::kK4V4);
  EXPECT_EQ(Exact(w, 16)->formats[7], Format::kBf16);
}

}  // namespace
}  // namespace triaxial
