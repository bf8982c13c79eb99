// The calibration of the codec `rotated` (kv/calibration.h), fitted to a checkpoint: factors that balance the
// RoPE pairs of queries and keys, and value channels with what reads them; clip ratios and gains of 2-bit
// sides that keep what the model says closest to what it says with a BF16 cache (docs/kv-format.md,
// docs/fidelity.md).
#ifndef TRIAXIAL_CALIB_CODEC_FIT_H_
#define TRIAXIAL_CALIB_CODEC_FIT_H_

#include <functional>
#include <string>

#include "base/status.h"
#include "calib/trajectories.h"
#include "kv/calibration.h"
#include "serve/served_model.h"

namespace triaxial {

struct CodecFitOptions {
  int factor_conversations = 40;  // the first ones: for the factors
  int level_conversations = 6;    // further ones, for clips and gains; 0 keeps them at 1
  bool equalize_values = true;    // false leaves the value channels as they are
  // Called now and then with the fraction that is done; false interrupts with Cancelled.
  std::function<bool(double)> progress = [](double) { return true; };
  std::function<void(const std::string&)> notice = [](const std::string&) {};  // a line for each result
};

// Runs the model in F32 over the first conversations. Conversations of the second kind are cut where the
// logits of all their tokens would take more than 512 MiB. Errors: those of reading conversations and of
// Model::Load; InvalidArgument where there is no conversation.
Result<KvCalibration> FitCodec(const ServedModel& model, const Trajectories& trajectories,
                               const CodecFitOptions& options);

}  // namespace triaxial

#endif  // TRIAXIAL_CALIB_CODEC_FIT_H_
