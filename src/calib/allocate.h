// Which format each tag takes under a budget of bytes: TriAxialKV's allocation problem (arXiv 2605.17170),
// with metadata counted and any number of formats,
//   minimize   sum over tags of tokens(tag) * loss(tag, format(tag))
//   subject to sum over tags of tokens(tag) * bits(format(tag)) <= budget * sum over tags of tokens(tag).
// Whole tags take one format; what blocks of mixed tags and tails add is not part of it.
#ifndef TRIAXIAL_CALIB_ALLOCATE_H_
#define TRIAXIAL_CALIB_ALLOCATE_H_

#include <array>
#include <vector>

#include "base/status.h"
#include "kv/need.h"

namespace triaxial {

struct AllocationProblem {
  struct Item {
    int tag = 0;
    double tokens = 0;  // above 0
    // What the tag may take, from fewest to most bits; at least one.
    std::vector<Format> formats;
    std::array<double, kFormats> loss{};  // of all its tokens
  };
  std::vector<Item> items;
  std::array<double, kFormats> bits{};  // effective bits, metadata included
  double tokens = 0;                    // of all items
};
// Tags without tokens are no items.
AllocationProblem MakeAllocationProblem(const TagNeeds& needs, const std::array<double, kTags>& tokens,
                                        const KvGeometry& geometry);

struct Allocation {
  std::array<Format, kTags> formats{};  // k2v2 for tags without tokens
  double loss = 0;
  double bits = 0;  // effective, of all tokens together
};

// Budgets are effective bits per element, metadata included. All fail with InvalidArgument if the problem has
// no item, if even the fewest bits of every tag take more than the budget, or if the budget is more than BF16
// takes.

// The best there is: all partial allocations that no other one beats in both bytes and loss are followed
// (exact sums in double, nothing is discretized), but for those whose linear relaxation cannot beat the best
// solution known. Of equal losses, one of least bits.
Result<Allocation> AllocateExactly(const AllocationProblem& problem, double budget_bits);
// As published: every tag at `low`, then tags go to `high` in the order of loss avoided per byte, as long as
// they fit. Tags that may not take these take the nearest format above that they may.
Result<Allocation> AllocateGreedily(const AllocationProblem& problem, double budget_bits, Format low,
                                    Format high);
// What one price per byte yields: the vertices of the convex hull (kv/need.h), the best of them within the
// budget. This is how the engine decides, without a table.
Result<Allocation> AllocateByPrice(const TagNeeds& needs, const std::array<double, kTags>& tokens,
                                   const KvGeometry& geometry, double budget_bits);

}  // namespace triaxial

#endif  // TRIAXIAL_CALIB_ALLOCATE_H_
