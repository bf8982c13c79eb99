// Random operations on the cache against a naive model, over a fake memory in which every unit row of a block
// holds the ids of its tokens: whatever overlaps, is reused too early or is stored twice shows as a wrong id.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <map>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "kv/cache.h"

namespace triaxial {
namespace {

constexpr KvGeometry kGeometry{.num_layers = 1, .num_kv_heads = 1, .head_dim = 64};  // 10, 14, 18, 64 units

struct ModelToken {
  int32_t id = 0;  // counts up, so that order within a sequence is order of ids
  KvToken token;
};

struct ModelSequence {
  int window = 0;
  std::vector<ModelToken> tokens;
  std::vector<Format> formats;  // of the complete blocks

  Format Median(size_t block) const {
    std::vector<Format> wishes;
    for (size_t i = 0; i < 64; ++i) wishes.push_back(tokens[64 * block + i].token.wish);
    std::sort(wishes.begin(), wishes.end());
    return wishes[32];
  }
  void ConvertOld() {
    if (window == 0) return;
    for (size_t b = 0; b < formats.size(); ++b) {
      if (formats[b] == Format::kBf16 && 64 * (b + 1) + window <= tokens.size()) formats[b] = Median(b);
    }
  }
  void CompleteNew() {
    for (size_t b = formats.size(); b < tokens.size() / 64; ++b) {
      formats.push_back(64 * (b + 1) + window <= tokens.size() ? Median(b) : Format::kBf16);
    }
  }
};

class Simulation {
 public:
  Simulation(uint32_t seed, int64_t rows) : random_(seed), cache_(kGeometry, rows), memory_(rows) {}

  void Run(int steps) {
    for (int i = 0; i < steps && !testing::Test::HasFailure(); ++i) {
      SCOPED_TRACE("step " + std::to_string(i));
      if (model_.size() < 9 && Below(6) == 0) Create();
      if (!model_.empty() && Below(40) == 0) Free(Any());
      if (!model_.empty() && Below(15) == 0) {
        const SequenceId id = Any();
        Truncate(id);
        CheckSequence(id);
      }
      if (Below(60) == 0) Compact();
      Step();
      CheckCounters();
    }
    while (!model_.empty()) Free(model_.begin()->first);
    EXPECT_EQ(cache_.free_rows(), cache_.total_rows());
    EXPECT_EQ(cache_.Usage(), KvUsage());
    for (const int64_t tokens : cache_.TokensByTag()) EXPECT_EQ(tokens, 0);
    Integrity();
  }

  // What the run came across; a test that never meets these proves little.
  int operations = 0, appended = 0, converted = 0, refused = 0, fragmented = 0, moved = 0;

 private:
  using Row = std::array<int32_t, 64>;

  int Below(int n) { return std::uniform_int_distribution<int>(0, n - 1)(random_); }
  SequenceId Any() { return std::next(model_.begin(), Below(static_cast<int>(model_.size())))->first; }

  void Integrity() {
    const Status status = cache_.CheckIntegrity();
    ASSERT_TRUE(status.ok()) << status.message();
  }

  void Create() {
    ++operations;
    const int window = std::array{0, 0, 1, 64, 100, 128}[static_cast<size_t>(Below(6))];
    model_[cache_.CreateSequence(window)].window = window;
    Integrity();
  }

  void Free(SequenceId id) {
    ++operations;
    cache_.FreeSequence(id);
    model_.erase(id);
    Integrity();
  }

  void Truncate(SequenceId id) {
    ++operations;
    ModelSequence& sequence = model_[id];
    const size_t in_tail = sequence.tokens.size() % 64;
    sequence.tokens.resize(sequence.tokens.size() -
                           static_cast<size_t>(Below(static_cast<int>(in_tail) + 1)));
    cache_.TruncateTail(id, static_cast<int32_t>(sequence.tokens.size()));
    Integrity();
    CheckTable(id);
  }

  void Compact() {
    ++operations;
    cache_.Compact([&](uint32_t from, uint32_t to, int rows) {
      ++moved;
      ASSERT_LE(int64_t{std::max(from, to)} + rows, cache_.total_rows());
      const std::vector<Row> block(memory_.begin() + from, memory_.begin() + from + rows);
      std::copy(block.begin(), block.end(), memory_.begin() + to);
    });
    EXPECT_TRUE(cache_.FitsWithoutCompaction(cache_.free_rows()));
    Integrity();
    for (const auto& [id, sequence] : model_) CheckSequence(id);
  }

  std::vector<ModelToken> RandomTokens() {
    const int kind = Below(10);
    const int count = kind < 5 ? 1 : kind < 8 ? Below(40) : Below(300);
    std::vector<ModelToken> tokens;
    KvToken token;
    for (int i = 0; i < count; ++i) {
      if (i == 0 || Below(30) == 0) {
        token = {static_cast<uint8_t>(Below(kTags)), static_cast<Format>(Below(10) == 0 ? 3 : Below(3))};
      }
      tokens.push_back({next_token_++, token});
    }
    return tokens;
  }

  // One step: appends to some sequences, perhaps cancels one of them, runs the "kernels" and finishes.
  void Step() {
    std::vector<KvConvert> converts;
    std::vector<std::vector<std::pair<KvStore, std::vector<ModelToken>>>> stores;  // by tail, in order
    std::set<SequenceId> in_step;
    std::map<SequenceId, std::vector<int32_t>> before;
    bool was_fragmented = false;
    const int refused_before = refused;
    std::vector<SequenceId> ids;
    ids.reserve(model_.size());
    for (const auto& [id, sequence] : model_) ids.push_back(id);
    std::shuffle(ids.begin(), ids.end(), random_);
    for (const SequenceId id : ids) {
      if (!model_.contains(id) || Below(3) == 0) continue;
      ++operations;
      const std::vector<ModelToken> tokens = RandomTokens();
      before[id] = Ids(model_[id]);
      if (!Append(id, tokens, &converts, &stores, &was_fragmented)) continue;
      in_step.insert(id);
      Integrity();
      if (Below(60) == 0) {  // a participant or a bystander goes in the middle of the step
        const SequenceId gone = Any();
        in_step.erase(gone);
        Free(gone);
      }
    }

    // The order that kernels may choose: conversions in any order, stores in order within a tail.
    std::shuffle(converts.begin(), converts.end(), random_);
    for (const KvConvert& convert : converts) Execute(convert);
    for (const SequenceId id : in_step) ASSERT_EQ(IdsInView(id), before[id]) << "what attention reads";
    if (!in_step.empty() && Below(10) == 0) {
      const SequenceId id = *in_step.begin();
      Truncate(id);
    }
    std::shuffle(stores.begin(), stores.end(), random_);
    for (const auto& group : stores) {
      for (const auto& [store, tokens] : group) Execute(store, tokens);
    }
    cache_.FinishStep();
    Integrity();
    for (const SequenceId id : in_step) CheckSequence(id);

    if (was_fragmented) Compact();
    // A full cache makes room most of the time, else nothing would happen any more.
    if (refused > refused_before && !model_.empty() && Below(3) > 0) Free(Any());
  }

  bool Append(SequenceId id, const std::vector<ModelToken>& tokens, std::vector<KvConvert>* converts,
              std::vector<std::vector<std::pair<KvStore, std::vector<ModelToken>>>>* stores,
              bool* was_fragmented) {
    std::vector<KvToken> plain;
    plain.reserve(tokens.size());
    for (const ModelToken& t : tokens) plain.push_back(t.token);
    const int64_t rows = cache_.RowsToAppend(id, plain);
    const int64_t free = cache_.free_rows();
    const bool surely_fits = cache_.FitsWithoutCompaction(rows);
    const KvUsage usage = cache_.Usage();
    const KvUsage own = cache_.Usage(id);
    KvAppend append;
    const Status status = cache_.Append(id, plain, &append);
    if (!status.ok()) {
      EXPECT_EQ(status.code(), Code::kResourceExhausted);
      EXPECT_FALSE(surely_fits);
      EXPECT_EQ(cache_.free_rows(), free);
      EXPECT_EQ(cache_.Usage(), usage);
      EXPECT_EQ(cache_.Usage(id), own);
      EXPECT_EQ(cache_.Length(id), static_cast<int32_t>(model_[id].tokens.size()));
      EXPECT_TRUE(append.converts.empty() && append.stores.empty());
      CheckSequence(id);
      ++(cache_.Fits(rows) ? fragmented : refused);
      *was_fragmented |= cache_.Fits(rows);
      Integrity();
      return false;
    }
    EXPECT_EQ(cache_.free_rows(), free - rows);
    appended += static_cast<int>(tokens.size());
    converted += static_cast<int>(append.converts.size());

    ModelSequence& sequence = model_[id];
    sequence.ConvertOld();
    sequence.tokens.insert(sequence.tokens.end(), tokens.begin(), tokens.end());
    sequence.CompleteNew();
    converts->insert(converts->end(), append.converts.begin(), append.converts.end());
    // The stores take each row once, in order.
    int32_t row = 0;
    std::map<uint32_t, size_t> group_of_tail;
    for (const KvStore& store : append.stores) {
      EXPECT_EQ(store.row_begin, row);
      EXPECT_GT(store.rows, 0);
      row += store.rows;
      EXPECT_LE(store.from_tail + store.rows, 64);
      if (store.format == Format::kBf16) {
        EXPECT_EQ(store.unit_row, store.tail_row);
      } else {
        EXPECT_EQ(store.from_tail + store.rows, 64);
        EXPECT_EQ(store.tail_row == store.unit_row, store.from_tail == 0);
      }
      const auto [group, is_new] = group_of_tail.emplace(store.tail_row, stores->size());
      if (is_new) stores->emplace_back();
      (*stores)[group->second].emplace_back(
          store, std::vector<ModelToken>(tokens.begin() + store.row_begin,
                                         tokens.begin() + store.row_begin + store.rows));
    }
    EXPECT_EQ(row, static_cast<int32_t>(tokens.size()));
    return true;
  }

  // The 64 slots of a block, which must be alike in all its rows as far as it has tokens.
  Row Read(uint32_t unit_row, Format format, int tokens) {
    for (int r = 1; r < UnitsOf(kGeometry, format); ++r) {
      EXPECT_TRUE(std::equal(memory_[unit_row].begin(), memory_[unit_row].begin() + tokens,
                             memory_[unit_row + static_cast<uint32_t>(r)].begin()))
          << "two blocks wrote to one place";
    }
    return memory_[unit_row];
  }
  void Write(uint32_t unit_row, Format format, const Row& row) {
    for (int r = 0; r < UnitsOf(kGeometry, format); ++r) memory_[unit_row + static_cast<uint32_t>(r)] = row;
  }
  void Execute(const KvConvert& convert) {
    Write(convert.to_row, convert.to, Read(convert.from_row, convert.from, 64));
  }
  void Execute(const KvStore& store, const std::vector<ModelToken>& tokens) {
    if (store.format != Format::kBf16) {
      Row row{};
      if (store.from_tail > 0) row = Read(store.tail_row, Format::kBf16, store.from_tail);
      for (size_t i = 0; i < tokens.size(); ++i) row[store.from_tail + i] = tokens[i].id;
      Write(store.unit_row, store.format, row);
      return;
    }
    for (int r = 0; r < UnitsOf(kGeometry, Format::kBf16); ++r) {
      Row& row = memory_[store.unit_row + static_cast<uint32_t>(r)];
      for (size_t i = 0; i < tokens.size(); ++i) row[store.from_tail + i] = tokens[i].id;
    }
  }

  static std::vector<int32_t> Ids(const ModelSequence& sequence) {
    std::vector<int32_t> ids;
    for (const ModelToken& t : sequence.tokens) ids.push_back(t.id);
    return ids;
  }

  // The tokens that a view yields, its blocks put in order of position; the view must be sorted by format.
  std::vector<int32_t> IdsInView(SequenceId id) {
    std::vector<std::vector<int32_t>> blocks;
    Format last = Format::kK2V2;
    int incomplete = 0;
    for (const KvBlockRef& ref : cache_.View(id)) {
      EXPECT_GE(ref.format, last);
      EXPECT_EQ(incomplete, 0) << "the tail comes last";
      EXPECT_TRUE(ref.tokens >= 1 && ref.tokens <= 64);
      last = ref.format;
      incomplete += ref.tokens < 64;
      const Row row = Read(ref.unit_row, ref.format, ref.tokens);
      blocks.emplace_back(row.begin(), row.begin() + ref.tokens);
    }
    std::sort(blocks.begin(), blocks.end());
    std::vector<int32_t> ids;
    for (const auto& block : blocks) ids.insert(ids.end(), block.begin(), block.end());
    return ids;
  }

  void CheckSequence(SequenceId id) {
    CheckTable(id);
    ASSERT_EQ(IdsInView(id), Ids(model_[id]));
  }

  void CheckTable(SequenceId id) {
    const ModelSequence& sequence = model_[id];
    ASSERT_EQ(cache_.Length(id), static_cast<int32_t>(sequence.tokens.size()));
    const std::vector<const KvBlock*> blocks = cache_.Blocks(id);
    ASSERT_EQ(blocks.size(), (sequence.tokens.size() + 63) / 64);
    KvUsage usage;
    for (size_t b = 0; b < blocks.size(); ++b) {
      const bool complete = b < sequence.formats.size();
      ASSERT_EQ(blocks[b]->position, static_cast<int32_t>(64 * b));
      ASSERT_EQ(blocks[b]->tokens, complete ? 64 : sequence.tokens.size() % 64);
      ASSERT_EQ(blocks[b]->format, complete ? sequence.formats[b] : Format::kBf16);
      usage.tokens[static_cast<size_t>(blocks[b]->format)] += blocks[b]->tokens;
      for (size_t i = 0; i < blocks[b]->tokens; ++i) {
        ASSERT_EQ(blocks[b]->token[i].tag, sequence.tokens[64 * b + i].token.tag);
        ASSERT_EQ(blocks[b]->token[i].wish, sequence.tokens[64 * b + i].token.wish);
      }
    }
    ASSERT_EQ(cache_.Usage(id).tokens, usage.tokens);
  }

  void CheckCounters() {
    KvUsage sum;
    std::array<int64_t, kTags> by_tag{};
    for (const auto& [id, sequence] : model_) {
      sum += cache_.Usage(id);
      for (const ModelToken& t : sequence.tokens) ++by_tag[t.token.tag];
    }
    ASSERT_EQ(cache_.Usage(), sum);
    ASSERT_EQ(cache_.TokensByTag(), by_tag);
    ASSERT_EQ(sum.total_bytes(), (cache_.total_rows() - cache_.free_rows()) * kUnitBytes);
  }

  std::mt19937 random_;
  KvCache cache_;
  std::vector<Row> memory_;
  std::map<SequenceId, ModelSequence> model_;
  int32_t next_token_ = 1;
};

TEST(KvCachePropertyTest, RandomOperationsKeepEveryTokenInItsPlace) {
  for (const auto& [seed, rows, steps] : {std::tuple{1u, 1500, 5000}, std::tuple{2u, 600, 8000},
                                          std::tuple{3u, 150, 4000}, std::tuple{4u, 6000, 2000}}) {
    SCOPED_TRACE("seed " + std::to_string(seed));
    Simulation simulation(seed, rows);
    simulation.Run(steps);
    std::printf(
        "%5d rows: %6d operations, %7d tokens, %5d conversions, %5d refused, %4d fragmented, %6d moves\n",
        rows, simulation.operations, simulation.appended, simulation.converted, simulation.refused,
        simulation.fragmented, simulation.moved);
    EXPECT_GT(simulation.operations, steps);
    EXPECT_GT(simulation.refused, 10);
    if (rows >= 600) {  // less holds hardly more than the tails
      EXPECT_GT(simulation.converted, 10);
      EXPECT_GT(simulation.fragmented, 10);
      EXPECT_GT(simulation.moved, 10);
    }
  }
}

TEST(KvCachePropertyTest, AnArenaWithoutRoomForABlockRefusesForEver) {
  Simulation simulation(5, 9);
  simulation.Run(300);
  EXPECT_EQ(simulation.appended, 0);
  EXPECT_GT(simulation.refused, 30);
}

}  // namespace
}  // namespace triaxial
