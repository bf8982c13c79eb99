#include "kv/codec.h"

#include <gtest/gtest.h>

#include <array>
#include <cmath>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "base/float16.h"

namespace triaxial {
namespace {

constexpr std::array<Format, kFormats> kAllFormats = {Format::kK2V2, Format::kK4V2, Format::kK4V4,
                                                      Format::kFp8, Format::kBf16};

std::vector<KvGeometry> AllGeometries() {
  std::vector<KvGeometry> all;
  for (const int head_dim : {64, 128}) {
    for (const Codec codec : {Codec::kRotated, Codec::kPaper}) all.push_back({1, 1, head_dim, codec});
  }
  return all;
}

float MetaOf(const KvGeometry& g, Side side, int bits, const uint8_t* side_bytes, int token, int channel,
             bool minimum) {
  const int index = PlaceOfMeta(g, side, bits, token, channel) + (minimum ? MetaGroups(g, bits) : 0);
  const uint8_t* p = side_bytes + CodeBytes(g, bits) + 2 * index;
  return Fp16ToFloat(static_cast<fp16_t>(p[0] | p[1] << 8));
}

TEST(Format, NamesRoundTrip) {
  for (const Format f : kAllFormats) EXPECT_EQ(ParseFormat(Name(f)), f);
  EXPECT_EQ(Name(Format::kK4V2), "k4v2");
  EXPECT_FALSE(ParseFormat("k3v3").has_value());
  for (const Codec c : {Codec::kRotated, Codec::kPaper}) EXPECT_EQ(ParseCodec(Name(c)), c);
  EXPECT_FALSE(ParseCodec("").has_value());
}

TEST(Format, EffectiveBitsArePublishedOnes) {
  const KvGeometry rotated{1, 1, 128, Codec::kRotated}, paper{1, 1, 128, Codec::kPaper};
  EXPECT_EQ(EffectiveBits(rotated, Format::kK2V2), 2.25);
  EXPECT_EQ(EffectiveBits(rotated, Format::kK4V2), 3.25);
  EXPECT_EQ(EffectiveBits(rotated, Format::kK4V4), 4.25);
  EXPECT_EQ(EffectiveBits(rotated, Format::kFp8), 8.25);
  EXPECT_EQ(EffectiveBits(rotated, Format::kBf16), 16.0);
  EXPECT_EQ(EffectiveBits(paper, Format::kK2V2), 3.0);
  EXPECT_EQ(EffectiveBits(paper, Format::kK4V4), 5.0);
  EXPECT_EQ(EffectiveBits(paper, Format::kFp8), 8.25);
  EXPECT_EQ(UnitsOf(rotated, Format::kK4V2), 26);
  EXPECT_EQ(UnitsOf(rotated, Format::kK4V4), 34);
  EXPECT_EQ(UnitsOf(rotated, Format::kBf16), 128);
}

TEST(Format, ATailTakesAQuarterPerSixteenTokens) {
  for (const KvGeometry& g : AllGeometries()) {
    for (int capacity = 16; capacity <= 64; capacity += 16) {
      EXPECT_EQ(UnitsOf(g, Format::kBf16, capacity) * 64, UnitsOf(g, Format::kBf16) * capacity);
      EXPECT_EQ(HeadBytes(g, Format::kBf16, capacity), UnitsOf(g, Format::kBf16, capacity) * kUnitBytes);
      EXPECT_EQ(UnitsOf(g, Format::kK2V2, capacity), UnitsOf(g, Format::kK2V2));
    }
  }
  const KvGeometry g{36, 8, 128, Codec::kRotated};
  EXPECT_EQ(UnitsOf(g, Format::kBf16, 16), 32);
  EXPECT_EQ(BlockBytes(g, Format::kBf16, 16), 36 * 8 * 32 * 256);
}

TEST(Format, EveryElementHasItsOwnPlace) {
  for (const int head_dim : {64, 128}) {
    const KvGeometry g{1, 1, head_dim, Codec::kRotated};
    for (const Side side : {Side::kK, Side::kV}) {
      const int depths = side == Side::kK ? head_dim : kBlockTokens;
      const int lanes = side == Side::kK ? kBlockTokens : head_dim;
      for (const int bits : {2, 4, 8, 16}) {
        std::vector<int> used(static_cast<size_t>(CodeBytes(g, bits)) * 8);
        for (int d = 0; d < depths; ++d) {
          for (int l = 0; l < lanes; ++l) {
            const CodePlace place =
                bits == 16 ? CodePlace{2 * PlaceOfBf16(d, l, lanes), 0} : PlaceOfCode(d, l, lanes, bits);
            for (int b = 0; b < bits; ++b) ++used.at(static_cast<size_t>(place.byte * 8 + place.shift + b));
          }
        }
        for (const int times : used) ASSERT_EQ(times, 1);
      }
    }
  }
}

// Random inputs of many kinds, one kind per test parameter.
enum class Kind { kNormal, kOutlierChannels, kConstant, kZero, kSubnormal, kHuge, kMixed };
constexpr std::array<Kind, 7> kKinds = {Kind::kNormal, Kind::kOutlierChannels, Kind::kConstant,
                                        Kind::kZero,   Kind::kSubnormal,       Kind::kHuge,
                                        Kind::kMixed};

float Draw(Kind kind, int channel, std::mt19937& rng) {
  std::normal_distribution<float> normal;
  switch (kind) {
    case Kind::kNormal:
      return normal(rng);
    case Kind::kOutlierChannels:
      return normal(rng) * (channel % 37 == 5 ? 300.0f : 1.0f) + (channel % 11 == 0 ? 20.0f : 0.0f);
    case Kind::kConstant:
      return 3.14159f;
    case Kind::kZero:
      return rng() % 2 == 0 ? 0.0f : -0.0f;
    case Kind::kSubnormal:
      return normal(rng) * 1e-7f;
    case Kind::kHuge:
      return normal(rng) * 1e30f;
    case Kind::kMixed:
      return std::ldexp(normal(rng), static_cast<int>(rng() % 60) - 40);
  }
  return 0;
}

// Half the distance of E4M3 numbers about |x| / scale, in units of the value.
double HalfStepOfFp8(double target, double scale) {
  const double binade = std::max(std::exp2(std::floor(std::log2(std::fabs(target) / scale))), 0x1p-6);
  return 0x1p-4 * binade * scale;
}

// A decoded value lies within half a step of what was stored, unless it lies outside the range that the FP16
// scale and minimum span; then it is the nearer end.
TEST(Codec, DecodesWithinHalfAStep) {
  std::mt19937 rng(7);
  for (const KvGeometry& g : AllGeometries()) {
    for (const Format f : kAllFormats) {
      for (const Kind kind : kKinds) {
        const int tokens = kind == Kind::kNormal ? 64 : static_cast<int>(rng() % 64) + 1;
        const ClipRatios clip{kind == Kind::kConstant ? 1.0f : 0.9f, 0.8f};
        std::vector<float> x[2], decoded(static_cast<size_t>(tokens * g.head_dim));
        for (auto& side : x) {
          for (int i = 0; i < tokens * g.head_dim; ++i) side.push_back(Draw(kind, i % g.head_dim, rng));
        }
        std::vector<uint8_t> block(static_cast<size_t>(HeadBytes(g, f)), 0xee);
        EncodeBlockScalar(g, f, clip, x[0].data(), x[1].data(), g.head_dim, tokens, block.data());
        for (const Side side : {Side::kK, Side::kV}) {
          SCOPED_TRACE(std::string(Name(g.codec)) + " " + std::string(Name(f)) + " dim " +
                       std::to_string(g.head_dim) + " kind " + std::to_string(static_cast<int>(kind)));
          const int bits = Bits(f, side);
          DecodeSideScalar(g, f, side, block.data(), tokens, decoded.data());
          const uint8_t* bytes = block.data() + SideOffset(g, f, side);
          for (int i = 0; i < tokens * g.head_dim; ++i) {
            const float given = x[static_cast<int>(side)][static_cast<size_t>(i)];
            const float got = decoded[static_cast<size_t>(i)];
            if (bits == 16) {
              ASSERT_EQ(got, Bf16ToFloat(FloatToBf16(given)));
              continue;
            }
            const float scale = MetaOf(g, side, bits, bytes, i / g.head_dim, i % g.head_dim, false);
            const float lowest = MetaOf(g, side, bits, bytes, i / g.head_dim, i % g.head_dim, true);
            ASSERT_TRUE(std::isfinite(scale) && std::isfinite(lowest) && scale >= 0.0f);
            if (bits == 8) {
              const double clean = std::isnan(given) ? 0.0 : static_cast<double>(given);
              const double target = std::clamp(clean, -448.0 * scale, 448.0 * scale);
              ASSERT_EQ(lowest, 0.0f);
              ASSERT_LE(std::fabs(got - target), scale == 0 ? 0 : HalfStepOfFp8(target, scale) * (1 + 1e-5))
                  << "element " << i << ": " << given;
              continue;
            }
            const double highest =
                static_cast<double>(lowest) + static_cast<double>(scale) * ((1 << bits) - 1);
            const double target = std::clamp<double>(given, lowest, highest);
            ASSERT_LE(std::fabs(got - target), 0.5 * scale * (1 + 1e-5) + 1e-6 * std::fabs(target))
                << "element " << i << ": " << given;
          }
        }
      }
    }
  }
}

// Unless clipped, the stored range covers the values up to the rounding of scale and minimum.
TEST(Codec, UnclippedRangeCoversTheValues) {
  std::mt19937 rng(11);
  for (const KvGeometry& g : AllGeometries()) {
    for (const Format f : {Format::kK2V2, Format::kK4V4}) {
      std::vector<float> x;
      for (int i = 0; i < 64 * g.head_dim; ++i)
        x.push_back(Draw(Kind::kOutlierChannels, i % g.head_dim, rng));
      std::vector<uint8_t> block(static_cast<size_t>(HeadBytes(g, f)));
      EncodeBlockScalar(g, f, {}, x.data(), x.data(), g.head_dim, 64, block.data());
      const int bits = Bits(f, Side::kK);
      for (int i = 0; i < 64 * g.head_dim; ++i) {
        const float scale = MetaOf(g, Side::kK, bits, block.data(), i / g.head_dim, i % g.head_dim, false);
        const float lowest = MetaOf(g, Side::kK, bits, block.data(), i / g.head_dim, i % g.head_dim, true);
        const float range = scale * static_cast<float>((1 << bits) - 1);
        const float slack = 0x1p-10f * (std::fabs(lowest) + range);
        ASSERT_GE(x[static_cast<size_t>(i)], lowest - slack);
        ASSERT_LE(x[static_cast<size_t>(i)], lowest + range + slack);
      }
    }
  }
}

TEST(Codec, ClipShrinksTheRangeAboutItsCentre) {
  const KvGeometry g{1, 1, 64, Codec::kRotated};
  std::vector<float> x(64, 0.0f);
  x[3] = -8.0f;
  x[40] = 24.0f;
  std::vector<uint8_t> block(static_cast<size_t>(HeadBytes(g, Format::kK4V2)));
  EncodeBlockScalar(g, Format::kK4V2, {1.0f, 0.75f}, x.data(), x.data(), 64, 1, block.data());
  const uint8_t* v = block.data() + SideBytes(g, 4);
  EXPECT_EQ(MetaOf(g, Side::kV, 2, v, 0, 0, false), 8.0f);  // 0.75 * 32 / 3
  EXPECT_EQ(MetaOf(g, Side::kV, 2, v, 0, 0, true), -4.0f);  // -8 + 0.125 * 32
  std::vector<float> decoded(64);
  DecodeSideScalar(g, Format::kK4V2, Side::kV, block.data(), 1, decoded.data());
  EXPECT_EQ(decoded[3], -4.0f);
  EXPECT_EQ(decoded[40], 20.0f);
  EXPECT_EQ(decoded[0], -4.0f);  // 0 is half a step above: ties to the even code
  EXPECT_EQ(MetaOf(g, Side::kK, 4, block.data(), 0, 0, true), -8.0f);  // 4-bit sides are not clipped
}

// The levels of a side are where its clip ratio puts them; its gain decides which one stands for a value.
TEST(Codec, GainAmplifiesAboutTheCentre) {
  const KvGeometry g{1, 1, 64, Codec::kRotated};
  std::vector<float> x(64, 4.0f);  // nearest: level 0 at 0, 8, 16 and 24, a tie
  x[3] = 0.0f;
  x[40] = 24.0f;
  x[41] = 6.0f;   // level 1
  x[42] = 18.0f;  // level 2; amplified from the centre, 12, to 21: level 3
  x[43] = 14.0f;  // to 15
  std::vector<uint8_t> block(static_cast<size_t>(HeadBytes(g, Format::kK2V2)));
  EncodeBlockScalar(g, Format::kK2V2, {1.0f, 1.0f, 1.0f, 1.5f}, x.data(), x.data(), 64, 1, block.data());
  std::vector<float> k(64), v(64);
  DecodeSideScalar(g, Format::kK2V2, Side::kK, block.data(), 1, k.data());
  DecodeSideScalar(g, Format::kK2V2, Side::kV, block.data(), 1, v.data());
  EXPECT_EQ(MetaOf(g, Side::kV, 2, block.data() + SideBytes(g, 2), 0, 0, false), 8.0f);
  EXPECT_EQ(MetaOf(g, Side::kV, 2, block.data() + SideBytes(g, 2), 0, 0, true), 0.0f);
  EXPECT_EQ((std::array{k[3], k[40], k[41], k[42], k[43]}), (std::array{0.0f, 24.0f, 8.0f, 16.0f, 16.0f}));
  EXPECT_EQ((std::array{v[3], v[40], v[41], v[42], v[43]}), (std::array{0.0f, 24.0f, 0.0f, 24.0f, 16.0f}));
}

TEST(Codec, PaperCodecIsNotClipped) {
  const KvGeometry g{1, 1, 64, Codec::kPaper};
  std::mt19937 rng(3);
  std::vector<float> x;
  for (int i = 0; i < 64 * 64; ++i) x.push_back(Draw(Kind::kNormal, 0, rng));
  std::vector<uint8_t> whole(static_cast<size_t>(HeadBytes(g, Format::kK2V2))), clipped(whole.size());
  EncodeBlockScalar(g, Format::kK2V2, {}, x.data(), x.data(), 64, 64, whole.data());
  EncodeBlockScalar(g, Format::kK2V2, {0.5f, 0.5f, 2.0f, 2.0f}, x.data(), x.data(), 64, 64, clipped.data());
  EXPECT_EQ(whole, clipped);
}

TEST(Codec, HostileValuesGiveFiniteMetadata) {
  const float inf = std::numeric_limits<float>::infinity();
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (const KvGeometry& g : AllGeometries()) {
    for (const Format f : {Format::kK2V2, Format::kK4V2, Format::kK4V4, Format::kFp8}) {
      std::vector<float> x(static_cast<size_t>(64 * g.head_dim), nan);
      for (size_t i = 0; i < x.size(); i += 3) x[i] = i % 2 == 0 ? inf : -inf;
      for (size_t i = 0; i < x.size(); i += 7) x[i] = 1e30f;
      std::vector<float> decoded(x.size());
      std::vector<uint8_t> block(static_cast<size_t>(HeadBytes(g, f)));
      EncodeBlockScalar(g, f, {0.9f, 0.9f}, x.data(), x.data(), g.head_dim, 64, block.data());
      for (const Side side : {Side::kK, Side::kV}) {
        DecodeSideScalar(g, f, side, block.data(), 64, decoded.data());
        for (const float value : decoded) ASSERT_LE(std::fabs(value), 65536.0f);
      }
    }
  }
  // What saturates keeps its sign and the largest magnitude.
  const KvGeometry g{1, 1, 64, Codec::kRotated};
  std::vector<float> x(64, nan), decoded(64);
  x[1] = 1e30f;
  x[2] = -inf;
  std::vector<uint8_t> block(static_cast<size_t>(HeadBytes(g, Format::kK4V4)));
  EncodeBlockScalar(g, Format::kK4V4, {}, x.data(), x.data(), 64, 1, block.data());
  DecodeSideScalar(g, Format::kK4V4, Side::kK, block.data(), 1, decoded.data());
  EXPECT_NEAR(decoded[1], 65504.0f, 64.0f);
  EXPECT_EQ(decoded[2], -65504.0f);
  EXPECT_NEAR(decoded[0], 0.0f, 4400.0f);
}

// The second example of docs/kv-format.md: one token, values known by hand.
TEST(Codec, Fp8ExampleOfTheDocument) {
  const KvGeometry g{1, 1, 64, Codec::kPaper};
  std::vector<float> x(64, 0.0f);
  x[0] = -896.0f;   // the largest: scale 2, code -448
  x[1] = 1.0f;      // 0.5
  x[2] = 2.125f;    // 1.0625, halfway from 1 to 1.125: ties to even
  x[3] = 2.375f;    // 1.1875, halfway from 1.125 to 1.25
  x[4] = 0x1p-8f;   // the least code, 2^-9
  x[5] = -0x1p-9f;  // half of it: ties to even, minus zero
  std::vector<uint8_t> block(static_cast<size_t>(HeadBytes(g, Format::kFp8)), 0xee);
  EncodeBlockScalar(g, Format::kFp8, {}, x.data(), x.data(), 64, 1, block.data());
  ASSERT_EQ(block.size(), 2u * (4096 + 256));
  const auto byte = [&](size_t at) { return int{block[at]}; };
  EXPECT_EQ(byte(0), 0xfe);
  EXPECT_EQ(byte(1), 0x30);
  EXPECT_EQ(byte(2), 0x38);
  EXPECT_EQ(byte(3), 0x3a);
  EXPECT_EQ(byte(256), 0x01);
  EXPECT_EQ(byte(257), 0x80);
  EXPECT_EQ(byte(4096) | byte(4097) << 8, 0x4000);  // scale 2
  EXPECT_EQ(byte(4096 + 128), 0);                   // no minimum
  EXPECT_EQ(byte(4352), 0xfe);                      // V: channels 0, 1, ... of tokens 0 to 3
  EXPECT_EQ(byte(4356), 0x30);
  std::vector<float> decoded(64);
  DecodeSideScalar(g, Format::kFp8, Side::kV, block.data(), 1, decoded.data());
  EXPECT_EQ(decoded[0], -896.0f);
  EXPECT_EQ(decoded[2], 2.0f);
  EXPECT_EQ(decoded[3], 2.5f);
  EXPECT_TRUE(decoded[5] == 0.0f && std::signbit(decoded[5]));
}

// The worked example of docs/kv-format.md, byte by byte.
TEST(Codec, WorkedExampleOfTheDocument) {
  const KvGeometry g{1, 1, 64, Codec::kRotated};
  std::vector<float> k, v;
  for (int t = 0; t < 18; ++t) {
    for (int c = 0; c < 64; ++c) {
      k.push_back(static_cast<float>((c + t) % 4));
      v.push_back(-1.0f + 0.5f * static_cast<float>((c + c / 16 + t) % 4));
    }
  }
  std::vector<uint8_t> block(static_cast<size_t>(HeadBytes(g, Format::kK2V2)));
  EncodeBlockScalar(g, Format::kK2V2, {}, k.data(), v.data(), 64, 18, block.data());
  const auto bytes = [&](size_t at, size_t n) {
    return std::vector<int>(block.begin() + static_cast<long>(at), block.begin() + static_cast<long>(at + n));
  };
  using Bytes = std::vector<int>;
  ASSERT_EQ(block.size(), 2560u);
  EXPECT_EQ(bytes(0, 8), (Bytes{0x00, 0x05, 0x0a, 0x0f, 0x05, 0x0a, 0x0f, 0x00}));  // tokens 0 16, 1 17
  EXPECT_EQ(bytes(8, 4), (Bytes{0x02, 0x03, 0x00, 0x01}));                          // token 2
  EXPECT_EQ(bytes(64, 4), (Bytes{0x00, 0x05, 0x0a, 0x0f}));                         // channels 4 to 7
  EXPECT_EQ(bytes(1024, 2), (Bytes{0x00, 0x3c}));                                   // K's scale of token 0
  EXPECT_EQ(bytes(1024 + 34, 4), (Bytes{0x00, 0x3c, 0x00, 0x00}));                  // of tokens 17 and 18
  EXPECT_EQ(bytes(1152, 2), (Bytes{0x00, 0x00}));                                   // K's minimum of token 0
  EXPECT_EQ(bytes(1280, 8), (Bytes{0xe4, 0x39, 0x4e, 0x93, 0x39, 0x4e, 0x93, 0xe4}));
  EXPECT_EQ(bytes(1280 + 4 * 64, 4), (Bytes{0xe4, 0x39, 0x00, 0x00}));  // tokens 16 and 17 of channel 0
  EXPECT_EQ(bytes(1280 + 1024, 2), (Bytes{0x00, 0x38}));                // V's scale of token 0
  EXPECT_EQ(bytes(1280 + 1152, 2), (Bytes{0x00, 0xbc}));                // V's minimum of token 0
}

TEST(Codec, UnwrittenTokensAreZero) {
  for (const KvGeometry& g : AllGeometries()) {
    for (const Format f : kAllFormats) {
      const int tokens = 37;
      std::vector<float> x(static_cast<size_t>(64 * g.head_dim), 0.0f);
      for (size_t i = 0; i < x.size(); ++i) x[i] = static_cast<float>(i % 13) - 5.0f;
      std::vector<uint8_t> partial(static_cast<size_t>(HeadBytes(g, f)), 0xff);
      EncodeBlockScalar(g, f, {}, x.data(), x.data(), g.head_dim, tokens, partial.data());
      for (const Side side : {Side::kK, Side::kV}) {
        const int bits = Bits(f, side);
        const uint8_t* bytes = partial.data() + SideOffset(g, f, side);
        for (int t = tokens; t < 64; ++t) {
          for (int c = 0; c < g.head_dim; ++c) {
            const int depth = side == Side::kK ? c : t, lane = side == Side::kK ? t : c;
            const int lanes = side == Side::kK ? 64 : g.head_dim;
            if (bits == 16) {
              const int place = PlaceOfBf16(depth, lane, lanes);
              ASSERT_EQ(bytes[2 * place] | bytes[2 * place + 1], 0);
              continue;
            }
            const CodePlace place = PlaceOfCode(depth, lane, lanes, bits);
            ASSERT_EQ(bytes[place.byte] >> place.shift & ((1 << bits) - 1), 0);
            const bool shared = g.codec == Codec::kPaper && side == Side::kK && bits == 2;
            if (!shared) {  // groups along tokens hold metadata of the tokens that exist
              ASSERT_EQ(MetaOf(g, side, bits, bytes, t, c, false), 0.0f);
              ASSERT_EQ(MetaOf(g, side, bits, bytes, t, c, true), 0.0f);
            }
          }
        }
      }
    }
  }
}

// A group along tokens must not see tokens that do not exist (as zeros they would stretch its range).
TEST(Codec, GroupsAlongTokensHoldExistingTokensOnly) {
  const KvGeometry g{1, 1, 64, Codec::kPaper};
  std::vector<float> x(64 * 64, 0.0f);
  for (int t = 0; t < 40; ++t) {
    for (int c = 0; c < 64; ++c) x[static_cast<size_t>(t * 64 + c)] = t % 2 == 0 ? 5.0f : 8.0f;
  }
  std::vector<uint8_t> block(static_cast<size_t>(HeadBytes(g, Format::kK2V2)));
  EncodeBlockScalar(g, Format::kK2V2, {}, x.data(), x.data(), 64, 40, block.data());
  for (const int t : {0, 39}) {
    EXPECT_EQ(MetaOf(g, Side::kK, 2, block.data(), t, 9, false), 1.0f);
    EXPECT_EQ(MetaOf(g, Side::kK, 2, block.data(), t, 9, true), 5.0f);
  }
  EncodeBlockScalar(g, Format::kK2V2, {}, x.data(), x.data(), 64, 20, block.data());
  EXPECT_EQ(MetaOf(g, Side::kK, 2, block.data(), 32, 9, true), 0.0f);  // no token of the second group exists
}

TEST(Hadamard, IsTheOrthonormalMatrix) {
  for (const int n : {64, 128}) {
    for (int basis = 0; basis < n; basis += 13) {
      std::vector<float> x(static_cast<size_t>(n), 0.0f);
      x[static_cast<size_t>(basis)] = 1.0f;
      HadamardScalar(x.data(), n);
      for (int i = 0; i < n; ++i) {
        const double sign = __builtin_popcount(static_cast<unsigned>(i & basis)) % 2 == 0 ? 1 : -1;
        ASSERT_NEAR(x[static_cast<size_t>(i)], sign / std::sqrt(n), 1e-7);
      }
    }
  }
}

TEST(Hadamard, IsItsOwnInverseAndKeepsTheNorm) {
  std::mt19937 rng(5);
  for (const int n : {64, 128}) {
    std::vector<float> x;
    for (int i = 0; i < n; ++i) x.push_back(Draw(Kind::kOutlierChannels, i, rng));
    std::vector<float> y = x;
    double before = 0, after = 0;
    for (const float value : x) before += double{value} * value;
    HadamardScalar(y.data(), n);
    for (const float value : y) after += double{value} * value;
    EXPECT_NEAR(after / before, 1.0, 1e-5);
    HadamardScalar(y.data(), n);
    for (size_t i = 0; i < x.size(); ++i) EXPECT_NEAR(y[i], x[i], 1e-5 * std::sqrt(before));
  }
}

}  // namespace
}  // namespace triaxial
