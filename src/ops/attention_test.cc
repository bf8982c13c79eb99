#include "ops/attention.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <vector>

#include "base/float16.h"
#include "base/parallel.h"

namespace triaxial {
namespace {

constexpr KvGeometry kGeometry{1, 2, 64, Codec::kRotated};
constexpr int kHeads = 4;

// `rows` of query vectors of ones over in-step keys of zeros: every weight is equal.
struct Step {
  std::vector<float> q, k, v, out;
  explicit Step(int rows)
      : q(static_cast<size_t>(rows) * kHeads * 64, 1.0f),
        k(static_cast<size_t>(rows) * 2 * 64, 0.0f),
        v(k.size()),
        out(q.size(), NAN) {
    for (size_t i = 0; i < v.size(); ++i) v[i] = static_cast<float>(i / 128);  // the row
  }
  AttentionArgs Args(std::span<const AttentionSequence> sequences, const uint8_t* arena = nullptr) {
    return {kGeometry, kHeads, 0.125f, arena, q.data(), k.data(), v.data(), out.data(), sequences};
  }
};

TEST(Attention, RowsSeeEarlierRowsOfTheirOwnSequenceOnly) {
  Step step(5);
  const AttentionSequence sequences[] = {{0, 3, {}}, {3, 2, {}}};
  Attention().Run(step.Args(sequences));
  const float expected[] = {0, 0.5f, 1, 3, 3.5f};  // means of the row numbers seen
  for (size_t i = 0; i < step.out.size(); ++i) ASSERT_NEAR(step.out[i], expected[i / 256], 1e-6) << i;
}

TEST(Attention, NoSequencesWriteNothing) {
  Step step(1);
  Attention().Run(step.Args({}));
  for (const float x : step.out) ASSERT_TRUE(std::isnan(x));
}

TEST(Attention, SplitContextsGiveTheSameBitsForAnyNumberOfThreads) {
  const int units = UnitsOf(kGeometry, Format::kK2V2);
  const int block_bytes = units * static_cast<int>(UnitRowBytes(kGeometry));
  std::vector<uint8_t> arena(static_cast<size_t>(block_bytes) * 100);
  for (size_t i = 0; i < arena.size(); ++i) arena[i] = static_cast<uint8_t>(i * 2654435761u >> 13);
  std::vector<KvBlockRef> blocks;
  for (int b = 0; b < 100; ++b) {
    blocks.push_back({static_cast<uint32_t>(b * units), kBlockTokens, Format::kK2V2});
    for (int head = 0; head < 2; ++head) {
      for (const Side side : {Side::kK, Side::kV}) {
        uint8_t* meta = arena.data() + b * block_bytes + head * HeadBytes(kGeometry, Format::kK2V2) +
                        (side == Side::kV ? SideBytes(kGeometry, 2) : 0) + CodeBytes(kGeometry, 2);
        for (int i = 0; i < 2 * kBlockTokens; ++i) {
          const fp16_t x = FloatToFp16(i < kBlockTokens ? 0.5f : -0.75f);
          std::memcpy(meta + 2 * i, &x, 2);
        }
      }
    }
  }
  const AttentionSequence sequences[] = {{0, 1, blocks}, {1, 20, std::span(blocks).first(70)}};
  Step one(21), many(21);
  Attention attention;
  SetComputeThreads(1);
  attention.Run(one.Args(sequences, arena.data()));
  SetComputeThreads(5);
  attention.Run(many.Args(sequences, arena.data()));
  SetComputeThreads(0);
  EXPECT_FALSE(std::isnan(one.out[0]));
  EXPECT_EQ(std::memcmp(one.out.data(), many.out.data(), one.out.size() * sizeof(float)), 0);
}

}  // namespace
}  // namespace triaxial
