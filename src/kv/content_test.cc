#include "kv/content.h"

#include <gtest/gtest.h>

#include <set>
#include <string>
#include <vector>

#include "kv/format.h"

namespace triaxial {
namespace {

std::string Hex(const BlockKey& key) {
  std::string text;
  for (const uint8_t byte : key.bytes) {
    text += "0123456789abcdef"[byte >> 4];
    text += "0123456789abcdef"[byte & 15];
  }
  return text;
}

// Computed by Python's hashlib from docs/kv-format.md, "Keys".
TEST(BlockKey, IsAsDocumented) {
  EXPECT_EQ(Hex(RootKey("")), "f3bc0a588eb7a2bb6553c5f4156acd3be95bb56ee3efeac16625e63dbcdb119a");
  EXPECT_EQ(Hex(RootKey("alice")), "ebbbce787fcbcf5664b56f1bfe1e69240aa12cc193dd74c100c0829502c4ec71");
  std::vector<ContentId> contents;
  for (int i = 0; i < 63; ++i) contents.push_back(ContentId::OfToken(100 + i));
  contents.push_back(ContentId::OfPicture(0x0123456789abcdef, 0xfedcba9876543210 & ~(uint64_t{1} << 63), 5));
  EXPECT_EQ(Hex(ChildKey(RootKey("alice"), contents)),
            "4c6f2d038cbd4707cc3980d993a165d4ec71da2cf92fb0693c0cbcbdfc267929");
  EXPECT_EQ(BlockKeyHash()(RootKey("")), 0xbba2b78e580abcf3u);
}

TEST(BlockKey, EverythingDecides) {
  const std::vector<ContentId> contents(kBlockTokens, ContentId::OfToken(7));
  const BlockKey root = RootKey("salt");
  std::set<std::string> keys = {Hex(root), Hex(RootKey("")), Hex(RootKey("salt2")),
                                Hex(RootKey(std::string(1, '\0')))};
  keys.insert(Hex(ChildKey(root, contents)));
  keys.insert(Hex(ChildKey(RootKey("salt2"), contents)));
  keys.insert(Hex(ChildKey(ChildKey(root, contents), contents)));  // the same tokens further on
  keys.insert(Hex(ChildKey(root, std::span(contents).first(63))));
  for (size_t i = 0; i < contents.size(); ++i) {
    for (const ContentId other : {ContentId::OfToken(8), ContentId{7, 1}, ContentId::OfPicture(7, 0, 0)}) {
      std::vector<ContentId> changed = contents;
      changed[i] = other;
      keys.insert(Hex(ChildKey(root, changed)));
    }
  }
  EXPECT_EQ(keys.size(), 8u + 3 * kBlockTokens);
}

// A tenant who may choose the salt must not reach a block of another.
TEST(BlockKey, NoSaltLooksLikeABlock) {
  const BlockKey parent = RootKey("victim");
  const std::vector<ContentId> contents(kBlockTokens, ContentId::OfToken(0));
  const std::string salt =
      std::string(reinterpret_cast<const char*>(parent.bytes.data()), parent.bytes.size()) +
      std::string(kBlockTokens * 16, '\0');
  EXPECT_FALSE(RootKey(salt) == ChildKey(parent, contents));
}

TEST(ContentId, PicturesAndTokensNeverMeet) {
  EXPECT_FALSE(ContentId::OfPicture(5, 0, 0) == ContentId::OfToken(5));
  EXPECT_FALSE(ContentId::OfPicture(5, 0, 0) == ContentId::OfPicture(5, 0, 1));
  EXPECT_TRUE(ContentId::OfPicture(5, 0, 1) == ContentId::OfPicture(5, 0, 1));
}

}  // namespace
}  // namespace triaxial
