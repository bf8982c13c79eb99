// What a checkpoint is, whatever it is called and wherever it lies: stored KV blocks belong to it alone.
#ifndef TRIAXIAL_APPS_CHECKPOINT_IDENTITY_H_
#define TRIAXIAL_APPS_CHECKPOINT_IDENTITY_H_

#include <string>

#include "base/status.h"

namespace triaxial {

// 64 hex digits over every byte of the weights, of config.json, kv_calibration.json and tokenizer.json
// (`tokenizer_directory` "": the model's); files that do not exist count as empty. Reads all of them, spread
// over the compute threads. Errors: a file cannot be read.
Result<std::string> CheckpointIdentity(const std::string& directory, const std::string& tokenizer_directory);

}  // namespace triaxial

#endif  // TRIAXIAL_APPS_CHECKPOINT_IDENTITY_H_
