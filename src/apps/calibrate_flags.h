// Options of the commands that measure sensitivities: `calibrate` and `policy check`.
#ifndef TRIAXIAL_APPS_CALIBRATE_FLAGS_H_
#define TRIAXIAL_APPS_CALIBRATE_FLAGS_H_

#include <CLI/CLI.hpp>
#include <memory>
#include <string>
#include <vector>

#include "apps/commands.h"
#include "calib/calibrate.h"

namespace triaxial {

struct MeasureFlags {
  ModelFlags model;
  std::vector<std::string> trajectories;
  int layers = 0;
  int max_conversations = 0;
  int max_tokens = 0;
  uint64_t seed = 1;
  std::string metric = "mse";
  std::string aggregate;  // "": max, but mean for the metric output
  std::string tags_at;    // "": turn, or end for the metric kl
  std::string codec_out;
};
std::vector<std::string> MetricNames();
// --threads, --dtype, --max-conversations, --max-tokens, --seed.
void AddMeasureFlags(CLI::App* app, MeasureFlags* flags);
// --kv-codec, --layers, --metric, --aggregate, --tags-at: what a policy's provenance says of a policy.
void AddMethodFlags(CLI::App* app, MeasureFlags* flags);

// A model with its meter, and the conversations.
struct Measurement {
  ServedModel model;
  Trajectories trajectories;
  std::unique_ptr<SensitivityMeter> meter;
  CalibrationOptions options;
  Json provenance;
};
// `layers`: those to replay, or empty for --layers of them. With `codec_out` the codec is fitted first, with
// a progress bar; an interrupt from the keyboard ends it with Cancelled.
Result<Measurement> PrepareMeasurement(const MeasureFlags& flags, const std::vector<int>& layers);
// Calibrate with a progress bar; an interrupt from the keyboard ends it with Cancelled.
Result<SensitivityProfile> RunMeasurement(Measurement* measurement);

}  // namespace triaxial

#endif  // TRIAXIAL_APPS_CALIBRATE_FLAGS_H_
