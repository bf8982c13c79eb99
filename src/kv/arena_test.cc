#include "kv/arena.h"

#include <gtest/gtest.h>

#include <cstring>
#include <random>
#include <utility>
#include <vector>

namespace triaxial {
namespace {

TEST(UnitAllocatorTest, SmallFromTheBottomLargeFromTheTop) {
  UnitAllocator allocator(100);
  EXPECT_EQ(allocator.Allocate(10, false), 0u);
  EXPECT_EQ(allocator.Allocate(30, true), 70u);
  EXPECT_EQ(allocator.Allocate(10, false), 10u);
  EXPECT_EQ(allocator.Allocate(30, true), 40u);
  EXPECT_EQ(allocator.free_rows(), 20);
  EXPECT_EQ(allocator.largest_run(), 20);
  EXPECT_EQ(allocator.Allocate(21, false), std::nullopt);
  EXPECT_EQ(allocator.Allocate(20, true), 20u);
  EXPECT_EQ(allocator.free_rows(), 0);
  EXPECT_EQ(allocator.largest_run(), 0);
  EXPECT_EQ(allocator.Allocate(1, false), std::nullopt);
}

TEST(UnitAllocatorTest, TakesTheTightestRun) {
  UnitAllocator allocator(100);
  for (const int rows : {30, 10, 12, 8, 10, 10, 12, 8}) ASSERT_TRUE(allocator.Allocate(rows, false));
  allocator.Free(0, 30);
  allocator.Free(40, 12);
  allocator.Free(60, 10);
  allocator.Free(80, 12);
  EXPECT_EQ(allocator.Allocate(11, false), 40u) << "lowest of the two runs of 12";
  EXPECT_EQ(allocator.Allocate(11, true), 81u) << "top of the highest run of 12";
  EXPECT_EQ(allocator.Allocate(10, false), 60u);
  EXPECT_EQ(allocator.Allocate(10, false), 0u);
}

TEST(UnitAllocatorTest, FreeRunsCoalesceOnBothSides) {
  UnitAllocator allocator(30);
  for (int i = 0; i < 3; ++i) ASSERT_TRUE(allocator.Allocate(10, false));
  allocator.Free(0, 10);
  allocator.Free(20, 10);
  EXPECT_EQ(allocator.largest_run(), 10);
  allocator.Free(10, 10);
  EXPECT_EQ(allocator.largest_run(), 30);
  EXPECT_EQ(allocator.free_runs().size(), 1u);
}

TEST(UnitAllocatorTest, TheEndOfAnAllocationMayGoAlone) {
  UnitAllocator allocator(30);
  ASSERT_EQ(allocator.Allocate(20, false), 0u);
  ASSERT_EQ(allocator.Allocate(10, false), 20u);
  allocator.FreeEnd(15, 5);
  EXPECT_EQ(allocator.free_rows(), 5);
  allocator.FreeEnd(25, 5);
  EXPECT_EQ(allocator.free_runs().size(), 2u);
  allocator.Free(0, 15);
  EXPECT_EQ(allocator.largest_run(), 20);
  allocator.Free(20, 5);
  EXPECT_EQ(allocator.largest_run(), 30);
}

TEST(UnitAllocatorTest, AgreesWithABitmap) {
  constexpr int kRows = 200;
  UnitAllocator allocator(kRows);
  std::vector<bool> used(kRows, false);
  std::vector<std::pair<uint32_t, int>> held;
  std::mt19937 random(1);
  for (int step = 0; step < 20000; ++step) {
    if (held.empty() || random() % 2 == 0) {
      const int rows = 1 + static_cast<int>(random() % 24);
      const auto row = allocator.Allocate(rows, random() % 3 == 0);
      int run = 0, longest = 0;
      for (int r = 0; r < kRows; ++r) longest = std::max(longest, run = used[r] ? 0 : run + 1);
      ASSERT_EQ(row.has_value(), longest >= rows);
      if (!row) continue;
      for (int r = 0; r < rows; ++r) {
        ASSERT_FALSE(used.at(*row + r));
        used[*row + r] = true;
      }
      held.emplace_back(*row, rows);
    } else {
      const size_t i = random() % held.size();
      const auto [row, rows] = held[i];
      allocator.Free(row, rows);
      for (int r = 0; r < rows; ++r) used[row + r] = false;
      held.erase(held.begin() + static_cast<std::ptrdiff_t>(i));
    }
    int64_t free = 0;
    for (const bool u : used) free += !u;
    ASSERT_EQ(allocator.free_rows(), free);
    int64_t in_runs = 0;
    for (const auto& [row, length] : allocator.free_runs()) {
      in_runs += length;
      ASSERT_TRUE(row == 0 || used[row - 1]) << "runs must coalesce";
    }
    ASSERT_EQ(in_runs, free);
  }
}

TEST(UnitAllocatorDeathTest, FreeingTwiceIsOurBug) {
  UnitAllocator allocator(30);
  for (const int rows : {5, 5, 10}) ASSERT_TRUE(allocator.Allocate(rows, false));
  allocator.Free(5, 5);
  EXPECT_DEATH(allocator.Free(9, 2), "row");
  EXPECT_DEATH(allocator.Free(4, 2), "length");
  EXPECT_DEATH(allocator.Free(25, 6), "total_");
}

constexpr KvGeometry kGeometry{.num_layers = 3, .num_kv_heads = 2, .head_dim = 64};

TEST(KvArenaTest, RoundsDownToWholeRowsOverAllLayers) {
  const int64_t row = 3 * 2 * 256;
  Result<KvArena> arena = KvArena::Create(kGeometry, 100 * row + row - 1);
  ASSERT_TRUE(arena.ok()) << arena.status().message();
  EXPECT_EQ(arena->total_rows(), 100);
  EXPECT_EQ(arena->bytes(), 100 * row);
  for (int layer = 0; layer < 3; ++layer) {
    EXPECT_EQ(arena->LayerData(layer) - arena->LayerData(0), layer * 100 * 2 * 256);
    EXPECT_EQ(reinterpret_cast<uintptr_t>(arena->LayerData(layer)) % 64, 0u);
  }
  EXPECT_EQ(arena->LayerData(2)[100 * 2 * 256 - 1], 0);
}

TEST(KvArenaTest, MovesAllLayersAlsoOntoItself) {
  Result<KvArena> created = KvArena::Create(kGeometry, int64_t{100} * 3 * 2 * 256);
  ASSERT_TRUE(created.ok());
  KvArena arena = std::move(*created);
  const int row_bytes = 2 * 256;
  for (int layer = 0; layer < 3; ++layer) {
    for (int r = 0; r < 100; ++r)
      std::memset(arena.LayerData(layer) + r * row_bytes, layer * 100 + r % 100, row_bytes);
  }
  arena.Move(10, 7, 20);
  arena.Move(50, 55, 20);
  for (int layer = 0; layer < 3; ++layer) {
    for (int r = 0; r < 100; ++r) {
      const int from = r >= 7 && r < 27 ? r + 3 : r >= 55 && r < 75 ? r - 5 : r;
      const uint8_t* at = arena.LayerData(layer) + r * row_bytes;
      EXPECT_EQ(at[0], static_cast<uint8_t>(layer * 100 + from));
      EXPECT_EQ(at[row_bytes - 1], static_cast<uint8_t>(layer * 100 + from));
    }
  }
}

TEST(KvArenaTest, WhatIsReadCanBeWrittenElsewhere) {
  auto arena = KvArena::Create(kGeometry, BlockBytes(kGeometry, Format::kBf16));
  ASSERT_TRUE(arena.ok());
  const auto row_bytes = static_cast<size_t>(UnitRowBytes(kGeometry));
  for (int layer = 0; layer < kGeometry.num_layers; ++layer) {
    for (size_t i = 0; i < 3 * row_bytes; ++i) {
      arena->LayerData(layer)[5 * row_bytes + i] = static_cast<uint8_t>(layer * 7 + i * 13);
    }
  }
  std::vector<uint8_t> bytes(static_cast<size_t>(kGeometry.num_layers) * 3 * row_bytes);
  ASSERT_TRUE(arena->Read(5, 3, bytes.data()).ok());
  ASSERT_TRUE(arena->Write(1, 3, bytes.data()).ok());
  for (int layer = 0; layer < kGeometry.num_layers; ++layer) {
    const uint8_t* data = arena->LayerData(layer);
    EXPECT_EQ(std::memcmp(data + row_bytes, data + 5 * row_bytes, 3 * row_bytes), 0);
    EXPECT_EQ(data[0], 0);
    EXPECT_EQ(data[4 * row_bytes], 0);
  }
}

TEST(KvArenaTest, RefusesWhatCannotBe) {
  const int64_t block = BlockBytes(kGeometry, Format::kBf16);
  EXPECT_TRUE(KvArena::Create(kGeometry, block).ok());
  for (const int64_t bytes : {block - 1, int64_t{0}, int64_t{-5}, INT64_MIN}) {
    const Result<KvArena> arena = KvArena::Create(kGeometry, bytes);
    ASSERT_FALSE(arena.ok());
    EXPECT_EQ(arena.status().code(), Code::kInvalidArgument);
    EXPECT_NE(arena.status().message().find(std::to_string(block)), std::string::npos);
  }
  const Result<KvArena> too_large = KvArena::Create(kGeometry, INT64_MAX);
  ASSERT_FALSE(too_large.ok());
  EXPECT_EQ(too_large.status().code(), Code::kInvalidArgument);
  const Result<KvArena> refused = KvArena::Create({.num_layers = 1000, .num_kv_heads = 1000, .head_dim = 64},
                                                  int64_t{1} << 58);  // 256 PiB
  ASSERT_FALSE(refused.ok());
  EXPECT_EQ(refused.status().code(), Code::kResourceExhausted);
  EXPECT_NE(refused.status().message().find("--kv-memory"), std::string::npos);
  const Result<KvArena> absurd =
      KvArena::Create({.num_layers = INT32_MAX, .num_kv_heads = INT32_MAX, .head_dim = 128}, INT64_MAX);
  ASSERT_FALSE(absurd.ok());
  EXPECT_EQ(absurd.status().code(), Code::kInvalidArgument);
}

}  // namespace
}  // namespace triaxial
