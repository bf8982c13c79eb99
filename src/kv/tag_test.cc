#include "kv/tag.h"

#include <gtest/gtest.h>

#include <set>
#include <string>

namespace triaxial {
namespace {

TEST(TagTest, EveryIndexIsOneTagWithItsOwnName) {
  std::set<std::string> names;
  for (int i = 0; i < kTags; ++i) {
    const Tag tag = Tag::FromIndex(i);
    EXPECT_EQ(tag.index(), i);
    names.insert(Name(tag));
  }
  EXPECT_EQ(names.size(), 56u);
  EXPECT_EQ(Name(Tag{Temporal::kCurrent, Modal::kText, Semantic::kUser}), "current/text/user");
  EXPECT_EQ(Name(Tag{Temporal::kM1, Modal::kImage, Semantic::kObs}), "m1/image/obs");
  EXPECT_EQ(Name(Tag{Temporal::kOlder, Modal::kText, Semantic::kToolCall}), "older/text/tool_call");
}

TEST(TagTest, AgeCountsTurnsAndStopsAtOlder) {
  EXPECT_EQ(Age(7, 7), Temporal::kCurrent);
  EXPECT_EQ(Age(6, 7), Temporal::kM1);
  EXPECT_EQ(Age(5, 7), Temporal::kM2);
  EXPECT_EQ(Age(4, 7), Temporal::kOlder);
  EXPECT_EQ(Age(0, 1000), Temporal::kOlder);
}

TEST(TagTest, TokensTakeTheirSpansTagAndAgeFromTheLastSpan) {
  const std::vector<TagSpan> spans = {
      {.begin = 0, .end = 3, .message = 0, .turn = 0, .modal = Modal::kText, .semantic = Semantic::kInst},
      {.begin = 3, .end = 5, .message = 1, .turn = 1, .modal = Modal::kImage, .semantic = Semantic::kObs},
      {.begin = 5, .end = 6, .message = -1, .turn = 3, .modal = Modal::kText, .semantic = Semantic::kDelim}};
  const std::vector<Tag> tags = TagTokens(spans, 6);
  ASSERT_EQ(tags.size(), 6u);
  EXPECT_EQ(Name(tags[0]), "older/text/inst");
  EXPECT_EQ(Name(tags[2]), "older/text/inst");
  EXPECT_EQ(Name(tags[3]), "m2/image/obs");
  EXPECT_EQ(Name(tags[4]), "m2/image/obs");
  EXPECT_EQ(Name(tags[5]), "current/text/delim");
  EXPECT_TRUE(TagTokens({}, 0).empty());
}

TEST(TagDeathTest, SpansWithAGapAreOurBug) {
  EXPECT_DEATH(TagTokens({{.begin = 1, .end = 2}}, 2), "span.begin");
  EXPECT_DEATH(TagTokens({{.begin = 0, .end = 1}}, 2), "tokens");
}

}  // namespace
}  // namespace triaxial
