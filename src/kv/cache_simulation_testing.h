// Random operations on the cache against a naive model, over a fake memory in which every unit row of a block
// holds what its tokens are: whatever overlaps, is reused too early, is found under a wrong prefix or comes
// back from sleep in a wrong place shows as a wrong token.
#ifndef TRIAXIAL_KV_CACHE_SIMULATION_TESTING_H_
#define TRIAXIAL_KV_CACHE_SIMULATION_TESTING_H_

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <functional>
#include <map>
#include <numeric>
#include <random>
#include <string>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#include "kv/cache.h"

namespace triaxial {

inline constexpr KvGeometry kSimulationGeometry{
    .num_layers = 1, .num_kv_heads = 1, .head_dim = 64};  // 10, 14, 18, 64 units

// What keys and values are a function of: the token and everything before it.
using Truth = uint64_t;
inline Truth Next(Truth prefix, const ContentId& content) {
  uint64_t x = (prefix ^ content.lo) * 0x9e3779b97f4a7c15u + content.hi + 1;
  x ^= x >> 29;
  return x * 0xbf58476d1ce4e5b9u;
}

struct ModelSequence {
  std::string salt;
  Format min_format = Format::kK2V2;
  bool shares = true;
  std::vector<KvToken> tokens;  // all that it will ever have
  std::vector<Truth> truth;     // of those
  std::vector<Truth> sums;      // of the first so many of these
  int32_t length = 0;
};

struct SimulationSetting {
  uint32_t seed;
  int64_t rows;
  int operations;
  bool priced;
  int recent_window;
  bool hashes_collide;
};

inline TagNeeds NeedsFor(const SimulationSetting& setting) {
  TagNeeds needs;
  needs.priced = setting.priced;
  needs.recent_window = setting.recent_window;
  for (size_t t = 0; t < kTags; ++t) {
    needs.wish[t] = static_cast<Format>(t % kFormats);
    if (t % 11 == 3) needs.floor[t] = Format::kK4V2;
    const auto weight = static_cast<float>(t % 7 + 1);
    needs.loss[t].fill(0);
    for (int f = 0; f < kFormats - 1; ++f) {
      needs.loss[t][static_cast<size_t>(f)] = weight * static_cast<float>(1 << (2 * (kFormats - f)));
    }
  }
  needs.rest_price = 0.05;
  needs.budget_bits = setting.priced ? 5 : 0;
  needs.sink = Format::kK4V2;
  return needs;
}

class Simulation {
 public:
  explicit Simulation(const SimulationSetting& setting)
      : setting_(setting),
        random_(setting.seed),
        cache_(kSimulationGeometry, setting.rows, NeedsFor(setting),
               setting.hashes_collide ? PrefixTree::Hash([](auto) { return uint64_t{1}; })
                                      : PrefixTree::DefaultHash),
        memory_(static_cast<size_t>(setting.rows)) {}

  void Run() {
    for (int steps = 0; operations < setting_.operations && !testing::Test::HasFailure(); ++steps) {
      SCOPED_TRACE("step " + std::to_string(steps));
      if (model_.size() < 9 && Below(3) == 0) Create();
      if (!model_.empty() && Below(12) == 0) Free(Any());
      if (Below(40) == 0) Compact();
      if (Below(400) == 0) {
        ++operations;
        run("DropCached", [&] { cache_.DropCached(); });
      }
      Step();
      if (steps % 64 == 0) Integrity();
    }
    while (!model_.empty()) Free(model_.begin()->first);
    Integrity();
    EXPECT_EQ(cache_.free_rows() + cache_.cached_rows(), cache_.total_rows());
    cache_.Reclaim(cache_.total_rows(), nullptr, {});
    EXPECT_EQ(cache_.free_rows(), cache_.total_rows()) << "whatever is left belongs to nobody";
    EXPECT_EQ(cache_.Usage(), KvUsage());
    for (const int64_t tokens : cache_.TokensByTag()) EXPECT_EQ(tokens, 0);
    Integrity();
  }

  // How operations of the cache are run.
  std::function<void(const char* name, const std::function<void()>& operation)> run =
      [](const char*, const std::function<void()>& operation) { operation(); };
  // Allocations that were made to fail until now, where a test does that.
  std::function<int64_t()> faults_so_far = [] { return int64_t{0}; };

  // What the run came across; a test that never meets these proves little.
  int64_t operations = 0, appended = 0, found = 0, aged = 0, demoted = 0, evicted = 0, woken = 0, refused = 0,
          fragmented = 0, moved = 0, aborted = 0, gaps = 0, within_budget = 0;

  void Integrity() {
    const Status status = cache_.CheckIntegrity();
    ASSERT_TRUE(status.ok()) << status.message();
  }

  // What an operation that fails must leave as it was.
  auto Figures() const {
    return std::tuple(cache_.free_rows(), cache_.cached_rows(), cache_.cached_tokens(), cache_.Usage(),
                      cache_.TokensByTag(), cache_.ageing());
  }

 private:
  using Row = std::array<Truth, kBlockTokens>;

  int Below(int n) { return std::uniform_int_distribution<int>(0, n - 1)(random_); }
  SequenceId Any() { return std::next(model_.begin(), Below(static_cast<int>(model_.size())))->first; }

  // A conversation that goes on, branches off or is new; its tokens' tags change from turn to turn.
  void Create() {
    ++operations;
    ModelSequence sequence;
    if (!known_.empty() && Below(4) > 0) {
      const auto& [salt, tokens] = known_[static_cast<size_t>(Below(static_cast<int>(known_.size())))];
      sequence.salt = salt;
      sequence.tokens = tokens;
      if (Below(3) == 0)
        sequence.tokens.resize(static_cast<size_t>(Below(static_cast<int>(tokens.size()))) + 1);
      const auto older = static_cast<uint8_t>(Below(kTags));
      for (KvToken& token : sequence.tokens) {
        if (Below(40) > 0) token.tag = static_cast<uint8_t>((token.tag + older) % kTags);
      }
    } else {
      sequence.salt = std::string(1, static_cast<char>('a' + Below(3)));
    }
    KvToken token{};
    for (int more = 1 + Below(300); more > 0; --more) {
      if (Below(20) == 0 || sequence.tokens.empty()) token.tag = static_cast<uint8_t>(Below(kTags));
      token.content = {static_cast<uint64_t>(Below(3)), static_cast<uint64_t>(Below(2))};
      sequence.tokens.push_back(token);
    }
    if (sequence.tokens.size() > 1500) sequence.tokens.resize(1500);
    sequence.min_format = static_cast<Format>(Below(8) == 0 ? Below(kFormats) : 0);
    sequence.shares = Below(10) > 0;
    if (!sequence.shares) sequence.min_format = Format::kK2V2;
    Truth truth = static_cast<Truth>(sequence.salt[0]);
    for (const KvToken& t : sequence.tokens) {
      sequence.truth.push_back(truth = Next(truth, t.content));
      sequence.sums.push_back(truth + (sequence.sums.empty() ? 0 : sequence.sums.back()));
    }
    if (known_.size() < 12) {
      known_.emplace_back(sequence.salt, sequence.tokens);
    } else {
      known_[static_cast<size_t>(Below(12))] = {sequence.salt, sequence.tokens};
    }

    const KvPrompt prompt{sequence.salt, sequence.tokens, sequence.min_format};
    if (sequence.shares && Below(2) == 0) Wake(sequence, prompt);
    const KvMatch match = cache_.Match(prompt);
    SequenceId id = 0;
    run("CreateSequence",
        [&] { id = sequence.shares ? cache_.CreateSequence(prompt) : cache_.CreateSequence(); });
    sequence.length = cache_.Length(id);
    if (sequence.shares) {
      EXPECT_EQ(sequence.length, match.begin);
      EXPECT_EQ(cache_.MatchedTokens(id), match.tokens);
      EXPECT_LT(match.tokens, static_cast<int32_t>(sequence.tokens.size()));
      if (match.tokens > match.begin) ++gaps;
      found += match.tokens;
    }
    model_[id] = std::move(sequence);
    CheckSequence(id);
  }

  void Free(SequenceId id) {
    ++operations;
    run("FreeSequence", [&] { cache_.FreeSequence(id); });
    model_.erase(id);
  }

  void Compact() {
    ++operations;
    const auto move = [&](uint32_t from, uint32_t to, int rows) {
      ++moved;
      ASSERT_LE(int64_t{std::max(from, to)} + rows, cache_.total_rows());
      const auto begin = memory_.begin() + from, end = begin + rows;
      if (to < from) {
        std::copy(begin, end, memory_.begin() + to);
      } else {
        std::copy_backward(begin, end, memory_.begin() + to + rows);
      }
    };
    run("Compact", [&] { cache_.Compact(move); });
    EXPECT_TRUE(cache_.FitsWithoutCompaction(cache_.free_rows()));
    for (const auto& [id, sequence] : model_) CheckSequence(id);
  }

  KvCache::Sleep Sleep() {
    if (Below(2) == 0) return {};
    return [this](const KvBlock& block, const BlockKey& key, const BlockKey&) {
      ++evicted;
      asleep_[key] = {block.format,
                      Read(block.unit_row, UnitsOf(kSimulationGeometry, block.format), kBlockTokens)};
    };
  }

  void Wake(const ModelSequence& sequence, const KvPrompt& prompt) {
    ++operations;
    KvCache::Waking waking;
    run("BeginWaking", [&] { waking = cache_.BeginWaking(prompt); });
    while (static_cast<size_t>(waking.blocks + 1) * kBlockTokens < sequence.tokens.size()) {
      const auto tokens =
          std::span(sequence.tokens).subspan(static_cast<size_t>(waking.blocks) * kBlockTokens, kBlockTokens);
      std::array<ContentId, kBlockTokens> contents;
      for (size_t i = 0; i < kBlockTokens; ++i) contents[i] = tokens[i].content;
      const auto block = asleep_.find(ChildKey(waking.key, contents));
      if (block == asleep_.end()) break;
      const auto& [format, row] = block->second;
      const int units = UnitsOf(kSimulationGeometry, format);
      if (!cache_.FitsWithoutCompaction(units)) run("Reclaim", [&] { cache_.Reclaim(units, nullptr, {}); });
      const bool fails = Below(20) == 0;
      const auto fill = [&, format = format, row = row](uint32_t unit_row) {
        if (!fails) Write(unit_row, UnitsOf(kSimulationGeometry, format), row);
        return !fails;
      };
      bool woke = false;
      run("Wake", [&, format = format] { woke = cache_.Wake(format, tokens, fill, &waking); });
      if (!woke) break;
      ++woken;
    }
    run("EndWaking", [&] { cache_.EndWaking(); });
  }

  // One step: room is made, sequences are appended to, some are cancelled, "kernels" run or fail.
  void Step() {
    std::vector<KvConvert> converts;
    if (Below(3) == 0) {
      ++operations;
      const int blocks = Below(8);
      run("AgeBlocks", [&] { cache_.AgeBlocks(blocks, &converts); });
      aged += static_cast<int64_t>(converts.size());
    }
    if (Below(6) == 0) {
      ++operations;
      const int blocks = Below(8);
      const size_t before = converts.size();
      run("KeepBudget", [&] { cache_.KeepBudget(blocks, &converts); });
      within_budget += static_cast<int64_t>(converts.size() - before);
    }
    if (Below(6) == 0) {
      ++operations;
      const int64_t wanted = Below(static_cast<int>(cache_.total_rows() / 2) + 1);
      const size_t before = converts.size();
      const int64_t could = cache_.free_rows() + cache_.ReclaimableRows();
      const bool converts_too = Below(4) != 0;
      const KvCache::Sleep sleep = Sleep();
      int64_t free = 0;
      run("Reclaim", [&] { free = cache_.Reclaim(wanted, converts_too ? &converts : nullptr, sleep); });
      EXPECT_EQ(free, cache_.free_rows());
      EXPECT_LE(free, could);
      if (converts_too) {
        EXPECT_GE(free, std::min(wanted, could)) << "what was promised";
      }
      demoted += static_cast<int64_t>(converts.size() - before);
    }
    std::vector<std::pair<KvStore, std::vector<Truth>>> stores;
    std::map<SequenceId, int32_t> before;
    bool was_fragmented = false, was_refused = false;
    std::vector<SequenceId> ids;
    for (const auto& [id, sequence] : model_) ids.push_back(id);
    std::shuffle(ids.begin(), ids.end(), random_);
    for (const SequenceId id : ids) {
      if (!model_.contains(id) || Below(3) == 0) continue;
      ModelSequence& sequence = model_[id];
      const int32_t left =
          std::min(static_cast<int32_t>(sequence.tokens.size()) - sequence.length, cache_.NextStop(id));
      if (left == 0) continue;
      ++operations;
      const int32_t count = std::min(left, Below(2) == 0 ? 1 + Below(5) : 1 + Below(300));
      const auto tokens = std::span(sequence.tokens)
                              .subspan(static_cast<size_t>(sequence.length), static_cast<size_t>(count));
      const int64_t rows = cache_.RowsToAppend(id, tokens);
      const bool surely_fits = cache_.FitsWithoutCompaction(rows), fits = cache_.Fits(rows);
      KvAppend append;
      const int64_t faults = faults_so_far();
      Status status;
      run("Append", [&] { status = cache_.Append(id, tokens, &append); });
      if (!status.ok()) {
        EXPECT_EQ(status.code(), Code::kResourceExhausted);
        EXPECT_FALSE(surely_fits && faults_so_far() == faults);
        EXPECT_EQ(cache_.Length(id), sequence.length);
        ++(fits ? fragmented : refused);
        (fits ? was_fragmented : was_refused) = true;
        continue;
      }
      before[id] = sequence.length;
      appended += count;
      converts.insert(converts.end(), append.converts.begin(), append.converts.end());
      int32_t row = 0;
      for (const KvStore& store : append.stores) {
        EXPECT_EQ(store.row_begin, row);
        row += store.rows;
        const auto begin = sequence.truth.begin() + sequence.length + store.row_begin;
        stores.emplace_back(store, std::vector<Truth>(begin, begin + store.rows));
      }
      EXPECT_EQ(row, count);
      sequence.length += count;
      if (Below(80) == 0) {  // a participant or a bystander goes in the middle of the step
        const SequenceId gone = Any();
        before.erase(gone);
        Free(gone);
      }
    }
    if (Below(50) == 0) return Abort();

    for (const KvConvert& convert : converts) Execute(convert);
    for (const auto& [id, length] : before) CheckView(id, length);
    // Independent stores may run in any order.
    std::stable_sort(stores.begin(), stores.end(), [salt = random_()](const auto& a, const auto& b) {
      return (a.first.tail_row * 2654435761u ^ salt) < (b.first.tail_row * 2654435761u ^ salt);
    });
    for (const auto& [store, truth] : stores) Execute(store, truth);
    run("FinishStep", [&] { cache_.FinishStep(); });
    for (auto& [id, sequence] : model_) {
      if (!before.contains(id)) continue;
      EXPECT_GE(cache_.Length(id), sequence.length);
      sequence.length = cache_.Length(id);  // it may have come to a matched run
      CheckSequence(id);
    }
    if (was_fragmented) Compact();
    // A full cache makes room most of the time, else nothing would happen any more.
    if (was_refused && !model_.empty() && Below(3) > 0) Free(Any());
  }

  // The kernels may have done anything to what this step converts and writes.
  void Abort() {
    ++aborted;
    run("AbortStep", [&] { cache_.AbortStep(); });
    std::vector<SequenceId> lost;
    for (const auto& [id, sequence] : model_) {
      if (cache_.Lost(id)) lost.push_back(id);
    }
    for (const SequenceId id : lost) Free(id);
    Integrity();
    for (const auto& [id, sequence] : model_) CheckSequence(id);
  }

  // The slots of a block, which must be alike in all its rows as far as it has tokens: looked at are the
  // first, the last and one in turn.
  const Row& Read(uint32_t unit_row, int units, int tokens) {
    const Row& first = memory_[unit_row];
    for (const int r : {units - 1, static_cast<int>(++looked_at_ % static_cast<uint32_t>(units))}) {
      EXPECT_TRUE(std::equal(first.begin(), first.begin() + tokens,
                             memory_[unit_row + static_cast<uint32_t>(r)].begin()))
          << "two blocks wrote to one place";
    }
    return first;
  }
  void Write(uint32_t unit_row, int units, const Row& row) {
    for (int r = 0; r < units; ++r) memory_[unit_row + static_cast<uint32_t>(r)] = row;
  }
  static int Units(Format format, int capacity) {
    return UnitsOf(kSimulationGeometry, format) * (format == Format::kBf16 ? capacity : kBlockTokens) /
           kBlockTokens;
  }
  void Execute(const KvConvert& convert) {
    const Row row = Read(convert.from_row, UnitsOf(kSimulationGeometry, convert.from), kBlockTokens);
    Write(convert.to_row, UnitsOf(kSimulationGeometry, convert.to), row);
  }
  void Execute(const KvStore& store, const std::vector<Truth>& truth) {
    Row row{};
    if (store.from_tail > 0) {
      row = Read(store.tail_row, Units(Format::kBf16, store.tail_capacity), store.from_tail);
    }
    for (size_t i = 0; i < truth.size(); ++i) row[store.from_tail + i] = truth[i];
    EXPECT_TRUE(store.format == Format::kBf16 || store.from_tail + store.rows == kBlockTokens);
    EXPECT_LE(store.from_tail + store.rows, store.capacity);
    Write(store.unit_row, Units(store.format, store.capacity), row);
  }

  // What attention reads are the first `length` tokens, each once; the view is sorted by format.
  void CheckView(SequenceId id, int32_t length) {
    int32_t tokens = 0;
    Truth sum = 0;  // of hashes: other tokens have another
    Format last = Format::kK2V2;
    for (const KvBlockRef& ref : cache_.View(id)) {
      ASSERT_GE(ref.format, last);
      last = ref.format;
      const Row& row = Read(ref.unit_row, Units(ref.format, ref.capacity), ref.tokens);
      sum = std::accumulate(row.begin(), row.begin() + ref.tokens, sum);
      tokens += ref.tokens;
    }
    ASSERT_EQ(tokens, length);
    ASSERT_EQ(sum, length == 0 ? 0 : model_[id].sums[static_cast<size_t>(length) - 1]);
  }

  void CheckSequence(SequenceId id) {
    const ModelSequence& sequence = model_[id];
    ASSERT_EQ(cache_.Length(id), sequence.length);
    CheckView(id, sequence.length);
    int32_t position = 0;
    for (const KvBlock* block : cache_.Blocks(id)) {
      ASSERT_EQ(block->position, position);
      ASSERT_GE(block->format, sequence.min_format);
      for (int i = 0; i < block->tokens; ++i, ++position) {
        ASSERT_EQ(block->contents[static_cast<size_t>(i)],
                  sequence.tokens[static_cast<size_t>(position)].content);
      }
    }
    ASSERT_EQ(position, sequence.length);
  }

  const SimulationSetting setting_;
  std::mt19937 random_;
  KvCache cache_;
  std::vector<Row> memory_;
  uint32_t looked_at_ = 0;
  std::map<SequenceId, ModelSequence> model_;
  std::vector<std::pair<std::string, std::vector<KvToken>>> known_;  // conversations that may go on
  std::unordered_map<BlockKey, std::pair<Format, Row>, BlockKeyHash> asleep_;
};

}  // namespace triaxial

#endif  // TRIAXIAL_KV_CACHE_SIMULATION_TESTING_H_
