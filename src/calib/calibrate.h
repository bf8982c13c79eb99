// Calibration: sensitivities of many conversations, and the policy that follows from them.
#ifndef TRIAXIAL_CALIB_CALIBRATE_H_
#define TRIAXIAL_CALIB_CALIBRATE_H_

#include <functional>
#include <string>

#include "base/json.h"
#include "base/status.h"
#include "calib/profile.h"
#include "calib/sensitivity.h"
#include "calib/trajectories.h"
#include "kv/policy.h"
#include "serve/served_model.h"

namespace triaxial {

struct CalibrationOptions {
  int max_conversations = 0;  // 0: all
  uint64_t seed = 0;
  int32_t max_tokens = 0;  // of a conversation; 0: as many as the model takes
  // Sums so far, written behind each conversation and removed at the end; "": none. With `resume` it goes on
  // from there if the file exists.
  std::string checkpoint;
  bool resume = false;
  // Called now and then with the fraction of all conversations that is done; false interrupts with Cancelled.
  std::function<bool(double)> progress = [](double) { return true; };
  std::function<void(const std::string&)> notice = [](const std::string&) {};
};

// Where a profile comes from: the fields of a policy's provenance that are known before any measurement.
// Errors as reading the files.
Result<Json> ProvenanceOf(const ServedModel& model, const SensitivityMeter& meter,
                          const std::vector<std::string>& trajectories, const CalibrationOptions& options);

// Measures the chosen conversations one after the other; the same for the same inputs, threads aside.
// `provenance` (of ProvenanceOf) must be that of the checkpoint to resume (InvalidArgument).
Result<SensitivityProfile> Calibrate(const ServedModel& model, const Trajectories& trajectories,
                                     const Json& provenance, const CalibrationOptions& options,
                                     SensitivityMeter* meter);

// A priced policy that rests at `budget_bits`; what the profile adds to the provenance is added. Errors as
// MakeLossTable.
Result<Policy> MakePricedPolicy(const SensitivityProfile& profile, const std::string& name,
                                double budget_bits, Json provenance);
// The fixed policy with these formats; `name`, description and provenance are taken from `priced`.
Policy MakeFixedPolicy(const Policy& priced, const std::array<Format, kTags>& formats);

}  // namespace triaxial

#endif  // TRIAXIAL_CALIB_CALIBRATE_H_
