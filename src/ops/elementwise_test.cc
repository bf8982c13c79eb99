#include "ops/elementwise.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

#include "base/float16.h"

namespace triaxial {
namespace {

// Values of both element types, compared with double arithmetic. 37 and 100 leave remainders for any SIMD
// width.
class Elementwise : public testing::TestWithParam<Element> {
 protected:
  std::vector<float> Random(int64_t n, float scale = 1) {
    std::normal_distribution<float> normal(0, scale);
    std::vector<float> x(static_cast<size_t>(n));
    for (float& v : x) v = normal(random_);
    return x;
  }
  std::vector<uint8_t> Output(int64_t n) const {
    return std::vector<uint8_t>(static_cast<size_t>(n * ByteSize(GetParam())));
  }
  void ExpectNear(const std::vector<double>& expected, const std::vector<uint8_t>& bytes) const {
    std::vector<float> found(expected.size());
    Widen(bytes.data(), GetParam(), static_cast<int64_t>(found.size()), found.data());
    const double tolerance = GetParam() == Element::kF32 ? 2e-6 : 1.0 / 256;
    for (size_t i = 0; i < expected.size(); ++i) {
      ASSERT_NEAR(expected[i], found[i], tolerance * std::max(1.0, std::abs(expected[i]))) << "at " << i;
    }
  }
  std::mt19937 random_{1};
};
INSTANTIATE_TEST_SUITE_P(Types, Elementwise, testing::Values(Element::kF32, Element::kBf16));

TEST_P(Elementwise, RmsNorm) {
  const int64_t rows = 700;
  const int64_t n = 37;
  const std::vector<float> x = Random(rows * n, 3);
  const std::vector<float> weight = Random(n);
  std::vector<double> expected;
  for (int64_t r = 0; r < rows; ++r) {
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += double{x[r * n + i]} * x[r * n + i];
    for (int64_t i = 0; i < n; ++i) expected.push_back(x[r * n + i] / std::sqrt(sum / n + 1e-6) * weight[i]);
  }
  std::vector<uint8_t> out = Output(rows * n);
  RmsNorm(x.data(), weight.data(), 1e-6f, rows, n, GetParam(), out.data());
  ExpectNear(expected, out);
}

TEST_P(Elementwise, LayerNormWithLargeMean) {
  const int64_t rows = 300;
  const int64_t n = 100;
  std::vector<float> x = Random(rows * n);
  for (float& v : x) v += 10;
  const std::vector<float> weight = Random(n);
  const std::vector<float> bias = Random(n);
  std::vector<double> expected;
  for (int64_t r = 0; r < rows; ++r) {
    double mean = 0;
    double variance = 0;
    for (int64_t i = 0; i < n; ++i) mean += x[r * n + i] / double(n);
    for (int64_t i = 0; i < n; ++i) variance += std::pow(x[r * n + i] - mean, 2) / double(n);
    for (int64_t i = 0; i < n; ++i) {
      expected.push_back((x[r * n + i] - mean) / std::sqrt(variance + 1e-6) * weight[i] + bias[i]);
    }
  }
  std::vector<uint8_t> out = Output(rows * n);
  LayerNorm(x.data(), weight.data(), bias.data(), 1e-6f, rows, n, GetParam(), out.data());
  // The mean is ten times the deviation, which costs a digit.
  std::vector<float> found(expected.size());
  Widen(out.data(), GetParam(), rows * n, found.data());
  for (size_t i = 0; i < expected.size(); ++i) {
    ASSERT_NEAR(expected[i], found[i], GetParam() == Element::kF32 ? 2e-5 : 0.04);
  }
}

TEST_P(Elementwise, SwiGluOverTheWholeRange) {
  const int64_t rows = 300;
  const int64_t n = 37;
  std::vector<float> gate_up = Random(rows * 2 * n, 4);
  gate_up[0] = -100;
  gate_up[1] = 100;
  gate_up[2] = 0;
  std::vector<double> expected;
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < n; ++i) {
      const double g = gate_up[2 * r * n + i];
      expected.push_back(g / (1 + std::exp(-g)) * gate_up[(2 * r + 1) * n + i]);
    }
  }
  std::vector<uint8_t> out = Output(rows * n);
  SwiGlu(gate_up.data(), rows, n, GetParam(), out.data());
  ExpectNear(expected, out);
}

TEST_P(Elementwise, SoftmaxNumeratorsOfLargeScores) {
  std::vector<float> x = Random(100, 50);
  x[99] = 500;
  std::vector<double> expected;
  double sum = 0;
  for (float v : x) {
    expected.push_back(std::exp(double{v} - 500));
    sum += expected.back();
  }
  std::vector<uint8_t> out = Output(100);
  EXPECT_NEAR(sum, SoftmaxNumerators(x.data(), 100, GetParam(), out.data()), 1e-5);
  ExpectNear(expected, out);
}

TEST(Elementwise, ConvertRoundsToNearestEven) {
  std::vector<float> x;
  for (uint32_t i = 0; i < 1000; ++i) x.push_back(std::bit_cast<float>(0x3f800000u + i * 0x1001u));
  x.push_back(std::bit_cast<float>(0x3f808000u));  // ties
  x.push_back(std::bit_cast<float>(0x3f818000u));
  std::vector<bf16_t> out(x.size());
  Convert(x.data(), 1.0f, static_cast<int64_t>(x.size()), Element::kBf16, out.data());
  for (size_t i = 0; i < x.size(); ++i) EXPECT_EQ(FloatToBf16(x[i]), out[i]);
}

TEST(Elementwise, NormRotateIsNormThenRotationOfPairs) {
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  for (const int dim : {128, 72, 6}) {
    const int heads = 3;
    std::vector<float> x(heads * dim), weight(dim), cos(dim / 2), sin(dim / 2), out(heads * dim);
    for (float& v : x) v = normal(random);
    for (float& v : weight) v = normal(random);
    for (int i = 0; i < dim / 2; ++i) {
      cos[i] = std::cos(0.3f * static_cast<float>(i));
      sin[i] = std::sin(0.3f * static_cast<float>(i));
    }
    NormRotate(x.data(), heads, dim, weight.data(), 1e-6f, cos.data(), sin.data(), out.data());
    for (int h = 0; h < heads; ++h) {
      double sum = 0;
      for (int c = 0; c < dim; ++c) sum += std::pow(double{x[h * dim + c]}, 2);
      const double f = 1 / std::sqrt(sum / dim + 1e-6);
      for (int c = 0; c < dim / 2; ++c) {
        const double a = x[h * dim + c] * f * weight[c];
        const double b = x[h * dim + c + dim / 2] * f * weight[c + dim / 2];
        EXPECT_NEAR(a * cos[c] - b * sin[c], out[h * dim + c], 1e-5);
        EXPECT_NEAR(a * sin[c] + b * cos[c], out[h * dim + c + dim / 2], 1e-5);
      }
    }
    NormRotate(x.data(), heads, dim, weight.data(), 1e-6f, cos.data(), sin.data(), x.data());
    EXPECT_EQ(out, x);  // in place
  }
}

}  // namespace
}  // namespace triaxial
