// Every instruction set's codec against the scalar one, bit for bit.
#include "ops/kv_codec.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "base/float16.h"
#include "hwy/targets.h"
#include "kv/codec.h"

namespace triaxial {
namespace {

class KvCodecOracle : public testing::TestWithParam<int64_t> {
 protected:
  void SetUp() override {
    hwy::SetSupportedTargetsForTest(GetParam());
    hwy::GetChosenTarget().Update(hwy::SupportedTargets());
  }
  void TearDown() override {
    hwy::SetSupportedTargetsForTest(0);
    hwy::GetChosenTarget().Update(hwy::SupportedTargets());
  }
};

std::string TargetName(const testing::TestParamInfo<int64_t>& info) { return hwy::TargetName(info.param); }
INSTANTIATE_TEST_SUITE_P(Targets, KvCodecOracle, testing::ValuesIn(hwy::SupportedAndGeneratedTargets()),
                         TargetName);

// One value of a distribution that is drawn once per block, so that a block is of one kind throughout.
class Values {
 public:
  explicit Values(std::mt19937& rng) : rng_(rng), kind_(static_cast<int>(rng() % 9)) {
    magnitude_ = std::ldexp(1.0f, static_cast<int>(rng() % 40) - 25);
  }
  float operator()(int channel) {
    const float x = normal_(rng_);
    switch (kind_) {
      case 0:
        return x * magnitude_;
      case 1:  // a few loud channels, others with an offset
        return x * (channel % 29 == 3 ? 500.0f : 1.0f) + (channel % 7 == 0 ? 30.0f : 0.0f);
      case 2:
        return magnitude_;
      case 3:
        return rng_() % 2 == 0 ? 0.0f : -0.0f;
      case 4:  // subnormal in FP16, and some in F32
        return std::ldexp(x, -20 - static_cast<int>(rng_() % 120));
      case 5:
        return x * 1e30f;
      case 6:  // around the largest FP16 and its rounding
        return (rng_() % 2 == 0 ? 65504.0f : -65520.0f) + x;
      case 7:  // any bits: NaN, infinities, subnormals
        return std::bit_cast<float>(static_cast<uint32_t>(rng_()));
      default:  // a grid, so that many codes lie exactly between two
        return static_cast<float>(static_cast<int>(rng_() % 31)) * 0.5f;
    }
  }

 private:
  std::mt19937& rng_;
  std::normal_distribution<float> normal_;
  int kind_;
  float magnitude_;
};

TEST_P(KvCodecOracle, EncodesAndDecodesTheSameBits) {
  std::mt19937 rng(1);
  for (int round = 0; round < 600; ++round) {
    const KvGeometry g{1, 1, rng() % 2 == 0 ? 64 : 128, rng() % 2 == 0 ? Codec::kRotated : Codec::kPaper};
    const Format f = static_cast<Format>(rng() % kFormats);
    const int capacity = kTailStep * (1 + static_cast<int>(rng() % 4)), room = RoomOf(f, capacity);
    const int tokens = round % 3 == 0 ? room : static_cast<int>(rng() % static_cast<uint32_t>(room)) + 1;
    const int64_t row_stride = g.head_dim + static_cast<int64_t>(rng() % 3) * 17;
    const std::array<float, 4> ratios = {1.0f, 0.96f, 0.9f, kMinClip};
    const std::array<float, 4> gains = {1.0f, 1.05f, 1.15f, kMaxGain};
    const ClipRatios clip{ratios[rng() % 4], ratios[rng() % 4], gains[rng() % 4], gains[rng() % 4]};
    // The values of the last row end the vector, so that reading past it is caught by the sanitizers.
    std::vector<float> x[2];
    for (auto& side : x) {
      Values values(rng);
      side.resize(static_cast<size_t>((tokens - 1) * row_stride + g.head_dim));
      for (size_t i = 0; i < side.size(); ++i) side[i] = values(static_cast<int>(i) % g.head_dim);
    }
    std::vector<uint8_t> expected(static_cast<size_t>(HeadBytes(g, f, capacity)), 0x55),
        got(expected.size(), 0xaa);
    EncodeBlockScalar(g, f, clip, x[0].data(), x[1].data(), row_stride, tokens, expected.data(), capacity);
    EncodeBlock(g, f, clip, x[0].data(), x[1].data(), row_stride, tokens, got.data(), capacity);
    ASSERT_EQ(got, expected) << Name(g.codec) << " " << Name(f) << ", head dim " << g.head_dim << ", tokens "
                             << tokens << ", capacity " << capacity << ", round " << round;
    for (const Side side : {Side::kK, Side::kV}) {
      std::vector<float> a(static_cast<size_t>(tokens * g.head_dim)), b(a.size());
      DecodeSideScalar(g, f, side, expected.data(), tokens, a.data(), capacity);
      DecodeSide(g, f, side, got.data(), tokens, b.data(), capacity);
      ASSERT_EQ(std::memcmp(a.data(), b.data(), a.size() * sizeof(float)), 0)
          << Name(g.codec) << " " << Name(f) << ", tokens " << tokens << ", round " << round;
    }
  }
}

TEST_P(KvCodecOracle, TransformsToTheSameBits) {
  std::mt19937 rng(2);
  for (const int head_dim : {64, 128}) {
    for (const int count : {1, 3, 300}) {
      std::vector<float> expected;
      for (int i = 0; i < count * head_dim; ++i) {
        expected.push_back(std::ldexp(static_cast<float>(rng()) - 2e9f, static_cast<int>(rng() % 60) - 60));
      }
      std::vector<float> got = expected;
      for (int i = 0; i < count; ++i) HadamardScalar(expected.data() + i * head_dim, head_dim);
      Hadamard(got.data(), count, head_dim);
      ASSERT_EQ(std::memcmp(got.data(), expected.data(), got.size() * sizeof(float)), 0) << head_dim;
    }
  }
}

TEST_P(KvCodecOracle, RoundsToTheSameBf16) {
  std::mt19937 rng(3);
  std::vector<float> x, got(4096);
  for (size_t i = 0; i < got.size(); ++i) x.push_back(std::bit_cast<float>(static_cast<uint32_t>(rng())));
  x[5] = std::numeric_limits<float>::infinity();
  x[6] = std::numeric_limits<float>::max();
  x[7] = std::bit_cast<float>(0x3f808000u);  // ties to even
  x[8] = std::bit_cast<float>(0x3f818000u);
  RoundToBf16(x.data(), static_cast<int64_t>(x.size()), got.data());
  for (size_t i = 0; i < x.size(); ++i) {
    const float expected = Bf16ToFloat(FloatToBf16(x[i]));
    ASSERT_EQ(std::bit_cast<uint32_t>(got[i]), std::bit_cast<uint32_t>(expected)) << i;
  }
}

}  // namespace
}  // namespace triaxial
