// Policies next to each other, and a policy next to new measurements: how far calibration has drifted.
#ifndef TRIAXIAL_CALIB_COMPARE_H_
#define TRIAXIAL_CALIB_COMPARE_H_

#include <array>
#include <vector>

#include "base/status.h"
#include "calib/allocate.h"
#include "calib/profile.h"
#include "kv/policy.h"

namespace triaxial {

// The geometry that a policy's bits are counted in: the head_dim and codec of its provenance, else 128 and
// rotated. One layer and KV head.
KvGeometry GeometryOf(const Policy& policy);

// What blocks of one tag alone take while memory suffices: a fixed policy's table, or a priced one's formats
// at its price or budget. A policy whose budget is too small takes the fewest bits it may.
std::array<Format, kTags> FormatsAtRest(const Policy& policy, const KvGeometry& geometry);

// Spearman's rank correlation, ties sharing their mean rank; 1 if either side does not vary.
double RankCorrelation(const std::vector<double>& a, const std::vector<double>& b);

struct Drift {
  struct Entry {
    int tag = 0;
    double tokens = 0;                               // mean of a conversation, in the new measurement
    std::array<double, kFormats> before{}, after{};  // losses of one token; 0 for bf16
    Format format_before, format_after;  // at rest: as the policy says, and as the new losses would have it
  };
  std::vector<Entry> entries;  // of the tags that the new data has
  // Over (tag, format) pairs.
  double rank_correlation = 0;
  double median_ratio = 0;  // after over before
  // By the new losses: what the policy's formats lose, and what the best formats of no more bits would.
  double bits = 0;
  double loss = 0;
  double best_loss = 0;
};
// InvalidArgument for fixed policies, which hold no losses; else as MakeLossTable and AllocateExactly.
Result<Drift> MeasureDrift(const Policy& policy, const SensitivityProfile& profile,
                           const KvGeometry& geometry);

}  // namespace triaxial

#endif  // TRIAXIAL_CALIB_COMPARE_H_
