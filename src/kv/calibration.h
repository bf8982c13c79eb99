// The codec's own calibration, a small file beside the checkpoint (kv_calibration.json): static equalization
// of key and value channels, and clip ratios for 2-bit sides. docs/kv-format.md describes it.
#ifndef TRIAXIAL_KV_CALIBRATION_H_
#define TRIAXIAL_KV_CALIBRATION_H_

#include <string>
#include <vector>

#include "base/status.h"
#include "kv/codec.h"

namespace triaxial {

struct KvCalibration {
  // Per layer, head_dim / 2 positive factors: key channels c and c + head_dim / 2 (a RoPE pair) are divided
  // by factor[c], the same query channels multiplied by it. Folded into k_norm and q_norm weights at load
  // time, so the model's function is unchanged. Empty: the identity.
  std::vector<std::vector<float>> key_equalization;
  // Per layer, num_kv_heads * head_dim powers of two: a KV head's value channel is divided by its factor and
  // what its query heads read from it multiplied. Folded into v_proj and o_proj at load time, where it rounds
  // nothing. Empty: the identity.
  std::vector<std::vector<float>> value_equalization;
  ClipRatios clip;
  bool calibrated =
      false;  // false: no file; 2-bit keys of the rotated codec are then stored at 4 bits (k2v2 becomes k4v2)
};

// Equalization factors beyond these would only move rounding errors from keys to queries or back.
inline constexpr float kMinEqualization = 0x1p-16f;
inline constexpr float kMaxEqualization = 0x1p16f;

// Reads directory/kv_calibration.json, all fields but the gains (1 if absent) and the factors of values
// required:
//   {"version": 1, "head_dim": 128, "key_equalization": [[64 floats] per layer], "clip_k2": 0.7,
//    "clip_v2": 0.7, "gain_k2": 1.1, "gain_v2": 1.1,
//    "value_equalization": [[num_kv_heads * 128 floats] per layer]}
// A missing file yields the identity with calibrated = false. Errors: InvalidArgument naming file, field,
// expected, found; unknown fields are errors.
Result<KvCalibration> LoadKvCalibration(const std::string& directory, int num_layers, int num_kv_heads,
                                        int head_dim);
// Reading the file back gives the same floats.
Status SaveKvCalibration(const std::string& path, const KvCalibration& calibration, int head_dim);

}  // namespace triaxial

#endif  // TRIAXIAL_KV_CALIBRATION_H_
