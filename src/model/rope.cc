#include "model/rope.h"

#include <algorithm>
#include <cmath>

#include "base/parallel.h"

namespace triaxial {
namespace {

constexpr double kGridTheta = 10000;
constexpr int64_t kTaskRows = 16;

// theta^(-2k / width), k < width / 2. The reference keeps frequencies and angles in F32, and so the angles
// must be rounded as it rounds them.
std::vector<float> Frequencies(double theta, int width) {
  std::vector<float> result;
  for (int k = 0; k < width / 2; ++k) {
    result.push_back(static_cast<float>(1.0 / std::pow(theta, 2.0 * k / width)));
  }
  return result;
}

void Turn(int32_t position, float frequency, float* cos, float* sin) {
  const double angle = static_cast<float>(position) * frequency;
  *cos = static_cast<float>(std::cos(angle));
  *sin = static_cast<float>(std::sin(angle));
}

}  // namespace

Mrope::Mrope(int head_dim, double theta, const std::array<int, 3>& section)
    : frequencies_(Frequencies(theta, head_dim)), axes_(frequencies_.size(), 0) {
  for (size_t axis = 1; axis < 3; ++axis) {
    const size_t end = std::min(axes_.size(), 3 * static_cast<size_t>(section[axis]));
    for (size_t k = axis; k < end; k += 3) axes_[k] = static_cast<uint8_t>(axis);
  }
}

void Mrope::Angles(std::span<const std::array<int32_t, 3>> positions, float* cos, float* sin) const {
  const auto rows = static_cast<int64_t>(positions.size());
  const size_t half = frequencies_.size();
  ParallelFor((rows + kTaskRows - 1) / kTaskRows, [&](int64_t task) {
    for (int64_t r = task * kTaskRows; r < std::min(rows, (task + 1) * kTaskRows); ++r) {
      const size_t row = static_cast<size_t>(r) * half;
      for (size_t k = 0; k < half; ++k) {
        Turn(positions[static_cast<size_t>(r)][axes_[k]], frequencies_[k], cos + row + k, sin + row + k);
      }
    }
  });
}

GridRope::GridRope(int head_dim) : frequencies_(Frequencies(kGridTheta, head_dim / 2)) {}

void GridRope::AxisAngles(int position, float* cos, float* sin) const {
  for (size_t k = 0; k < frequencies_.size(); ++k) Turn(position, frequencies_[k], cos + k, sin + k);
}

void GridRope::Angles(int row, int column, float* cos, float* sin) const {
  AxisAngles(row, cos, sin);
  AxisAngles(column, cos + frequencies_.size(), sin + frequencies_.size());
}

}  // namespace triaxial
