#include "base/sha256.h"

#include <gtest/gtest.h>

#include <string>
#include <string_view>

namespace triaxial {
namespace {

std::span<const uint8_t> Bytes(std::string_view text) {
  return {reinterpret_cast<const uint8_t*>(text.data()), text.size()};
}

std::string Hex(const Sha256Digest& digest) {
  std::string text;
  for (const uint8_t byte : digest) {
    text += "0123456789abcdef"[byte >> 4];
    text += "0123456789abcdef"[byte & 15];
  }
  return text;
}

// The examples of FIPS 180-2 and the empty message.
TEST(Sha256, PublishedDigests) {
  EXPECT_EQ(Hex(Sha256Of({})), "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855");
  EXPECT_EQ(Hex(Sha256Of(Bytes("abc"))), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
  EXPECT_EQ(Hex(Sha256Of(Bytes("abcdbcdecdefdefgefghfghighijhijkijkljklmklmnlmnomnopnopq"))),
            "248d6a61d20638b8e5c026930c3e6039a33ce45964ff2167f6ecedd419db06c1");
  EXPECT_EQ(Hex(Sha256Of(Bytes(std::string(1000000, 'a')))),
            "cdc76e5c9914fb9281a1c7e284d73e67f1809a48a497200e046d39ccc7112cd0");
}

TEST(Sha256, PartsGiveTheDigestOfTheWhole) {
  const std::string text(1000, 'x');
  for (const size_t part : {size_t{1}, size_t{63}, size_t{64}, size_t{999}, size_t{1000}}) {
    Sha256 hash;
    for (size_t i = 0; i < text.size(); i += part) hash.Update(Bytes(std::string_view(text).substr(i, part)));
    EXPECT_EQ(hash.Finish(), Sha256Of(Bytes(text))) << part;
  }
  Sha256 nothing;
  EXPECT_EQ(nothing.Finish(), Sha256Of({}));
}

}  // namespace
}  // namespace triaxial
