#include "ops/linear.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

#include "ops/elementwise.h"

namespace triaxial {
namespace {

struct Case {
  Element type;
  Element output;
  Epilogue epilogue;
  bool bias;
};

class LinearTest : public testing::TestWithParam<Case> {};
INSTANTIATE_TEST_SUITE_P(Cases, LinearTest,
                         testing::Values(Case{Element::kF32, Element::kF32, Epilogue::kNone, false},
                                         Case{Element::kF32, Element::kF32, Epilogue::kAdd, true},
                                         Case{Element::kF32, Element::kF32, Epilogue::kGeluTanh, true},
                                         Case{Element::kF32, Element::kF32, Epilogue::kGeluErf, true},
                                         Case{Element::kBf16, Element::kF32, Epilogue::kNone, false},
                                         Case{Element::kBf16, Element::kF32, Epilogue::kAdd, true},
                                         Case{Element::kBf16, Element::kBf16, Epilogue::kGeluTanh, true}));

double Apply(Epilogue epilogue, double x) {
  switch (epilogue) {
    case Epilogue::kGeluTanh:
      return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x)));
    case Epilogue::kGeluErf:
      return 0.5 * x * (1 + std::erf(x / std::sqrt(2.0)));
    default:
      return x;
  }
}

// Against double arithmetic, with sizes that fill no block of any layout and more rows than one call takes.
TEST_P(LinearTest, EqualsTheDefinition) {
  const Case& c = GetParam();
  if (c.type == Element::kBf16 && !HasBf16Products()) GTEST_SKIP() << "no BF16 products on this CPU";
  const int64_t in = 90;
  const int64_t out = 70;
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  const auto make = [&](int64_t n) {
    std::vector<float> x(static_cast<size_t>(n));
    for (float& v : x) v = normal(random) / 2;
    std::vector<uint8_t> bytes(x.size() * static_cast<size_t>(ByteSize(c.type)));
    Convert(x.data(), 1, n, c.type, bytes.data());
    Widen(bytes.data(), c.type, n, x.data());
    return std::pair(x, bytes);
  };
  const auto [weights, weight_bytes] = make(out * in);
  std::vector<float> bias(out);
  for (float& b : bias) b = normal(random);
  LinearCache cache;
  const Linear linear(&cache, {in, out, c.type, c.output, c.epilogue, c.bias}, weight_bytes.data(),
                      c.bias ? bias.data() : nullptr);
  EXPECT_GE(linear.bytes(), in * out * ByteSize(c.type));
  for (const int64_t rows : {int64_t{1}, int64_t{17}, int64_t{1}, int64_t{600}}) {
    const auto [x, x_bytes] = make(rows * in);
    std::vector<uint8_t> y(static_cast<size_t>(rows * out * ByteSize(c.output)));
    std::vector<float> before(static_cast<size_t>(rows * out), 0.0f);
    if (c.epilogue == Epilogue::kAdd) {
      for (float& v : before) v = normal(random);
      Convert(before.data(), 1, rows * out, c.output, y.data());
    }
    linear.Run(x_bytes.data(), rows, y.data());
    std::vector<float> found(before.size());
    Widen(y.data(), c.output, rows * out, found.data());
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t o = 0; o < out; ++o) {
        double sum = c.bias ? bias[o] : 0;
        for (int64_t i = 0; i < in; ++i) sum += double{x[r * in + i]} * weights[o * in + i];
        const double expected = Apply(c.epilogue, sum) + before[r * out + o];
        const double tolerance = c.output == Element::kF32 ? 2e-5 : 0.01 * (1 + std::abs(expected));
        ASSERT_NEAR(expected, found[r * out + o], tolerance) << "row " << r << " column " << o;
      }
    }
  }
}

}  // namespace
}  // namespace triaxial
