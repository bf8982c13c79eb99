#include "ops/full_attention.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>
#include <vector>

#include "ops/elementwise.h"
#include "ops/linear.h"

namespace triaxial {
namespace {

// Rows: less than a tile, several tiles with a partial last one.
void Check(Element type, int64_t rows, int dim) {
  const int heads = 2;
  std::mt19937 random(1);
  std::normal_distribution<float> normal;
  const int64_t n = heads * rows * dim;
  const auto make = [&](float scale) {
    std::vector<float> x(static_cast<size_t>(n));
    for (float& v : x) v = normal(random) * scale;
    std::vector<uint8_t> bytes(x.size() * static_cast<size_t>(ByteSize(type)));
    Convert(x.data(), 1, n, type, bytes.data());
    Widen(bytes.data(), type, n, x.data());
    return std::pair(x, bytes);
  };
  const auto [q, q_bytes] = make(0.4f);
  const auto [k, k_bytes] = make(1);
  const auto [v, v_bytes] = make(1);
  std::vector<uint8_t> out(q_bytes.size());
  FullAttention attention;
  attention.Run(rows, heads, dim, type, q_bytes.data(), k_bytes.data(), v_bytes.data(), out.data());
  std::vector<float> found(static_cast<size_t>(n));
  Widen(out.data(), type, n, found.data());
  for (int h = 0; h < heads; ++h) {
    for (int64_t r = 0; r < rows; r += rows < 1000 ? 1 : 97) {
      const float* qr = &q[(h * rows + r) * dim];
      std::vector<double> p(static_cast<size_t>(rows));
      double sum = 0;
      for (int64_t j = 0; j < rows; ++j) {
        double score = 0;
        for (int c = 0; c < dim; ++c) score += double{qr[c]} * k[(h * rows + j) * dim + c];
        sum += p[j] = std::exp(score);
      }
      for (int c = 0; c < dim; ++c) {
        double expected = 0;
        for (int64_t j = 0; j < rows; ++j) expected += p[j] / sum * v[(h * rows + j) * dim + c];
        ASSERT_NEAR(expected, found[(r * heads + h) * dim + c], type == Element::kF32 ? 1e-5 : 0.01)
            << "head " << h << " row " << r << " channel " << c;
      }
    }
  }
}

TEST(FullAttention, F32) {
  Check(Element::kF32, 6, 64);
  Check(Element::kF32, 240, 64);
  Check(Element::kF32, 1100, 72);
}

TEST(FullAttention, TilesOfALargeImage) { Check(Element::kF32, 9000, 8); }

TEST(FullAttention, Bf16) {
  if (!HasBf16Products()) GTEST_SKIP() << "no BF16 products on this CPU";
  Check(Element::kBf16, 6, 64);
  Check(Element::kBf16, 1100, 72);
}

}  // namespace
}  // namespace triaxial
