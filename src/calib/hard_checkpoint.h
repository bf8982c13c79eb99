// A checkpoint rewritten so that its function stays what it is and its KV cache becomes hard to quantize:
// loud key and value channels, as large models have them and small ones do not.
#ifndef TRIAXIAL_CALIB_HARD_CHECKPOINT_H_
#define TRIAXIAL_CALIB_HARD_CHECKPOINT_H_

#include <cstdint>
#include <string>
#include <vector>

#include "base/status.h"

namespace triaxial {

// Scales are powers of two, so that nothing is rounded: BF16 keys and values are scaled exactly, and so is
// all that undoes it. Only with dense_values the weights are rounded anew.
struct Hardening {
  int key_scale = 32;  // k_norm of a chosen channel is multiplied by it, q_norm divided
  int key_pairs = 4;   // channels c < head_dim / 2 in each layer, each with the other half of its RoPE pair
  std::vector<std::vector<int>> key_channels;  // [layers] which ones; empty: key_pairs of them, by the seed
  int value_scale =
      1;  // rows of v_proj are multiplied by it, the columns of o_proj that read them divided; 1: none
  int value_channels = 4;  // of each KV head in each layer
  // Not channels but so many orthonormal directions of a head are scaled, drawn at random: no channel alone
  // is loud, and no factors of channels make them quiet.
  bool dense_values = false;
  uint64_t seed = 0;  // of the choice of channels and directions
};

// Writes `to` (made if it does not exist) with all files of the checkpoint `from`, its weights changed.
// Subdirectories are left out, and so are kv_calibration.json and kv_policy.json, to be made anew. Errors:
// InvalidArgument (no power of two, more channels than there are, a scale that a weight's type cannot hold,
// the same directory twice), and those of LoadModelConfig and Checkpoint::Open.
Status HardenCheckpoint(const std::string& from, const std::string& to, const Hardening& hardening);

}  // namespace triaxial

#endif  // TRIAXIAL_CALIB_HARD_CHECKPOINT_H_
