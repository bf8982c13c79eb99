// Sharing, ageing, price and eviction of cached blocks, case by case; cache_property_test.cc has them at
// random.
#include <gtest/gtest.h>

#include <limits>
#include <string>
#include <vector>

#include "kv/cache.h"

namespace triaxial {
namespace {

constexpr KvGeometry kGeometry{.num_layers = 1, .num_kv_heads = 1, .head_dim = 64};  // units 10, 14, 18, 64
constexpr Format k2 = Format::kK2V2, k42 = Format::kK4V2, k4 = Format::kK4V4, k16 = Format::kBf16;

// `count` tokens whose content counts up from `first`.
std::vector<KvToken> Text(int count, int first, uint8_t tag) {
  std::vector<KvToken> tokens;
  for (int i = 0; i < count; ++i) tokens.push_back({ContentId::OfToken(first + i), tag});
  return tokens;
}
std::vector<KvToken> operator+(std::vector<KvToken> a, const std::vector<KvToken>& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}
// The same tokens, seen at another age.
std::vector<KvToken> As(std::vector<KvToken> tokens, uint8_t tag) {
  for (KvToken& token : tokens) token.tag = tag;
  return tokens;
}

constexpr uint8_t kTag2 = static_cast<uint8_t>(k2), kTag4 = static_cast<uint8_t>(k4),
                  kTag16 = static_cast<uint8_t>(k16);

// Losses by tag: tag t loses t + 1 times these.
TagNeeds Priced(double rest_price) {
  TagNeeds needs;
  needs.priced = true;
  for (size_t t = 0; t < kTags; ++t) {
    const auto weight = static_cast<float>(t + 1);
    needs.loss[t].fill(0);
    needs.loss[t][static_cast<size_t>(k2)] = 10 * weight;
    needs.loss[t][static_cast<size_t>(k42)] = 5 * weight;
    needs.loss[t][static_cast<size_t>(k4)] = 1 * weight;
  }
  needs.rest_price = rest_price;
  needs.allowed[static_cast<size_t>(Format::kFp8)] = false;
  return needs;
}

class World {
 public:
  explicit World(int64_t rows = 1000, const TagNeeds& needs = TagNeeds::ByIndex(),
                 PrefixTree::Hash hash = PrefixTree::DefaultHash)
      : cache(kGeometry, rows, needs, hash) {}

  // Begins a sequence with what is cached and computes the rest.
  SequenceId Run(const std::vector<KvToken>& tokens, std::string_view salt = "", Format min_format = k2) {
    const SequenceId id = cache.CreateSequence({.salt = salt, .tokens = tokens, .min_format = min_format});
    begun = cache.Length(id);
    Check();
    while (cache.Length(id) < static_cast<int32_t>(tokens.size())) {
      const int32_t at = cache.Length(id);
      const int32_t count = std::min(static_cast<int32_t>(tokens.size()) - at, cache.NextStop(id));
      Extend(id, std::span(tokens).subspan(static_cast<size_t>(at), static_cast<size_t>(count)));
      computed += count;
    }
    return id;
  }
  void Extend(SequenceId id, std::span<const KvToken> tokens) {
    const Status status = cache.Append(id, tokens, &append);
    ASSERT_TRUE(status.ok()) << status.message();
    Check();
    cache.FinishStep();
    Check();
  }
  void Check() {
    const Status status = cache.CheckIntegrity();
    ASSERT_TRUE(status.ok()) << status.message();
  }
  std::string Formats(SequenceId id) {
    std::string text;
    for (const KvBlock* b : cache.Blocks(id))
      text += (text.empty() ? "" : " ") + std::string(Name(b->format));
    return text;
  }
  int64_t Reclaim(int64_t rows) {
    std::vector<KvConvert> converts;
    const int64_t free = cache.Reclaim(rows, &converts, {});
    cache.FinishStep();
    Check();
    return free;
  }

  KvCache cache;
  KvAppend append;
  int32_t begun = 0;     // tokens found by the last Run
  int32_t computed = 0;  // by all
};

TEST(CacheReuse, ALaterSequenceBeginsWithWhatIsThere) {
  World world;
  const std::vector<KvToken> first = Text(200, 0, kTag2);
  const SequenceId a = world.Run(first);
  EXPECT_EQ(world.begun, 0);
  // While the other runs, and after it.
  const SequenceId b = world.Run(first + Text(100, 1000, kTag2));
  EXPECT_EQ(world.begun, 192) << "three complete blocks";
  EXPECT_EQ(world.cache.Blocks(a)[0], world.cache.Blocks(b)[0]);
  EXPECT_EQ(world.cache.Blocks(a)[0]->users, 2);
  world.cache.FreeSequence(a);
  world.cache.FreeSequence(b);
  world.Check();
  EXPECT_EQ(world.cache.cached_tokens(), 256);
  EXPECT_EQ(world.cache.free_rows() + world.cache.cached_rows(), 1000);
  world.Run(first + Text(100, 1000, kTag2));
  EXPECT_EQ(world.begun, 256);
  world.Run(first + Text(100, 2000, kTag2));
  EXPECT_EQ(world.begun, 192) << "another branch";
}

TEST(CacheReuse, TheLastTokenIsAlwaysComputed) {
  World world;
  world.cache.FreeSequence(world.Run(Text(128, 0, kTag2)));
  world.Run(Text(128, 0, kTag2));
  EXPECT_EQ(world.begun, 64);
  world.Run(Text(129, 0, kTag2));
  EXPECT_EQ(world.begun, 128);
}

TEST(CacheReuse, IdentityIsTokensPicturesAndSaltNotTheHash) {
  for (const PrefixTree::Hash hash :
       {PrefixTree::Hash(PrefixTree::DefaultHash), PrefixTree::Hash([](auto) { return uint64_t{7}; })}) {
    World world(2000, TagNeeds::ByIndex(), hash);
    const auto picture = [](uint64_t hash_lo) {
      std::vector<KvToken> tokens;
      for (int i = 0; i < 100; ++i) tokens.push_back({ContentId::OfPicture(hash_lo, 5, i), kTag2});
      return tokens;
    };
    world.Run(Text(64, 0, kTag2) + picture(1) + Text(30, 500, kTag2), "key a");
    world.Run(Text(64, 0, kTag2) + picture(1) + Text(30, 500, kTag2), "key b");
    EXPECT_EQ(world.begun, 0);
    world.Run(Text(64, 0, kTag2) + picture(1) + Text(30, 600, kTag2), "key a");
    EXPECT_EQ(world.begun, 128);
    world.Run(Text(64, 0, kTag2) + picture(2) + Text(30, 500, kTag2), "key a");
    EXPECT_EQ(world.begun, 64);
    world.Run(Text(64, 1, kTag2) + picture(1) + Text(30, 500, kTag2), "key a");
    EXPECT_EQ(world.begun, 0);
  }
}

TEST(CacheReuse, TheSameWorkDoneTwiceIsKeptOnce) {
  World world;
  const std::vector<KvToken> tokens = Text(130, 0, kTag2);
  const SequenceId a = world.cache.CreateSequence({.tokens = tokens});
  const SequenceId b = world.cache.CreateSequence({.tokens = tokens});
  KvAppend append;
  ASSERT_TRUE(world.cache.Append(a, tokens, &append).ok());
  ASSERT_TRUE(world.cache.Append(b, tokens, &append).ok());
  world.cache.FinishStep();
  world.Check();
  EXPECT_EQ(world.cache.Blocks(a)[0], world.cache.Blocks(b)[0]);
  EXPECT_EQ(world.cache.Usage().total_tokens(), 128 + 2 + 2);
}

TEST(CacheReuse, AFloorComputesOnlyTheBlocksBelowIt) {
  World world;
  const std::vector<KvToken> low = Text(64, 0, kTag4), mid = Text(64, 100, kTag2),
                             high = Text(64, 200, kTag4);
  const std::vector<KvToken> prompt = low + mid + high + Text(10, 300, kTag2);
  const SequenceId a = world.Run(prompt);
  EXPECT_EQ(world.Formats(a), "k4v4 k2v2 k4v4 bf16");
  world.computed = 0;
  const KvMatch match = world.cache.Match({.salt = "", .tokens = prompt, .min_format = k4});
  EXPECT_EQ(match.begin, 64);
  EXPECT_EQ(match.stop, 128);
  EXPECT_EQ(match.tokens, 128);
  const SequenceId b = world.Run(prompt, "", k4);
  EXPECT_EQ(world.begun, 64);
  EXPECT_EQ(world.computed, 64 + 10);
  EXPECT_EQ(world.Formats(b), "k4v4 k4v4 k4v4 bf16");
  EXPECT_EQ(world.Formats(a), "k4v4 k2v2 k4v4 bf16") << "whoever has the old block keeps it";
  world.cache.FreeSequence(a);
  world.cache.FreeSequence(b);
  world.Check();
  const SequenceId c = world.Run(prompt);
  EXPECT_EQ(world.begun, 192);
  EXPECT_EQ(world.Formats(c), "k4v4 k4v4 k4v4 bf16") << "the better block is the one that is found";
}

TEST(CacheReuse, IdleRowsAreThoseOfTheFirstRunAlone) {
  World world;
  const std::vector<KvToken> prompt = Text(64, 0, kTag4) + Text(64, 100, kTag2) + Text(74, 200, kTag4);
  const SequenceId a = world.Run(prompt);
  EXPECT_EQ(world.cache.Match({.salt = "", .tokens = prompt}).idle_rows, 0);
  world.cache.FreeSequence(a);
  EXPECT_EQ(world.cache.Match({.salt = "", .tokens = prompt}).idle_rows, 18 + 10 + 18);
  EXPECT_EQ(world.cache.Match({.salt = "", .tokens = prompt, .min_format = k4}).idle_rows, 18)
      << "whoever predicts what comes behind the first run counts the others";
}

TEST(CacheReuse, ABlockInFrontOfOneInUseCannotBeReclaimed) {
  World world;
  const std::vector<KvToken> prompt = Text(64, 0, kTag4) + Text(64, 100, kTag2) + Text(74, 200, kTag4);
  world.cache.FreeSequence(world.Run(prompt));
  EXPECT_EQ(world.cache.ReclaimableRows(), 18 + 10 + 18);
  const SequenceId b = world.cache.CreateSequence({.salt = "", .tokens = prompt, .min_format = k4});
  EXPECT_EQ(world.cache.cached_rows(), 10) << "b computes the second block again";
  EXPECT_EQ(world.cache.ReclaimableRows(), 0) << "but the third, which it has, hangs on it";
  EXPECT_EQ(world.Reclaim(1000), 1000 - 18 - 10 - 18);
  world.Check();
  world.cache.FreeSequence(b);
  EXPECT_EQ(world.cache.ReclaimableRows(), 18 + 10 + 18);
  EXPECT_EQ(world.Reclaim(1000), 1000);
}

TEST(CacheReuse, BlocksGrowOldInPlaceWhenAConversationMovesOn) {
  World world;
  const std::vector<KvToken> turn = Text(200, 0, kTag4);
  world.cache.FreeSequence(world.Run(turn));
  const std::vector<KvToken> next = As(turn, kTag2) + Text(10, 1000, kTag4);
  const SequenceId id = world.Run(next);
  EXPECT_EQ(world.begun, 192);
  EXPECT_EQ(world.Formats(id), "k4v4 k4v4 k4v4 bf16") << "not before it is asked for";
  EXPECT_EQ(world.cache.ageing(), 3);
  std::vector<KvConvert> converts;
  const int64_t free = world.cache.free_rows();
  world.cache.AgeBlocks(2, &converts);
  ASSERT_EQ(converts.size(), 2u);
  for (const KvConvert& convert : converts) {
    EXPECT_EQ(convert.from_row, convert.to_row);
    EXPECT_EQ(convert.from, k4);
    EXPECT_EQ(convert.to, k2);
  }
  EXPECT_EQ(world.cache.free_rows(), free + 2 * (18 - 10));
  world.Check();
  world.cache.FinishStep();
  converts.clear();
  world.cache.AgeBlocks(10, &converts);
  EXPECT_EQ(converts.size(), 1u);
  world.cache.FinishStep();
  world.Check();
  EXPECT_EQ(world.Formats(id), "k2v2 k2v2 k2v2 bf16");
  const KvBlock& block = *world.cache.Blocks(id)[0];
  ASSERT_EQ(block.history.size(), 1u);
  EXPECT_EQ(block.history[0].from, k4);
  EXPECT_EQ(block.history[0].to, k2);
  EXPECT_EQ(block.history[0].cause, Cause::kAge);
  EXPECT_EQ(world.cache.demotions()[static_cast<size_t>(k4)][static_cast<size_t>(k2)]
                                   [static_cast<size_t>(Cause::kAge)],
            3);
}

TEST(CacheReuse, ABlockInSomebodysRecentWindowDoesNotAge) {
  TagNeeds needs = TagNeeds::ByIndex();
  needs.recent_window = 100;
  World world(2000, needs);
  const std::vector<KvToken> shared = Text(200, 0, kTag2);
  const SequenceId young = world.Run(shared);
  const SequenceId longer = world.Run(shared + Text(300, 1000, kTag2));
  EXPECT_EQ(world.begun, 192);
  EXPECT_GT(world.cache.ageing(), 0) << "its own window is far behind them";
  std::vector<KvConvert> converts;
  world.cache.AgeBlocks(10, &converts);
  EXPECT_TRUE(converts.empty());
  EXPECT_EQ(world.Formats(young), "k2v2 bf16 bf16 bf16");
  EXPECT_EQ(world.cache.ageing(), 0) << "else the engine would never be idle";
  world.cache.FreeSequence(young);
  world.cache.FreeSequence(longer);
  const std::vector<KvToken> next = shared + Text(400, 1000, kTag2);
  const SequenceId id = world.cache.CreateSequence({.salt = "", .tokens = next});
  world.cache.AgeBlocks(10, &converts);
  EXPECT_EQ(converts.size(), 3u) << "and the last one of the longer sequence";
  world.cache.FinishStep();
  EXPECT_EQ(world.Formats(id), "k2v2 k2v2 k2v2 k2v2 k2v2 k2v2 k2v2");
  world.Check();
}

TEST(CacheReuse, ABlockKeepsWhatItsMostDemandingUserNeeds) {
  World world;
  const std::vector<KvToken> shared = Text(128, 0, kTag4);
  const SequenceId young = world.Run(shared + Text(5, 500, kTag4));
  const SequenceId old = world.Run(As(shared, kTag2) + Text(5, 600, kTag4));
  EXPECT_EQ(world.begun, 128);
  EXPECT_EQ(world.cache.ageing(), 0);
  world.cache.FreeSequence(old);
  world.cache.FreeSequence(young);
  world.Run(As(shared, kTag2) + Text(5, 600, kTag4));
  EXPECT_EQ(world.cache.ageing(), 2) << "now that the young one has gone";
}

TEST(CacheReuse, ForgetsTheLeastValuableLeavesFirst) {
  World world(9 * 10 + 16);  // nine blocks of k2v2 and a tail
  for (int i = 0; i < 3; ++i) {
    world.cache.FreeSequence(world.Run(Text(192, 1000 * i, kTag2)));  // completes all three blocks
  }
  EXPECT_EQ(world.cache.cached_tokens(), 9 * 64);
  // The first is used again, which makes it the most valuable.
  world.cache.FreeSequence(world.Run(Text(129, 0, kTag2)));
  EXPECT_EQ(world.begun, 128);
  const auto found = [&](int first) {
    return world.cache.Match({.salt = "", .tokens = Text(193, first, kTag2)}).begin / 64;
  };
  EXPECT_EQ(world.Reclaim(16 + 20), 36);
  EXPECT_EQ(found(0), 2) << "its last block was not used again";
  EXPECT_EQ(found(1000), 2) << "the next oldest loses its end";
  EXPECT_EQ(found(2000), 3);
  world.Reclaim(16 + 60);
  EXPECT_EQ(found(0), 2);
  EXPECT_EQ(found(1000), 0);
  EXPECT_EQ(found(2000), 1);
  EXPECT_EQ(world.Reclaim(1000), 106) << "everything";
  EXPECT_EQ(world.cache.cached_tokens(), 0);
  EXPECT_EQ(world.cache.Match({.salt = "", .tokens = Text(193, 0, kTag2)}).tokens, 0);
}

TEST(CacheReuse, WhatRunsIsNeverForgotten) {
  World world(100);
  const SequenceId id = world.Run(Text(192, 0, kTag2));
  EXPECT_EQ(world.Reclaim(1000), 70);
  EXPECT_EQ(world.Formats(id), "k2v2 k2v2 k2v2");
}

TEST(CachePrice, ABlockTakesTheFormatOfLeastLossAndPrice) {
  // Bytes of a head: 2560, 3584, 4608, 16384; losses of 64 tokens of tag 0: 640, 320, 64, 0.
  for (const auto& [price, format] :
       {std::pair{0.0, k16}, {0.004, k16}, {0.006, k4}, {0.24, k4}, {0.26, k42}, {0.32, k2}, {1e9, k2}}) {
    World world(1000, Priced(price));
    const SequenceId id = world.Run(Text(64, 0, 0));
    EXPECT_EQ(world.Formats(id), Name(format)) << price;
  }
}

TEST(CachePrice, PressureTakesTheCheapestLossPerByteFirstAndRelaxes) {
  World world(64 * 8 + 20, Priced(0.001));
  const SequenceId dear = world.Run(Text(64 * 3, 0, 9)), cheap = world.Run(Text(64 * 3, 1000, 1));
  EXPECT_EQ(world.Formats(dear), "bf16 bf16 bf16");
  EXPECT_EQ(world.Formats(cheap), "bf16 bf16 bf16");
  EXPECT_EQ(world.Reclaim(64 * 4), 64 * 2 + 20 + 3 * 46) << "three blocks from 64 to 18 rows";
  EXPECT_EQ(world.Formats(dear), "bf16 bf16 bf16");
  EXPECT_EQ(world.Formats(cheap), "k4v4 k4v4 k4v4");
  const double price = world.cache.price();
  EXPECT_NEAR(price, 2 * 64.0 / (16384 - 4608), 3e-4) << "of the last step, and a little less by now";
  EXPECT_EQ(world.cache.Blocks(cheap)[0]->history[0].cause, Cause::kPressure);
  // A new block is chosen at the raised price, until it has fallen back.
  const SequenceId next = world.Run(Text(64, 5000, 0));
  EXPECT_EQ(world.Formats(next), "k4v4");
  for (int i = 0; i < 1000; ++i) world.cache.FinishStep();
  EXPECT_DOUBLE_EQ(world.cache.price(), 0.001);
  EXPECT_EQ(world.Formats(cheap), "k4v4 k4v4 k4v4") << "what was rounded stays rounded";
}

TEST(CachePrice, PinsAndTheSinkHold) {
  TagNeeds needs = Priced(0.001);
  needs.floor[3] = k4;
  needs.sink = k42;
  World world(1000, needs);
  const SequenceId id = world.Run(Text(64, 0, 0) + Text(64, 100, 3) + Text(64, 200, 0));
  world.Reclaim(1000);
  EXPECT_EQ(world.Formats(id), "k4v2 k4v4 k2v2");
}

TEST(CachePrice, DropsBeforeItRoundsPastItsPatience) {
  TagNeeds needs =
      Priced(0.02);  // patience ends at 0.16; bf16 -> k4v4 of tag 0 costs 0.0054, k4v4 -> k2v2 0.28
  World world(18 * 10, needs);
  const SequenceId running = world.Run(Text(64 * 4, 0, 0));
  world.cache.FreeSequence(world.Run(Text(64 * 5, 1000, 0)));
  EXPECT_EQ(world.Formats(running), "k4v4 k4v4 k4v4 k4v4");
  EXPECT_EQ(world.cache.cached_tokens(), 5 * 64);
  world.Reclaim(18 * 3);
  EXPECT_EQ(world.cache.cached_tokens(), 3 * 64);
  EXPECT_EQ(world.Formats(running), "k4v4 k4v4 k4v4 k4v4");
  world.Reclaim(18 * 6 + 8);
  EXPECT_EQ(world.cache.cached_tokens(), 0);
  EXPECT_EQ(world.cache.demotions()[static_cast<size_t>(k4)][static_cast<size_t>(k42)]
                                   [static_cast<size_t>(Cause::kPressure)],
            2);
}

TEST(CachePrice, TheBudgetIsKeptOnceMemoryIsHalfFull) {
  TagNeeds needs = Priced(0.001);
  needs.budget_bits = 6;
  World world(64 * 8, needs);
  const SequenceId id = world.Run(Text(64 * 5, 0, 0));
  std::vector<KvConvert> converts;
  world.cache.KeepBudget(100, &converts);
  world.cache.FinishStep();
  world.Check();
  const KvUsage usage = world.cache.Usage(id);
  EXPECT_LE(usage.effective_bits(kGeometry), 6);
  EXPECT_FALSE(converts.empty());
  EXPECT_EQ(world.cache.Blocks(id)[0]->history[0].cause, Cause::kBudget);
}

TEST(CacheAbort, NobodyFindsWhatAFailedStepWrote) {
  World world;
  const std::vector<KvToken> tokens = Text(128, 0, kTag4);
  world.cache.FreeSequence(world.Run(tokens));
  // A bystander shares the first block; ageing converts it in the step that fails.
  const SequenceId bystander = world.Run(As(tokens, kTag2) + Text(3, 900, kTag2));
  ASSERT_EQ(world.cache.ageing(), 2);
  const SequenceId id = world.cache.CreateSequence({.salt = "x", .tokens = Text(70, 5000, kTag2)});
  std::vector<KvConvert> converts;
  world.cache.AgeBlocks(1, &converts);
  KvAppend append;
  ASSERT_TRUE(world.cache.Append(id, Text(70, 5000, kTag2), &append).ok());
  world.cache.AbortStep();
  for (const SequenceId lost : {bystander, id}) {
    EXPECT_TRUE(world.cache.Lost(lost));
    world.cache.FreeSequence(lost);
  }
  world.Check();
  EXPECT_EQ(world.cache.Match({.salt = "x", .tokens = Text(70, 5000, kTag2)}).tokens, 0);
  EXPECT_LE(world.cache.Match({.salt = "", .tokens = tokens + tokens}).tokens, 64) << "the one not touched";
  world.Reclaim(1000);
  EXPECT_EQ(world.cache.free_rows(), 1000);
}

TEST(CacheSleep, BlocksLeaveWithTheirNamesAndComeBack) {
  World world(200);
  const std::vector<KvToken> tokens = Text(200, 0, kTag2);
  world.cache.FreeSequence(world.Run(tokens, "salt"));
  std::vector<std::pair<BlockKey, BlockKey>> asleep;
  std::vector<KvConvert> converts;
  world.cache.Reclaim(1000, &converts,
                      [&](const KvBlock& block, const BlockKey& key, const BlockKey& parent) {
                        EXPECT_EQ(key, ChildKey(parent, block.contents));
                        asleep.emplace_back(key, parent);
                      });
  world.cache.FinishStep();
  ASSERT_EQ(asleep.size(), 3u);
  EXPECT_EQ(asleep.back().second, RootKey("salt")) << "leaves go first";

  const KvPrompt prompt{.salt = "salt", .tokens = tokens};
  KvCache::Waking waking = world.cache.BeginWaking(prompt);
  EXPECT_EQ(waking.blocks, 0);
  EXPECT_EQ(waking.key, RootKey("salt"));
  for (size_t b = 0; b < 2; ++b) {
    ASSERT_TRUE(world.cache.Wake(
        k2, std::span(tokens).subspan(64 * b, 64), [](uint32_t) { return true; }, &waking));
    EXPECT_EQ(waking.key, asleep[2 - b].first);
  }
  EXPECT_FALSE(world.cache.Wake(
      k2, std::span(tokens).subspan(128, 64), [](uint32_t) { return false; }, &waking))
      << "its bytes could not be brought";
  EXPECT_FALSE(world.cache.Wake(
                   k16, std::span(tokens).subspan(128, 64), [](uint32_t) { return true; }, &waking) &&
               world.cache.free_rows() < 0);
  world.cache.EndWaking();
  world.Check();
  world.Run(tokens, "salt");
  EXPECT_GE(world.begun, 128);
}

}  // namespace
}  // namespace triaxial
