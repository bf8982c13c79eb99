#include "calib/compare.h"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace triaxial {
namespace {

std::vector<double> Ranks(const std::vector<double>& x) {
  std::vector<size_t> order(x.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::sort(order.begin(), order.end(), [&](size_t a, size_t b) { return x[a] < x[b]; });
  std::vector<double> ranks(x.size());
  for (size_t begin = 0; begin < order.size();) {
    size_t end = begin + 1;
    while (end < order.size() && x[order[end]] == x[order[begin]]) ++end;
    for (size_t i = begin; i < end; ++i) ranks[order[i]] = static_cast<double>(begin + end - 1) / 2;
    begin = end;
  }
  return ranks;
}

}  // namespace

KvGeometry GeometryOf(const Policy& policy) {
  KvGeometry geometry{1, 1, 128, Codec::kRotated};
  const Json& from = policy.provenance;
  if (!from.is_object()) return geometry;
  if (from.contains("codec") && from["codec"].is_string()) {
    geometry.codec = ParseCodec(from["codec"].get<std::string>()).value_or(geometry.codec);
  }
  if (from.contains("head_dim") && from["head_dim"] == 64) geometry.head_dim = 64;
  return geometry;
}

std::array<Format, kTags> FormatsAtRest(const Policy& policy, const KvGeometry& geometry) {
  const TagNeeds needs = ResolveNeeds(policy, geometry, /*two_bit_keys=*/true, 0);
  std::array<Format, kTags> formats{};
  for (size_t t = 0; t < kTags; ++t) {
    std::array<uint8_t, kBlockTokens> tags;
    tags.fill(static_cast<uint8_t>(t));
    const BlockNeed need = NeedOf(needs, tags, /*first_block=*/false);
    formats[t] = std::isinf(needs.rest_price) ? need.floor : Choose(needs, need, geometry, needs.rest_price);
  }
  return formats;
}

double RankCorrelation(const std::vector<double>& a, const std::vector<double>& b) {
  const std::vector<double> x = Ranks(a);
  const std::vector<double> y = Ranks(b);
  const double mean = (static_cast<double>(x.size()) - 1) / 2;
  double xy = 0;
  double xx = 0;
  double yy = 0;
  for (size_t i = 0; i < x.size(); ++i) {
    xy += (x[i] - mean) * (y[i] - mean);
    xx += (x[i] - mean) * (x[i] - mean);
    yy += (y[i] - mean) * (y[i] - mean);
  }
  return xx > 0 && yy > 0 ? xy / std::sqrt(xx * yy) : 1;
}

Result<Drift> MeasureDrift(const Policy& policy, const SensitivityProfile& profile,
                           const KvGeometry& geometry) {
  if (!policy.priced) {
    return InvalidArgument("policy " + policy.name +
                           " is a fixed one, without losses to compare; check a priced policy, as calibrate "
                           "writes them");
  }
  ASSIGN_OR_RETURN(const LossTable table, MakeLossTable(profile));
  const TagTotals tokens = MeanTokens(profile);
  const std::array<Format, kTags> rest = FormatsAtRest(policy, geometry);
  Policy renewed = policy;
  renewed.distortion = table.per_token;
  const AllocationProblem problem =
      MakeAllocationProblem(ResolveNeeds(renewed, geometry, /*two_bit_keys=*/true, 0), tokens, geometry);
  Drift drift;
  for (const AllocationProblem::Item& item : problem.items) {
    const auto t = static_cast<size_t>(item.tag);
    drift.bits += item.tokens * problem.bits[static_cast<size_t>(rest[t])] / problem.tokens;
    drift.loss += item.loss[static_cast<size_t>(rest[t])];
  }
  ASSIGN_OR_RETURN(const Allocation best, AllocateExactly(problem, drift.bits));
  drift.best_loss = best.loss;
  std::vector<double> before, after, ratios;
  for (const AllocationProblem::Item& item : problem.items) {
    const auto t = static_cast<size_t>(item.tag);
    Drift::Entry entry{item.tag, item.tokens, {}, {}, rest[t], best.formats[t]};
    for (size_t f = 0; f < kFormats; ++f) {
      entry.before[f] = policy.distortion[t][f];
      entry.after[f] = table.per_token[t][f];
      if (static_cast<Format>(f) == Format::kBf16) continue;
      before.push_back(entry.before[f]);
      after.push_back(entry.after[f]);
      if (entry.before[f] > 0) ratios.push_back(entry.after[f] / entry.before[f]);
    }
    drift.entries.push_back(entry);
  }
  drift.rank_correlation = RankCorrelation(before, after);
  std::sort(ratios.begin(), ratios.end());
  drift.median_ratio = ratios.empty() ? 1 : ratios[ratios.size() / 2];
  return drift;
}

}  // namespace triaxial
