#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>

#include "base/float16.h"
#include "base/float8.h"
#include "base/json.h"

namespace triaxial {
namespace {

// The nearest FP16 found by search: an implementation that shares nothing with the one under test.
float NearestFp16(float x) {
  float best = 0;
  for (uint32_t h = 0; h < 0x7c00; ++h) {
    const int exponent = static_cast<int>(h >> 10);
    const float mantissa = static_cast<float>(h & 0x3ff);
    const float v = exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
    if (std::fabs(v - x) < std::fabs(best - x) || (std::fabs(v - x) == std::fabs(best - x) && h % 2 == 0))
      best = v;
  }
  return best;
}

TEST(Float16, Fp16RoundTripsEveryFiniteValue) {
  for (uint32_t h = 0; h < 0x10000; ++h) {
    if ((h & 0x7c00) == 0x7c00) continue;
    EXPECT_EQ(FloatToFp16(Fp16ToFloat(static_cast<fp16_t>(h))), h);
  }
}

TEST(Float16, Fp16RoundsToNearestEven) {
  for (const float x :
       {0.1f, 1.0f / 3, 1e-5f, 2.9802322e-8f, 3e-8f, 8.9406967e-8f, 6.1e-5f, 2049.0f, 2051.0f, 65503.0f}) {
    EXPECT_EQ(Fp16ToFloat(FloatToFp16(x)), NearestFp16(x)) << x;
    EXPECT_EQ(Fp16ToFloat(FloatToFp16(-x)), -NearestFp16(x)) << x;
  }
  EXPECT_TRUE(std::isinf(Fp16ToFloat(FloatToFp16(65520.0f))));
  EXPECT_TRUE(std::isnan(Fp16ToFloat(FloatToFp16(std::numeric_limits<float>::quiet_NaN()))));
}

TEST(Float16, Bf16RoundsToNearestEvenAndKeepsNaN) {
  EXPECT_EQ(FloatToBf16(1.00390625f), 0x3f80);  // halfway: to even
  EXPECT_EQ(FloatToBf16(1.01171875f), 0x3f82);  // halfway: to even
  EXPECT_EQ(FloatToBf16(1.0040f), 0x3f81);
  EXPECT_TRUE(std::isnan(Bf16ToFloat(FloatToBf16(std::bit_cast<float>(0x7f800001u)))));
}

TEST(Float8, E4m3RoundTripsEveryNumber) {
  EXPECT_EQ(E4m3ToFloat(0x7e), 448.0f);
  EXPECT_EQ(E4m3ToFloat(0x01), 0x1p-9f);
  EXPECT_EQ(E4m3ToFloat(0x08), 0x1p-6f);
  for (int x = 0; x < 256; ++x) {
    if ((x & 0x7f) == 0x7f) continue;  // NaN
    EXPECT_EQ(FloatToE4m3(E4m3ToFloat(static_cast<uint8_t>(x))), x);
  }
}

TEST(Float8, E4m3RoundsToNearestEvenAndSaturates) {
  for (uint8_t x = 0; x < 0x7e; ++x) {
    const float low = E4m3ToFloat(x), high = E4m3ToFloat(static_cast<uint8_t>(x + 1));
    const float middle = (low + high) / 2;
    EXPECT_EQ(FloatToE4m3(std::nextafter(middle, 0.0f)), x);
    EXPECT_EQ(FloatToE4m3(std::nextafter(middle, 1000.0f)), x + 1);
    EXPECT_EQ(FloatToE4m3(middle), x % 2 == 0 ? x : x + 1);
    EXPECT_EQ(FloatToE4m3(-middle), (x % 2 == 0 ? x : x + 1) | 0x80);
  }
  for (const float x : {449.0f, 464.0f, 1e30f, std::numeric_limits<float>::infinity()}) {
    EXPECT_EQ(FloatToE4m3(x), 0x7e);
    EXPECT_EQ(FloatToE4m3(-x), 0xfe);
  }
  EXPECT_EQ(FloatToE4m3(1e-40f), 0x00);
}

TEST(Json, DumpsAsPython) {
  const auto json =
      ParseJson(R"({"b":[1,2.5,1e5,1e16,1.5e-7,true,null],"a":{"t":"é<&>\n\"/"},"e":{},"l":[]})", "test");
  ASSERT_TRUE(json.ok());
  EXPECT_EQ(
      DumpJsonLikePython(*json),
      R"({"b": [1, 2.5, 100000.0, 1e+16, 1.5e-07, true, null], "a": {"t": "é<&>\n\"/"}, "e": {}, "l": []})");
}

TEST(Json, RefusesWhatIsHostile) {
  EXPECT_FALSE(ParseJson(std::string(100000, '['), "deep").ok());
  EXPECT_FALSE(ParseJson(std::string(1000, '[') + std::string(1000, ']'), "deep").ok());
  EXPECT_TRUE(ParseJson(std::string(100, '[') + std::string(100, ']'), "shallow").ok());
  std::string many = "{\"a\":{";
  for (int i = 0; i < 2000; ++i) many += (i > 0 ? ",\"" : "\"") + std::to_string(i) + "\":0";
  EXPECT_NE(ParseJson(many + "}}", "body").status().message().find("more than 1024 keys"), std::string::npos);
  EXPECT_TRUE(ParseJson(many + "}}", "body", 2000).ok());
  EXPECT_FALSE(ParseJson("\"\xff\"", "utf8").ok());
  EXPECT_FALSE(ParseJson("{\"a\":1} x", "trailing").ok());
  const auto error = ParseJson("{\"a\":}", "the request body");
  EXPECT_NE(error.status().message().find("the request body is not valid JSON"), std::string::npos);
}

}  // namespace
}  // namespace triaxial
