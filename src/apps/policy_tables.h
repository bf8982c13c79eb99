// Policies as people read them.
#ifndef TRIAXIAL_APPS_POLICY_TABLES_H_
#define TRIAXIAL_APPS_POLICY_TABLES_H_

#include <array>
#include <functional>
#include <string>

#include "calib/compare.h"
#include "kv/policy.h"

namespace triaxial {

// One cell for each tag, over the three axes, to stdout.
void PrintOverAxes(const std::function<std::string(const Tag&)>& cell);
// "older/text/obs" in the colour of its semantic.
std::string PaintTag(int tag);

void ShowPolicy(const Policy& policy, bool distortion);
// Tags that two policies store differently at rest, and how their losses compare.
void ShowDifference(const Policy& a, const Policy& b);
Json DifferenceToJson(const Policy& a, const Policy& b);
void ShowDrift(const Policy& policy, const Drift& drift);
Json DriftToJson(const Policy& policy, const Drift& drift);

std::string Scientific(double value);  // "1.2e-05"

}  // namespace triaxial

#endif  // TRIAXIAL_APPS_POLICY_TABLES_H_
