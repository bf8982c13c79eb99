// Policies as `triaxial eval` names them: with a budget, with some axes only, in one codec or the other.
#ifndef TRIAXIAL_CALIB_EVAL_POLICY_H_
#define TRIAXIAL_CALIB_EVAL_POLICY_H_

#include <string>
#include <vector>

#include "base/status.h"
#include "kv/policy.h"

namespace triaxial {

// A policy as it is to be run.
struct EvalPolicy {
  std::string name;  // as tables show it: the policy's name, and what was said behind it
  Policy policy;
  Codec codec = Codec::kRotated;
};

// POLICY[:BITS][+AXIS[-AXIS]][@CODEC]
//   POLICY  a built-in name or a JSON file
//   BITS    of a priced policy: effective bits at which it rests, instead of its own
//   AXIS    of a priced policy: temporal, modal, semantic; it sees only these (KeepAxes)
//   CODEC   rotated or paper; `codec` if none is said
// Examples: int4, paper@paper, agent.json:2.8, agent.json:2.8+temporal-modal. InvalidArgument says what is
// wrong; errors of LoadPolicy.
Result<EvalPolicy> ParseEvalPolicy(const std::string& spec, Codec codec);
// A comma-separated list; no name twice (InvalidArgument).
Result<std::vector<EvalPolicy>> ParseEvalPolicies(const std::string& list, Codec codec);

struct Axes {
  bool temporal = false;
  bool modal = false;
  bool semantic = false;
};
// Makes a priced policy blind to the other axes: tags that differ in them alone lose the same, the mean over
// the tokens that it was calibrated on. What is left is the best that such a policy can know.
void KeepAxes(const Axes& axes, Policy* policy);

}  // namespace triaxial

#endif  // TRIAXIAL_CALIB_EVAL_POLICY_H_
