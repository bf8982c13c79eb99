#include "ops/kv_store.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "base/float16.h"

namespace triaxial {
namespace {

constexpr Format kQuantized[] = {Format::kK2V2, Format::kK4V2, Format::kK4V4, Format::kFp8};

KvGeometry Geometry(Codec codec, int head_dim = 128) { return {1, 3, head_dim, codec}; }

// One layer's rows; filled with bytes that are NaN as BF16 and as FP16, as memory that was used before may
// be.
std::vector<uint8_t> DirtyArena(const KvGeometry& g, int rows) {
  return std::vector<uint8_t>(static_cast<size_t>(rows * UnitRowBytes(g)), 0xff);
}

std::vector<float> RandomRows(const KvGeometry& g, int rows, uint32_t seed) {
  std::mt19937 rng(seed);
  std::normal_distribution<float> normal;
  std::vector<float> x(static_cast<size_t>(rows * g.num_kv_heads * g.head_dim));
  for (float& value : x) value = normal(rng) * 3.0f;
  return x;
}

// What one head of a block must hold: the scalar codec over its rows, rounded to BF16.
std::vector<uint8_t> ExpectedHead(const KvGeometry& g, Format f, const ClipRatios& clip, const float* k,
                                  const float* v, int first_row, int rows, int head,
                                  int capacity = kBlockTokens) {
  std::vector<float> side[2];
  for (int t = first_row; t < first_row + rows; ++t) {
    for (int c = 0; c < g.head_dim; ++c) {
      const int i = (t * g.num_kv_heads + head) * g.head_dim + c;
      side[0].push_back(Bf16ToFloat(FloatToBf16(k[i])));
      side[1].push_back(Bf16ToFloat(FloatToBf16(v[i])));
    }
  }
  std::vector<uint8_t> out(static_cast<size_t>(HeadBytes(g, f, capacity)));
  EncodeBlockScalar(g, f, clip, side[0].data(), side[1].data(), g.head_dim, rows, out.data(), capacity);
  return out;
}

void ExpectBlock(const KvGeometry& g, Format f, const ClipRatios& clip, const std::vector<uint8_t>& arena,
                 uint32_t unit_row, const std::vector<float>& k, const std::vector<float>& v, int first_row,
                 int rows, int capacity = kBlockTokens) {
  for (int head = 0; head < g.num_kv_heads; ++head) {
    const auto expected = ExpectedHead(g, f, clip, k.data(), v.data(), first_row, rows, head, capacity);
    const uint8_t* got = arena.data() + unit_row * UnitRowBytes(g) + head * HeadBytes(g, f, capacity);
    ASSERT_TRUE(std::equal(expected.begin(), expected.end(), got))
        << Name(g.codec) << " " << Name(f) << ", head " << head << ", rows from " << first_row;
  }
}

// A prompt of 150 tokens after a tail of 23: the tail's block, one whole block, and 45 tokens in the tail
// again, at the same row, which must be read before it is written.
TEST(StoreKv, CompletesTheTailStoresWholeBlocksAndReopensTheTail) {
  for (const Codec codec : {Codec::kRotated, Codec::kPaper}) {
    for (const Format f : kQuantized) {
      for (const int head_dim : {64, 128}) {
        const KvGeometry g = Geometry(codec, head_dim);
        const ClipRatios clip{0.9f, 0.96f};
        const uint32_t tail = 0, first = static_cast<uint32_t>(UnitsOf(g, Format::kBf16));
        const uint32_t second = first + static_cast<uint32_t>(UnitsOf(g, f));
        auto arena = DirtyArena(g, static_cast<int>(second) + UnitsOf(g, f) + 1);
        const auto k = RandomRows(g, 173, 1), v = RandomRows(g, 173, 2);
        const KvStore fill{tail, tail, 0, 0, 23, Format::kBf16};
        StoreKv(g, clip, arena.data(), k.data(), v.data(), {&fill, 1});
        ExpectBlock(g, Format::kBf16, clip, arena, tail, k, v, 0, 23);

        const KvStore stores[] = {{first, tail, 0, 23, 41, f},
                                  {second, second, 41, 0, 64, f},
                                  {tail, tail, 105, 0, 45, Format::kBf16}};
        const int64_t done = int64_t{23} * g.num_kv_heads * g.head_dim;
        StoreKv(g, clip, arena.data(), k.data() + done, v.data() + done, stores);
        ExpectBlock(g, f, clip, arena, first, k, v, 0, 64);
        ExpectBlock(g, f, clip, arena, second, k, v, 64, 64);
        ExpectBlock(g, Format::kBf16, clip, arena, tail, k, v, 128, 45);
        // Nothing was written past the last block.
        for (auto p = arena.end() - UnitRowBytes(g); p != arena.end(); ++p) ASSERT_EQ(*p, 0xff);
      }
    }
  }
}

// The bytes of a block depend on its tokens alone, not on the steps that brought them.
TEST(StoreKv, ChunkingDoesNotChangeABlock) {
  const KvGeometry g = Geometry(Codec::kRotated);
  const auto k = RandomRows(g, 64, 3), v = RandomRows(g, 64, 4);
  const uint32_t tail = 0, block = 128;
  std::vector<uint8_t> whole;
  std::mt19937 rng(5);
  for (int round = 0; round < 20; ++round) {
    auto arena = DirtyArena(g, 128 + UnitsOf(g, Format::kK4V2));
    int done = 0;
    while (done < 64) {
      const int rows = round == 0 ? 64 : std::min(64 - done, static_cast<int>(rng() % 30) + 1);
      const bool completes = done + rows == 64;
      const KvStore store{completes ? block : tail,
                          completes && done == 0 ? block : tail,
                          done,
                          static_cast<uint8_t>(done),
                          static_cast<uint8_t>(rows),
                          completes ? Format::kK4V2 : Format::kBf16};
      StoreKv(g, {}, arena.data(), k.data(), v.data(), {&store, 1});
      done += rows;
    }
    const std::vector<uint8_t> stored(arena.begin() + block * UnitRowBytes(g), arena.end());
    if (round == 0) whole = stored;
    ASSERT_EQ(stored, whole) << round;
  }
}

TEST(StoreKv, OneTokenAtATimeFillsATail) {
  const KvGeometry g = Geometry(Codec::kPaper, 64);
  auto arena = DirtyArena(g, UnitsOf(g, Format::kBf16));
  const auto k = RandomRows(g, 64, 6), v = RandomRows(g, 64, 7);
  for (int t = 0; t < 64; ++t) {
    const KvStore store{0, 0, t, static_cast<uint8_t>(t), 1, Format::kBf16};
    StoreKv(g, {}, arena.data(), k.data(), v.data(), {&store, 1});
    if (t % 9 == 0 || t == 63) ExpectBlock(g, Format::kBf16, {}, arena, 0, k, v, 0, t + 1);
  }
}

// A tail that grows from place to place as it needs room, and is completed from each capacity; its bytes are
// those of a tail that was always so large, and the block's are those of its tokens.
TEST(StoreKv, TailsGrowAndAreCompletedFromEveryCapacity) {
  std::mt19937 rng(14);
  for (int round = 0; round < 60; ++round) {
    const KvGeometry g = Geometry(round % 2 == 0 ? Codec::kRotated : Codec::kPaper, round % 4 < 2 ? 64 : 128);
    const Format f = static_cast<Format>(rng() % kFormats);
    const auto k = RandomRows(g, 64, rng()), v = RandomRows(g, 64, rng());
    // A place for each capacity, then one for the block, then a row that nobody writes.
    std::array<uint32_t, 6> place{};
    for (int i = 0; i < 4; ++i) {
      place[static_cast<size_t>(i + 1)] =
          place[static_cast<size_t>(i)] +
          static_cast<uint32_t>(UnitsOf(g, Format::kBf16, kTailStep * (i + 1)));
    }
    place[5] = place[4] + static_cast<uint32_t>(UnitsOf(g, f));
    auto arena = DirtyArena(g, static_cast<int>(place[5]) + 1);

    int done = 0, capacity = 0;
    while (done < 64) {
      const int rows = std::min(64 - done, 1 + static_cast<int>(rng() % (round % 3 == 0 ? 40 : 12)));
      const int room = std::max(capacity, (done + rows + 15) / 16 * 16);
      const auto place_of = [&](int c) { return place[static_cast<size_t>(c / kTailStep - 1)]; };
      KvStore store{
          .row_begin = done, .from_tail = static_cast<uint8_t>(done), .rows = static_cast<uint8_t>(rows)};
      const bool completes = done + rows == 64;
      store.unit_row = completes ? place[4] : place_of(room);
      store.format = completes ? f : Format::kBf16;
      store.capacity = static_cast<uint8_t>(room);
      store.tail_row = done == 0 ? store.unit_row : place_of(capacity);
      store.tail_capacity = static_cast<uint8_t>(done == 0 ? room : capacity);
      StoreKv(g, {}, arena.data(), k.data(), v.data(), {&store, 1});
      done += rows;
      capacity = room;
      if (completes) {
        ExpectBlock(g, f, {}, arena, place[4], k, v, 0, 64);
      } else {
        ExpectBlock(g, Format::kBf16, {}, arena, store.unit_row, k, v, 0, done, room);
      }
    }
    for (auto p = arena.end() - UnitRowBytes(g); p != arena.end(); ++p) ASSERT_EQ(*p, 0xff) << round;
  }
}

// Many sequences in one step, each with its own tail, given in an order that interleaves them.
TEST(StoreKv, SequencesDoNotDisturbEachOther) {
  const KvGeometry g = Geometry(Codec::kRotated);
  const int units = UnitsOf(g, Format::kBf16), small = UnitsOf(g, Format::kK2V2);
  const int sequences = 12;
  auto arena = DirtyArena(g, sequences * (units + small));
  const auto k = RandomRows(g, sequences * 80, 8), v = RandomRows(g, sequences * 80, 9);
  std::vector<KvStore> stores;
  for (int pass = 0; pass < 2; ++pass) {
    for (int s = 0; s < sequences; ++s) {
      const uint32_t tail = static_cast<uint32_t>(s * units);
      const uint32_t block = static_cast<uint32_t>(sequences * units + s * small);
      if (pass == 0) stores.push_back({block, block, s * 80, 0, 64, Format::kK2V2});
      if (pass == 1) stores.push_back({tail, tail, s * 80 + 64, 0, 16, Format::kBf16});
    }
  }
  StoreKv(g, {}, arena.data(), k.data(), v.data(), stores);
  for (int s = 0; s < sequences; ++s) {
    ExpectBlock(g, Format::kK2V2, {}, arena, static_cast<uint32_t>(sequences * units + s * small), k, v,
                s * 80, 64);
    ExpectBlock(g, Format::kBf16, {}, arena, static_cast<uint32_t>(s * units), k, v, s * 80 + 64, 16);
  }
}

// A converted block is what the scalar codec makes of the values that the old format held, in its place or
// another. A side whose bits stay is what it was.
TEST(ConvertKv, RequantizesWhatTheBlockHeld) {
  for (const Codec codec : {Codec::kRotated, Codec::kPaper}) {
    for (const Format from : {Format::kBf16, Format::kFp8, Format::kK4V4, Format::kK4V2}) {
      for (const Format to : kQuantized) {
        for (const uint32_t to_row : {5u, 200u}) {
          const uint32_t from_row = 5;
          if (to_row == from_row && to > from) continue;
          const KvGeometry g = Geometry(codec);
          const ClipRatios clip{0.7f, 0.7f, 1.15f, 1.1f};
          auto arena = DirtyArena(g, 270);
          const auto k = RandomRows(g, 64, 10), v = RandomRows(g, 64, 11);
          std::vector<std::vector<uint8_t>> expected;
          for (int head = 0; head < g.num_kv_heads; ++head) {
            const auto old = ExpectedHead(g, from, clip, k.data(), v.data(), 0, 64, head);
            std::copy(old.begin(), old.end(),
                      arena.begin() + from_row * UnitRowBytes(g) + head * HeadBytes(g, from));
            std::vector<float> values[2];
            for (const Side side : {Side::kK, Side::kV}) {
              auto& x = values[static_cast<int>(side)];
              x.resize(static_cast<size_t>(64 * g.head_dim));
              DecodeSideScalar(g, from, side, old.data(), 64, x.data());
            }
            expected.emplace_back(static_cast<size_t>(HeadBytes(g, to)));
            EncodeBlockScalar(g, to, clip, values[0].data(), values[1].data(), g.head_dim, 64,
                              expected.back().data());
            for (const Side side : {Side::kK, Side::kV}) {
              if (Bits(from, side) != Bits(to, side)) continue;
              std::copy_n(old.begin() + SideOffset(g, from, side), SideBytes(g, Bits(from, side)),
                          expected.back().begin() + SideOffset(g, to, side));
            }
          }
          const KvConvert convert{from_row, to_row, from, to};
          ConvertKv(g, clip, arena.data(), {&convert, 1});
          for (int head = 0; head < g.num_kv_heads; ++head) {
            const uint8_t* got = arena.data() + to_row * UnitRowBytes(g) + head * HeadBytes(g, to);
            const auto& want = expected[static_cast<size_t>(head)];
            ASSERT_TRUE(std::equal(want.begin(), want.end(), got))
                << Name(codec) << " " << Name(from) << " to " << Name(to) << " at " << to_row;
          }
        }
      }
    }
  }
}

// Neighbours that become smaller where they are: each stays within what it had.
TEST(ConvertKv, InPlaceBesideOthers) {
  const KvGeometry g = Geometry(Codec::kRotated, 64);
  constexpr int kBlocks = 5;
  const int units = UnitsOf(g, Format::kBf16);
  auto arena = DirtyArena(g, kBlocks * units);
  const auto k = RandomRows(g, kBlocks * 64, 15), v = RandomRows(g, kBlocks * 64, 16);
  std::vector<KvStore> stores;
  std::vector<KvConvert> converts;
  for (int i = 0; i < kBlocks; ++i) {
    const auto row = static_cast<uint32_t>(i * units);
    stores.push_back({row, row, i * 64, 0, 64, Format::kBf16});
    if (i % 2 == 1) converts.push_back({row, row, Format::kBf16, kQuantized[i % 3]});
  }
  StoreKv(g, {}, arena.data(), k.data(), v.data(), stores);
  const auto before = arena;
  ConvertKv(g, {}, arena.data(), converts);
  for (int i = 0; i < kBlocks; ++i) {
    const auto row = static_cast<uint32_t>(i * units);
    const Format f = i % 2 == 1 ? kQuantized[i % 3] : Format::kBf16;
    ExpectBlock(g, f, {}, arena, row, k, v, i * 64, 64);
    const auto end = (row + static_cast<uint32_t>(UnitsOf(g, f))) * UnitRowBytes(g);
    const auto next = (row + static_cast<uint32_t>(units)) * UnitRowBytes(g);
    EXPECT_TRUE(std::equal(arena.begin() + end, arena.begin() + next, before.begin() + end)) << i;
  }
}

TEST(ConvertKv, ManyAtOnce) {
  const KvGeometry g = Geometry(Codec::kRotated);
  const int units = UnitsOf(g, Format::kBf16), small = UnitsOf(g, Format::kK4V4);
  const int blocks = 7;
  auto arena = DirtyArena(g, blocks * (units + small));
  const auto k = RandomRows(g, blocks * 64, 12), v = RandomRows(g, blocks * 64, 13);
  std::vector<KvStore> stores;
  std::vector<KvConvert> converts;
  for (int i = 0; i < blocks; ++i) {
    const uint32_t from = static_cast<uint32_t>(i * units),
                   to = static_cast<uint32_t>(blocks * units + i * small);
    stores.push_back({from, from, i * 64, 0, 64, Format::kBf16});
    converts.push_back({from, to, Format::kBf16, Format::kK4V4});
  }
  StoreKv(g, {}, arena.data(), k.data(), v.data(), stores);
  ConvertKv(g, {}, arena.data(), converts);
  for (int i = 0; i < blocks; ++i) {
    ExpectBlock(g, Format::kK4V4, {}, arena, converts[static_cast<size_t>(i)].to_row, k, v, i * 64, 64);
  }
}

}  // namespace
}  // namespace triaxial
