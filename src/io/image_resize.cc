#include <algorithm>
#include <cmath>
#include <cstddef>

#include "base/check.h"
#include "io/image_processor.h"

namespace triaxial {
namespace {

// Weights are fixed point: 8 bits of sample and 2 bits of head room for overshoot leave 22 of 32.
constexpr int kWeightBits = 32 - 8 - 2;
constexpr double kSupport = 2.0;

// Keys' cubic convolution kernel with a = -0.5.
double Bicubic(double x) {
  constexpr double a = -0.5;
  x = std::fabs(x);
  if (x < 1.0) return ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0;
  if (x < 2.0) return (((x - 5.0) * x + 8.0) * x - 4.0) * a;
  return 0.0;
}

// One axis: output i is the weighted sum of inputs first[i] .. first[i] + count[i] - 1.
struct Axis {
  int max_count = 0;
  std::vector<int> first;
  std::vector<int> count;
  std::vector<int32_t> weights;  // [output][max_count]

  const int32_t* WeightsOf(int i) const { return &weights[static_cast<size_t>(i) * max_count]; }
};

Axis MakeAxis(int in_size, int out_size) {
  const double scale = static_cast<double>(in_size) / out_size;
  const double stretch = std::max(scale, 1.0);  // antialiasing: the kernel widens when the picture shrinks
  const double support = kSupport * stretch;
  Axis axis;
  axis.max_count = static_cast<int>(std::ceil(support)) * 2 + 1;
  axis.first.resize(out_size);
  axis.count.resize(out_size);
  axis.weights.assign(static_cast<size_t>(out_size) * axis.max_count, 0);
  std::vector<double> exact(axis.max_count);
  for (int i = 0; i < out_size; ++i) {
    const double center = (i + 0.5) * scale;
    const int first = std::max(static_cast<int>(center - support + 0.5), 0);
    const int count = std::min(static_cast<int>(center + support + 0.5), in_size) - first;
    // Multiplied, not divided, and summed in this order: the weights are then Pillow's to the last bit.
    const double inverse_stretch = 1.0 / stretch;
    double total = 0.0;
    for (int j = 0; j < count; ++j) {
      exact[j] = Bicubic((j + first - center + 0.5) * inverse_stretch);
      total += exact[j];
    }
    int32_t* weights = &axis.weights[static_cast<size_t>(i) * axis.max_count];
    for (int j = 0; j < count; ++j) {
      const double weight = (total != 0.0 ? exact[j] / total : exact[j]) * (1 << kWeightBits);
      weights[j] = static_cast<int32_t>(weight < 0 ? weight - 0.5 : weight + 0.5);
    }
    axis.first[i] = first;
    axis.count[i] = count;
  }
  return axis;
}

uint8_t RoundToByte(int32_t sum) { return static_cast<uint8_t>(std::clamp(sum >> kWeightBits, 0, 255)); }
constexpr int32_t kHalf = 1 << (kWeightBits - 1);

Image ResizeWidth(const Image& in, int width) {
  const Axis axis = MakeAxis(in.width, width);
  Image out{width, in.height, std::vector<uint8_t>(static_cast<size_t>(width) * in.height * 3)};
  uint8_t* to = out.rgb.data();
  for (int y = 0; y < in.height; ++y) {
    const uint8_t* row = &in.rgb[static_cast<size_t>(y) * in.width * 3];
    for (int x = 0; x < width; ++x, to += 3) {
      const int32_t* weights = axis.WeightsOf(x);
      const uint8_t* from = row + axis.first[x] * 3;
      int32_t r = kHalf, g = kHalf, b = kHalf;
      for (int j = 0; j < axis.count[x]; ++j, from += 3) {
        r += from[0] * weights[j];
        g += from[1] * weights[j];
        b += from[2] * weights[j];
      }
      to[0] = RoundToByte(r);
      to[1] = RoundToByte(g);
      to[2] = RoundToByte(b);
    }
  }
  return out;
}

Image ResizeHeight(const Image& in, int height) {
  const Axis axis = MakeAxis(in.height, height);
  const size_t stride = static_cast<size_t>(in.width) * 3;
  Image out{in.width, height, std::vector<uint8_t>(stride * height)};
  std::vector<int32_t> sums(stride);
  for (int y = 0; y < height; ++y) {
    const int32_t* weights = axis.WeightsOf(y);
    std::fill(sums.begin(), sums.end(), kHalf);
    for (int j = 0; j < axis.count[y]; ++j) {
      const uint8_t* from = &in.rgb[(static_cast<size_t>(axis.first[y]) + j) * stride];
      const int32_t weight = weights[j];
      for (size_t x = 0; x < stride; ++x) sums[x] += from[x] * weight;
    }
    uint8_t* to = &out.rgb[y * stride];
    for (size_t x = 0; x < stride; ++x) to[x] = RoundToByte(sums[x]);
  }
  return out;
}

}  // namespace

Image ResizeBicubic(const Image& image, ImageSize size) {
  CHECK(image.width > 0 && image.height > 0 && size.width > 0 && size.height > 0);
  if (size.width == image.width && size.height == image.height) return image;
  if (size.width == image.width) return ResizeHeight(image, size.height);
  if (size.height == image.height) return ResizeWidth(image, size.width);
  return ResizeHeight(ResizeWidth(image, size.width), size.height);
}

}  // namespace triaxial
