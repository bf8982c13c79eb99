// Angles of rotary position embeddings.
#ifndef TRIAXIAL_MODEL_ROPE_H_
#define TRIAXIAL_MODEL_ROPE_H_

#include <array>
#include <cstdint>
#include <span>
#include <vector>

namespace triaxial {

// Interleaved MRoPE (Qwen3-VL): frequency k turns by the position on the axis that axis(k) names. Plain RoPE
// is the section {head_dim / 2, 0, 0}.
class Mrope {
 public:
  Mrope(int head_dim, double theta, const std::array<int, 3>& section);
  // cos, sin: [positions][head_dim / 2].
  void Angles(std::span<const std::array<int32_t, 3>> positions, float* cos, float* sin) const;
  // What the angles are made of: frequency k and its axis, [head_dim / 2].
  const std::vector<float>& frequencies() const { return frequencies_; }
  const std::vector<uint8_t>& axes() const { return axes_; }

 private:
  std::vector<float> frequencies_;
  std::vector<uint8_t> axes_;
};

// 2-D RoPE of the vision tower: the first half of the frequencies turns by the row, the second by the column.
class GridRope {
 public:
  explicit GridRope(int head_dim);
  // cos, sin: [head_dim / 2].
  void Angles(int row, int column, float* cos, float* sin) const;
  // The half that turns by one of them; cos, sin: [head_dim / 4].
  void AxisAngles(int position, float* cos, float* sin) const;

 private:
  std::vector<float> frequencies_;  // [head_dim / 4]
};

}  // namespace triaxial

#endif  // TRIAXIAL_MODEL_ROPE_H_
