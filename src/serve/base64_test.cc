#include "serve/base64.h"

#include <gtest/gtest.h>

#include <random>

namespace triaxial {
namespace {

// RFC 4648, section 10.
TEST(Base64, PublishedVectors) {
  const std::pair<const char*, const char*> kVectors[] = {{"", ""},
                                                          {"f", "Zg=="},
                                                          {"fo", "Zm8="},
                                                          {"foo", "Zm9v"},
                                                          {"foob", "Zm9vYg=="},
                                                          {"fooba", "Zm9vYmE="},
                                                          {"foobar", "Zm9vYmFy"}};
  for (const auto& [plain, encoded] : kVectors) {
    EXPECT_EQ(EncodeBase64(plain), encoded);
    EXPECT_EQ(DecodeBase64(encoded), plain);
  }
}

TEST(Base64, LenientWhereClientsDiffer) {
  EXPECT_EQ(DecodeBase64("Zm9vYg"), "foob");             // no padding
  EXPECT_EQ(DecodeBase64("Zm9v\r\n YmFy\n"), "foobar");  // wrapped lines
  EXPECT_EQ(DecodeBase64("_-8"), DecodeBase64("/+8="));  // URL-safe alphabet
}

TEST(Base64, RefusesWhatIsMalformed) {
  for (const char* text : {"A", "AAAAA", "AA=A", "AA*A", "====", "AA===", "\xff\xff\xff\xff"}) {
    EXPECT_FALSE(DecodeBase64(text).has_value()) << text;
  }
}

TEST(Base64, RoundTripsRandomBytes) {
  std::mt19937 random(1);
  for (int round = 0; round < 200; ++round) {
    std::string bytes(random() % 300, '\0');
    for (char& c : bytes) c = static_cast<char>(random());
    EXPECT_EQ(DecodeBase64(EncodeBase64(bytes)), bytes);
  }
}

}  // namespace
}  // namespace triaxial
