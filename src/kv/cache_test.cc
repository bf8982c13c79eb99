#include "kv/cache.h"

#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "kv/policy.h"

namespace triaxial {
namespace {

// Units of a block: k2v2 18, k4v2 26, k4v4 34, bf16 128.
constexpr KvGeometry kGeometry{.num_layers = 2, .num_kv_heads = 4, .head_dim = 128};
constexpr Format k2 = Format::kK2V2, k42 = Format::kK4V2, k4 = Format::kK4V4, k16 = Format::kBf16;
constexpr int kUnits2 = 18, kUnits4 = 34, kUnits16 = 128, kUnitsTail = 32;

uint8_t TagOf(Format wish, int more) {
  return static_cast<uint8_t>(static_cast<int>(wish) + kFormats * more);
}
TagNeeds Needs(int recent_window = 0) {
  TagNeeds needs;
  for (size_t t = 0; t < kTags; ++t) needs.wish[t] = static_cast<Format>(t % kFormats);
  needs.recent_window = recent_window;
  return needs;
}

// Tokens that wish for a format; `more` only makes them count as another tag.
std::vector<KvToken> Tokens(int count, Format wish, int more = 0) {
  return std::vector<KvToken>(static_cast<size_t>(count), KvToken{{}, TagOf(wish, more)});
}

class KvCacheTest : public testing::Test {
 protected:
  // Appends and finishes the step; returns what the kernels had to do.
  KvAppend Step(SequenceId id, const std::vector<KvToken>& tokens) {
    const int64_t rows = cache_.RowsToAppend(id, tokens);
    const int64_t free = cache_.free_rows();
    KvAppend append;
    const Status status = cache_.Append(id, tokens, &append);
    EXPECT_TRUE(status.ok()) << status.message();
    int64_t left = 0;  // by conversions, which are in place
    for (const KvConvert& c : append.converts) left += UnitsOf(kGeometry, c.from) - UnitsOf(kGeometry, c.to);
    EXPECT_EQ(cache_.free_rows(), free - rows + left);
    Check();
    cache_.FinishStep();
    Check();
    return append;
  }
  void Check() {
    const Status status = cache_.CheckIntegrity();
    EXPECT_TRUE(status.ok()) << status.message();
  }
  std::string ViewOf(SequenceId id) {  // "k2v2:64 bf16:3"
    std::string text;
    for (const KvBlockRef& ref : cache_.View(id)) {
      text += (text.empty() ? "" : " ") + std::string(Name(ref.format)) + ":" + std::to_string(ref.tokens);
    }
    return text;
  }

  explicit KvCacheTest(int recent_window = 0) : cache_(kGeometry, 4000, Needs(recent_window)) {}
  KvCache cache_;
};

TEST_F(KvCacheTest, DecodeFillsATailThatGrowsThenCompletesAQuantizedBlock) {
  const SequenceId id = cache_.CreateSequence();
  EXPECT_EQ(cache_.free_rows(), 4000);
  uint32_t last_row = 0;
  for (int i = 0; i < 63; ++i) {
    const KvAppend append = Step(id, Tokens(1, k2));
    ASSERT_EQ(append.stores.size(), 1u);
    const KvStore& store = append.stores[0];
    EXPECT_EQ(store.format, k16);
    EXPECT_EQ(store.from_tail, i);
    EXPECT_EQ(store.rows, 1);
    EXPECT_EQ(store.capacity, (i / 16 + 1) * 16);
    if (i % 16 == 0 && i > 0) {
      EXPECT_EQ(store.tail_row, last_row) << "the tokens move along";
      EXPECT_EQ(store.tail_capacity, i);
      EXPECT_NE(store.unit_row, last_row);
    } else {
      EXPECT_EQ(store.unit_row, store.tail_row);
    }
    last_row = store.unit_row;
    EXPECT_EQ(cache_.free_rows(), 4000 - kUnitsTail * (i / 16 + 1));
    EXPECT_EQ(ViewOf(id), "bf16:" + std::to_string(i + 1));
    EXPECT_EQ(cache_.View(id)[0].capacity, (i / 16 + 1) * 16);
  }
  const KvAppend append = Step(id, Tokens(1, k2));
  ASSERT_EQ(append.stores.size(), 1u);
  EXPECT_EQ(append.stores[0].format, k2);
  EXPECT_EQ(append.stores[0].tail_row, last_row);
  EXPECT_EQ(append.stores[0].tail_capacity, 64);
  EXPECT_EQ(append.stores[0].from_tail, 63);
  EXPECT_EQ(append.stores[0].rows, 1);
  EXPECT_EQ(ViewOf(id), "k2v2:64");
  EXPECT_EQ(cache_.free_rows(), 4000 - kUnits2) << "nothing is left of the tail";
  EXPECT_EQ(Step(id, Tokens(1, k4)).stores[0].capacity, 16);
  EXPECT_EQ(ViewOf(id), "k2v2:64 bf16:1");
  EXPECT_EQ(cache_.Length(id), 65);
  cache_.FreeSequence(id);
  Check();
  EXPECT_EQ(cache_.free_rows(), 4000);
  EXPECT_EQ(cache_.Usage(), KvUsage());
}

TEST_F(KvCacheTest, ABf16BlockIsTheTailItself) {
  const SequenceId id = cache_.CreateSequence();
  Step(id, Tokens(60, k16));
  const uint32_t row = cache_.View(id)[0].unit_row;
  const KvAppend append = Step(id, Tokens(4, k16));
  ASSERT_EQ(append.stores.size(), 1u);
  EXPECT_EQ(append.stores[0].unit_row, row);
  EXPECT_EQ(append.stores[0].tail_row, row);
  EXPECT_EQ(cache_.free_rows(), 4000 - kUnits16) << "the next tail is allocated when it is needed";
  EXPECT_EQ(cache_.Usage().tail_bytes, 0);
  EXPECT_NE(Step(id, Tokens(1, k16)).stores[0].unit_row, row);
  EXPECT_EQ(ViewOf(id), "bf16:64 bf16:1");
}

TEST_F(KvCacheTest, PrefillCompletesFromTheTailThenFromRowsThenLeavesTheRest) {
  const SequenceId id = cache_.CreateSequence();
  Step(id, Tokens(10, k4));
  const uint32_t tail_row = cache_.View(id)[0].unit_row;
  std::vector<KvToken> tokens = Tokens(54, k4);
  for (const Format f : {k2, k16, k42}) {
    const std::vector<KvToken> block = Tokens(64, f);
    tokens.insert(tokens.end(), block.begin(), block.end());
  }
  tokens.resize(tokens.size() + 5, KvToken{{}, TagOf(k2, 3)});
  const std::vector<KvStore> stores = Step(id, tokens).stores;
  ASSERT_EQ(stores.size(), 5u);
  // From the tail and 54 rows.
  EXPECT_EQ(stores[0].format, k4);
  EXPECT_EQ(stores[0].tail_row, tail_row);
  EXPECT_EQ(stores[0].from_tail, 10);
  EXPECT_EQ(stores[0].row_begin, 0);
  EXPECT_EQ(stores[0].rows, 54);
  // From rows alone.
  EXPECT_EQ(stores[1].format, k2);
  EXPECT_EQ(stores[1].tail_row, stores[1].unit_row);
  EXPECT_EQ(stores[1].from_tail, 0);
  EXPECT_EQ(stores[1].row_begin, 54);
  EXPECT_EQ(stores[1].rows, 64);
  EXPECT_EQ(stores[2].format, k16);
  EXPECT_EQ(stores[2].unit_row, stores[2].tail_row);
  EXPECT_EQ(stores[2].capacity, 64);
  EXPECT_EQ(stores[2].row_begin, 118);
  EXPECT_EQ(stores[3].format, k42);
  EXPECT_EQ(stores[3].row_begin, 182);
  EXPECT_EQ(stores[4].format, k16);
  EXPECT_EQ(stores[4].from_tail, 0);
  EXPECT_EQ(stores[4].row_begin, 246);
  EXPECT_EQ(stores[4].rows, 5);
  EXPECT_EQ(stores[4].capacity, 16);
  EXPECT_EQ(ViewOf(id), "k2v2:64 k4v2:64 k4v4:64 bf16:64 bf16:5");
  const std::vector<const KvBlock*> blocks = cache_.Blocks(id);
  ASSERT_EQ(blocks.size(), 5u);
  for (size_t i = 0; i < 5; ++i) EXPECT_EQ(blocks[i]->position, static_cast<int32_t>(64 * i));
  EXPECT_EQ(blocks[0]->format, k4);
  EXPECT_EQ(blocks[2]->format, k16);
  EXPECT_EQ(blocks[4]->tags[4], TagOf(k2, 3));
}

TEST_F(KvCacheTest, WholeBlocksOfAPromptNeedNoTail) {
  const SequenceId id = cache_.CreateSequence();
  EXPECT_EQ(cache_.RowsToAppend(id, Tokens(128, k2)), 2 * kUnits2);
  Step(id, Tokens(128, k2));
  EXPECT_EQ(cache_.free_rows(), 4000 - 2 * kUnits2);
  EXPECT_EQ(cache_.Usage().total_bytes(), 2 * BlockBytes(kGeometry, k2));
  EXPECT_DOUBLE_EQ(cache_.Usage().effective_bits(kGeometry), EffectiveBits(kGeometry, k2));
}

TEST_F(KvCacheTest, AppendingNothingDoesNothing) {
  const SequenceId id = cache_.CreateSequence();
  EXPECT_TRUE(Step(id, {}).stores.empty());
  EXPECT_EQ(cache_.free_rows(), 4000);
}

TEST_F(KvCacheTest, MixedWishesTakeTheMedianAcrossTailAndRows) {
  const SequenceId id = cache_.CreateSequence();
  Step(id, Tokens(31, k4));
  Step(id, Tokens(33, k2));
  EXPECT_EQ(ViewOf(id), "k2v2:64");
  Step(id, Tokens(32, k2));
  Step(id, Tokens(32, k4));
  EXPECT_EQ(ViewOf(id), "k2v2:64 k4v4:64");
}

TEST_F(KvCacheTest, ViewShowsTheCacheAsItWasUntilTheStepIsFinished) {
  const SequenceId id = cache_.CreateSequence();
  Step(id, Tokens(60, k2));
  const SequenceId other = cache_.CreateSequence();
  KvAppend append;
  ASSERT_TRUE(cache_.Append(id, Tokens(10, k2), &append).ok());
  const std::span<const KvBlockRef> view = cache_.View(id);
  EXPECT_EQ(ViewOf(id), "bf16:60");
  ASSERT_TRUE(cache_.Append(other, Tokens(300, k2), &append).ok());
  EXPECT_EQ(cache_.View(id).data(), view.data()) << "a view stays valid while others are appended to";
  EXPECT_EQ(cache_.Length(id), 70);
  cache_.FinishStep();
  EXPECT_EQ(ViewOf(id), "k2v2:64 bf16:6");
}

class KvCacheWindow100Test : public KvCacheTest {
 protected:
  KvCacheWindow100Test() : KvCacheTest(100) {}
};
class KvCacheWindow128Test : public KvCacheTest {
 protected:
  KvCacheWindow128Test() : KvCacheTest(128) {}
};

TEST_F(KvCacheWindow100Test, RecentWindowStaysBf16AndIsConvertedWhenAllItsTokensHaveLeftIt) {
  const SequenceId id = cache_.CreateSequence();
  Step(id, Tokens(163, k2));
  EXPECT_EQ(ViewOf(id), "bf16:64 bf16:64 bf16:35") << "position 63 is among the newest 100";
  const uint32_t first = cache_.Blocks(id)[0]->unit_row;
  EXPECT_TRUE(Step(id, Tokens(1, k2)).converts.empty()) << "at 163 tokens the window still begins at 63";
  KvAppend append;
  ASSERT_EQ(cache_.RowsToAppend(id, Tokens(1, k2)), 0) << "it is converted in place";
  const int64_t free = cache_.free_rows();
  ASSERT_TRUE(cache_.Append(id, Tokens(1, k2), &append).ok());
  ASSERT_EQ(append.converts.size(), 1u);
  EXPECT_EQ(append.converts[0].from_row, first);
  EXPECT_EQ(append.converts[0].from, k16);
  EXPECT_EQ(append.converts[0].to, k2);
  EXPECT_EQ(append.converts[0].to_row, first);
  EXPECT_EQ(cache_.Blocks(id)[0]->unit_row, first);
  EXPECT_EQ(ViewOf(id), "k2v2:64 bf16:64 bf16:36") << "conversions run before the step's attention";
  Check();
  EXPECT_EQ(cache_.free_rows(), free + kUnits16 - kUnits2);
  cache_.FinishStep();
  Check();
  EXPECT_EQ(cache_.demotions()[static_cast<size_t>(k16)][static_cast<size_t>(k2)]
                              [static_cast<size_t>(Cause::kWindow)],
            1);
}

TEST_F(KvCacheWindow128Test, ALongPromptStoresWhatLiesOutsideTheWindowAtOnce) {
  const SequenceId id = cache_.CreateSequence();
  EXPECT_TRUE(Step(id, Tokens(64 * 6 + 1, k2)).converts.empty());
  EXPECT_EQ(ViewOf(id), "k2v2:64 k2v2:64 k2v2:64 k2v2:64 bf16:64 bf16:64 bf16:1");
  Step(id, Tokens(63, k2));
  EXPECT_EQ(ViewOf(id), "k2v2:64 k2v2:64 k2v2:64 k2v2:64 bf16:64 bf16:64 bf16:64");
  EXPECT_EQ(Step(id, Tokens(1, k2)).converts.size(), 1u);
  EXPECT_EQ(ViewOf(id), "k2v2:64 k2v2:64 k2v2:64 k2v2:64 k2v2:64 bf16:64 bf16:64 bf16:1");
}

TEST_F(KvCacheWindow100Test, BlocksThatWishForBf16StaySoBehindTheWindow) {
  const SequenceId id = cache_.CreateSequence();
  for (int i = 0; i < 5; ++i) EXPECT_TRUE(Step(id, Tokens(64, k16)).converts.empty());
  EXPECT_EQ(cache_.Usage().tokens[static_cast<size_t>(k16)], 320);
}

TEST_F(KvCacheTest, UsageCountsEachSequenceAndAll) {
  const SequenceId a = cache_.CreateSequence(), b = cache_.CreateSequence();
  Step(a, Tokens(130, k4, 7));
  Step(b, Tokens(81, k2, 8));
  KvUsage sum = cache_.Usage(a);
  EXPECT_EQ(sum.tokens[static_cast<size_t>(k4)], 128);
  EXPECT_EQ(sum.tail_tokens, 2);
  EXPECT_EQ(sum.tail_bytes, BlockBytes(kGeometry, k16) / 4) << "room for 16 tokens";
  EXPECT_EQ(sum.total_bytes(), 2 * BlockBytes(kGeometry, k4) + BlockBytes(kGeometry, k16) / 4);
  EXPECT_EQ(cache_.Usage(b).tail_bytes, BlockBytes(kGeometry, k16) / 2) << "room for 32";
  sum = cache_.Usage();
  EXPECT_EQ(sum.total_bytes(), cache_.Usage(a).total_bytes() + cache_.Usage(b).total_bytes());
  EXPECT_EQ(sum.total_tokens(), 211);
  EXPECT_EQ(sum.tail_tokens, 19);
  EXPECT_EQ(cache_.TokensByTag()[TagOf(k4, 7)], 130);
  EXPECT_EQ(cache_.TokensByTag()[TagOf(k2, 8)], 81);
  EXPECT_DOUBLE_EQ(KvUsage().effective_bits(kGeometry), 0);
  // By hand: (2 * 34 + 18 + 32 + 64) units of 256 bytes for 211 tokens of 2 * 128 elements, per head and
  // layer.
  EXPECT_DOUBLE_EQ(sum.effective_bits(kGeometry), 182.0 * 256 * 8 / (211 * 256));
}

TEST_F(KvCacheTest, RowsOfASequenceInTheStepAreNotReusedBeforeItEnds) {
  const SequenceId a = cache_.CreateSequence(), b = cache_.CreateSequence();
  Step(a, Tokens(64, k2));
  Step(b, Tokens(64, k2));
  KvAppend append;
  ASSERT_TRUE(cache_.Append(a, Tokens(1, k2), &append).ok());
  const int64_t free = cache_.free_rows();
  cache_.FreeSequence(a);
  EXPECT_EQ(cache_.free_rows(), free) << "its stores are still to run";
  cache_.FreeSequence(b);
  EXPECT_EQ(cache_.free_rows(), free + kUnits2) << "nothing of this step touches it";
  Check();
  cache_.FinishStep();
  Check();
  EXPECT_EQ(cache_.free_rows(), 4000);
}

TEST(KvCacheFullTest, OneUnitTooFewIsRefusedAndChangesNothing) {
  const std::vector<KvToken> tokens = Tokens(130, k4);
  const int needed = 2 * kUnits4 + kUnitsTail;
  KvCache enough(kGeometry, needed, Needs()), short_by_one(kGeometry, needed - 1, Needs());
  KvAppend append;
  const SequenceId a = enough.CreateSequence();
  ASSERT_EQ(enough.RowsToAppend(a, tokens), needed);
  EXPECT_TRUE(enough.Append(a, tokens, &append).ok());
  EXPECT_EQ(enough.free_rows(), 0);
  EXPECT_TRUE(enough.CheckIntegrity().ok());

  const SequenceId b = short_by_one.CreateSequence();
  EXPECT_FALSE(short_by_one.Fits(short_by_one.RowsToAppend(b, tokens)));
  const Status status = short_by_one.Append(b, tokens, &append);
  EXPECT_EQ(status.code(), Code::kResourceExhausted);
  EXPECT_NE(status.message().find("takes 100 unit rows"), std::string::npos) << status.message();
  EXPECT_NE(status.message().find("99 of 99"), std::string::npos) << status.message();
  EXPECT_TRUE(append.stores.empty());
  EXPECT_EQ(short_by_one.free_rows(), needed - 1);
  EXPECT_EQ(short_by_one.Length(b), 0);
  EXPECT_EQ(short_by_one.Usage(), KvUsage());
  EXPECT_TRUE(short_by_one.CheckIntegrity().ok());
  EXPECT_TRUE(short_by_one.Append(b, Tokens(64, k4), &append).ok()) << "less still fits, in the same step";
}

TEST(KvCacheFullTest, ScatteredRowsAreRefusedUntilCompacted) {
  KvCache cache(kGeometry, 4 * kUnits2, Needs());
  KvAppend append;
  std::vector<SequenceId> ids;
  for (int i = 0; i < 4; ++i) {
    ids.push_back(cache.CreateSequence());
    ASSERT_TRUE(cache.Append(ids.back(), Tokens(64, k2), &append).ok());
  }
  cache.FinishStep();
  cache.FreeSequence(ids[0]);
  cache.FreeSequence(ids[2]);
  const SequenceId id = cache.CreateSequence();
  EXPECT_TRUE(cache.Fits(kUnits4));
  EXPECT_FALSE(cache.FitsWithoutCompaction(kUnits4));
  const Status status = cache.Append(id, Tokens(64, k4), &append);
  EXPECT_EQ(status.code(), Code::kResourceExhausted);
  EXPECT_NE(status.message().find("compact"), std::string::npos) << status.message();
  std::vector<int> moved;
  cache.Compact([&](uint32_t from, uint32_t to, int rows) {
    EXPECT_NE(from, to);
    moved.push_back(rows);
  });
  EXPECT_EQ(moved, std::vector<int>{kUnits2}) << "one move makes one run of the two";
  EXPECT_TRUE(cache.CheckIntegrity().ok());
  EXPECT_TRUE(cache.FitsWithoutCompaction(kUnits4));
  EXPECT_TRUE(cache.Append(id, Tokens(64, k4), &append).ok());
}

TEST_F(KvCacheTest, IntegrityNamesADamagedTable) {
  const SequenceId id = cache_.CreateSequence();
  Step(id, Tokens(130, k4));
  // What a stray write would do.
  const auto expect = [&](auto field, auto value, const char* says) {
    KvBlock& block = const_cast<KvBlock&>(*cache_.Blocks(id)[1]);
    const auto old = block.*field;
    block.*field = value;
    const Status status = cache_.CheckIntegrity();
    EXPECT_EQ(status.code(), Code::kInternal);
    EXPECT_NE(status.message().find(says), std::string::npos) << status.message();
    block.*field = old;
    Check();
  };
  expect(&KvBlock::unit_row, uint32_t{1}, "view");
  expect(&KvBlock::position, int32_t{65}, "belongs at 64");
  expect(&KvBlock::tokens, uint8_t{63}, "complete");
  expect(&KvBlock::users, int32_t{2}, "users");
  expect(&KvBlock::format, k2, "view");
}

TEST(KvCacheDeathTest, MisuseIsOurBug) {
  KvCache cache(kGeometry, 1000, Needs());
  KvAppend append;
  EXPECT_DEATH(cache.FreeSequence(1), "sequences_");
  const SequenceId id = cache.CreateSequence();
  ASSERT_TRUE(cache.Append(id, Tokens(1, k2), &append).ok());
  EXPECT_DEATH((void)cache.Append(id, Tokens(1, k2), &append), "last_step");
  EXPECT_DEATH(cache.Compact([](uint32_t, uint32_t, int) {}), "in_step_");
}

}  // namespace
}  // namespace triaxial
