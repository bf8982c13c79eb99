#include "calib/allocate.h"

#include <fmt/format.h>

#include <algorithm>
#include <limits>

#include "base/check.h"

namespace triaxial {
namespace {

using Item = AllocationProblem::Item;

constexpr double kInfinite = std::numeric_limits<double>::infinity();
// Sums of counts times bits round; a budget that is met but for that is met.
constexpr double kSlack = 1e-9;

size_t Index(Format format) { return static_cast<size_t>(format); }

double BitsOf(const AllocationProblem& problem, const Item& item, Format format) {
  return item.tokens * problem.bits[Index(format)];
}

// The most bits that all tokens together may take.
Result<double> Capacity(const AllocationProblem& problem, double budget_bits) {
  if (problem.items.empty()) {
    return InvalidArgument(
        "there are no tokens to allocate formats to; calibrate on conversations that have some");
  }
  double least = 0;
  for (const Item& item : problem.items) least += BitsOf(problem, item, item.formats.front());
  const double most = problem.bits[Index(Format::kBf16)];
  const double capacity = budget_bits * problem.tokens * (1 + kSlack);
  if (!(capacity >= least)) {
    return InvalidArgument(
        fmt::format("a budget of {:.4g} effective bits is less than the {:.4g} that all tokens take in the "
                    "smallest formats allowed; "
                    "raise it to {:.4g} or more{}",
                    budget_bits, least / problem.tokens, least / problem.tokens,
                    least / problem.tokens > problem.bits[0] * (1 + kSlack) ? ", or remove pins" : ""));
  }
  if (budget_bits > most * (1 + kSlack)) {
    return InvalidArgument(
        fmt::format("a budget of {:.4g} effective bits is more than the {:.4g} of bf16, so there is nothing "
                    "to decide; use the policy "
                    "bf16, or a smaller budget",
                    budget_bits, most));
  }
  return capacity;
}

Allocation Sum(const AllocationProblem& problem, const std::vector<Format>& formats) {
  Allocation allocation;
  for (size_t i = 0; i < formats.size(); ++i) {
    const Item& item = problem.items[i];
    allocation.formats[static_cast<size_t>(item.tag)] = formats[i];
    allocation.loss += item.loss[Index(formats[i])];
    allocation.bits += BitsOf(problem, item, formats[i]) / problem.tokens;
  }
  return allocation;
}

// A step up the convex hull of one item's loss over bits.
struct Step {
  size_t item;
  Format to;
  double bits;   // that it costs
  double saved;  // loss
  double slope() const { return saved / bits; }
};

// The hull's steps from the item's smallest format on; slopes fall.
void AddSteps(const AllocationProblem& problem, size_t i, std::vector<Step>* steps) {
  const Item& item = problem.items[i];
  for (Format at = item.formats.front(); at != item.formats.back();) {
    Step best{i, at, 1, -1};
    for (const Format to : item.formats) {
      if (to <= at) continue;
      const Step step{i, to, BitsOf(problem, item, to) - BitsOf(problem, item, at),
                      item.loss[Index(at)] - item.loss[Index(to)]};
      // Of equal slopes the longer step.
      if (step.slope() >= best.slope()) best = step;
    }
    if (best.to == at) return;
    at = best.to;
    if (best.saved > 0) steps->push_back(best);
  }
}

// What linear relaxation says of the items from some index on.
class Relaxation {
 public:
  Relaxation(const AllocationProblem& problem, size_t first) {
    for (size_t i = first; i < problem.items.size(); ++i) {
      const Item& item = problem.items[i];
      least_bits_ += BitsOf(problem, item, item.formats.front());
      most_loss_ += item.loss[Index(item.formats.front())];
      AddSteps(problem, i, &steps_);
    }
    std::stable_sort(steps_.begin(), steps_.end(),
                     [](const Step& a, const Step& b) { return a.slope() > b.slope(); });
  }
  // No allocation of these items within `bits` loses less.
  double Bound(double bits) const {
    double left = bits - least_bits_;
    if (left < 0) return kInfinite;
    double loss = most_loss_;
    for (const Step& step : steps_) {
      if (step.bits > left) return loss - step.slope() * left;
      left -= step.bits;
      loss -= step.saved;
    }
    return loss;
  }
  const std::vector<Step>& steps() const { return steps_; }
  double least_bits() const { return least_bits_; }

 private:
  std::vector<Step> steps_;
  double least_bits_ = 0;
  double most_loss_ = 0;
};

// A good allocation to begin with: steps in the order of their slopes, those left out that do not fit.
std::vector<Format> FirstGuess(const AllocationProblem& problem, const Relaxation& all, double capacity) {
  std::vector<Format> formats;
  for (const Item& item : problem.items) formats.push_back(item.formats.front());
  std::vector<bool> blocked(problem.items.size(), false);
  double left = capacity - all.least_bits();
  for (const Step& step : all.steps()) {
    if (blocked[step.item] || step.bits > left) {
      blocked[step.item] = true;
      continue;
    }
    left -= step.bits;
    formats[step.item] = step.to;
  }
  return formats;
}

}  // namespace

AllocationProblem MakeAllocationProblem(const TagNeeds& needs, const std::array<double, kTags>& tokens,
                                        const KvGeometry& geometry) {
  AllocationProblem problem;
  for (int f = 0; f < kFormats; ++f) {
    problem.bits[static_cast<size_t>(f)] = EffectiveBits(geometry, static_cast<Format>(f));
  }
  for (size_t t = 0; t < kTags; ++t) {
    if (!(tokens[t] > 0)) continue;
    Item item;
    item.tag = static_cast<int>(t);
    item.tokens = tokens[t];
    for (int f = 0; f < kFormats; ++f) {
      const auto format = static_cast<Format>(f);
      item.loss[Index(format)] = tokens[t] * needs.loss[t][Index(format)];
      const bool allowed = needs.allowed[Index(format)] && format >= needs.floor[t];
      if (allowed || format == Format::kBf16) item.formats.push_back(format);
    }
    problem.tokens += item.tokens;
    problem.items.push_back(std::move(item));
  }
  return problem;
}

Result<Allocation> AllocateExactly(const AllocationProblem& problem, double budget_bits) {
  ASSIGN_OR_RETURN(const double capacity, Capacity(problem, budget_bits));
  struct State {
    double bits, loss;
    int32_t parent;  // in the stage before
    Format format;
  };
  const size_t n = problem.items.size();
  std::vector<Relaxation> behind;
  for (size_t i = 0; i <= n; ++i) behind.emplace_back(problem, i);
  const std::vector<Format> guess = FirstGuess(problem, behind[0], capacity);
  double incumbent = Sum(problem, guess).loss;
  std::vector<std::vector<State>> stages = {{{0, 0, -1, Format::kK2V2}}};
  for (size_t i = 0; i < n; ++i) {
    std::vector<State> next;
    for (size_t s = 0; s < stages.back().size(); ++s) {
      const State& state = stages.back()[s];
      for (const Format format : problem.items[i].formats) {
        const State to = {state.bits + BitsOf(problem, problem.items[i], format),
                          state.loss + problem.items[i].loss[Index(format)], static_cast<int32_t>(s), format};
        // Those that can at best equal the incumbent but for rounding stay: it is among them itself.
        if (to.loss + behind[i + 1].Bound(capacity - to.bits) <= incumbent * (1 + kSlack)) next.push_back(to);
      }
    }
    std::sort(next.begin(), next.end(), [](const State& a, const State& b) {
      return a.bits != b.bits ? a.bits < b.bits : a.loss < b.loss;
    });
    double best = kInfinite;
    std::erase_if(next, [&](const State& state) {
      if (state.loss >= best) return true;
      best = state.loss;
      return false;
    });
    CHECK(!next.empty());
    stages.push_back(std::move(next));
  }
  // Bits rise and losses fall along a stage.
  std::vector<Format> formats(n);
  auto at = static_cast<int32_t>(stages.back().size()) - 1;
  for (size_t i = n; i-- > 0;) {
    const State& state = stages[i + 1][static_cast<size_t>(at)];
    formats[i] = state.format;
    at = state.parent;
  }
  return Sum(problem, formats);
}

Result<Allocation> AllocateGreedily(const AllocationProblem& problem, double budget_bits, Format low,
                                    Format high) {
  ASSIGN_OR_RETURN(const double capacity, Capacity(problem, budget_bits));
  const auto at_least = [](const Item& item, Format format) {
    return *std::find_if(item.formats.begin(), item.formats.end(), [&](Format f) { return f >= format; });
  };
  std::vector<Format> formats;
  std::vector<Step> steps;
  double left = capacity;
  for (size_t i = 0; i < problem.items.size(); ++i) {
    const Item& item = problem.items[i];
    const Format from = at_least(item, low);
    const Format to = at_least(item, high);
    formats.push_back(from);
    left -= BitsOf(problem, item, from);
    if (to == from) continue;
    steps.push_back({i, to, BitsOf(problem, item, to) - BitsOf(problem, item, from),
                     item.loss[Index(from)] - item.loss[Index(to)]});
  }
  if (left < 0) {
    return InvalidArgument(
        fmt::format("a budget of {:.4g} effective bits does not hold all tokens at {}; raise it", budget_bits,
                    Name(low)));
  }
  std::stable_sort(steps.begin(), steps.end(),
                   [](const Step& a, const Step& b) { return a.slope() > b.slope(); });
  for (const Step& step : steps) {
    if (step.bits > left) continue;
    left -= step.bits;
    formats[step.item] = step.to;
  }
  return Sum(problem, formats);
}

Result<Allocation> AllocateByPrice(const TagNeeds& needs, const std::array<double, kTags>& tokens,
                                   const KvGeometry& geometry, double budget_bits) {
  const AllocationProblem problem = MakeAllocationProblem(needs, tokens, geometry);
  RETURN_IF_ERROR(Capacity(problem, budget_bits).status());
  const double price = PriceForBudget(needs, tokens, geometry, budget_bits * (1 + kSlack));
  std::vector<Format> formats;
  for (const Item& item : problem.items) {
    // A block of the tag alone, as PriceForBudget weighs it.
    std::array<uint8_t, kBlockTokens> tags;
    tags.fill(static_cast<uint8_t>(item.tag));
    const BlockNeed need = NeedOf(needs, tags, /*first_block=*/false);
    formats.push_back(Choose(needs, need, geometry, price));
  }
  return Sum(problem, formats);
}

}  // namespace triaxial
