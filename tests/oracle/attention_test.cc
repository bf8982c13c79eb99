// Fused attention against a float64 reference over the dequantized cache, on every instruction set that this
// machine has.
#include "ops/attention.h"

#include <gtest/gtest.h>
#include <hwy/highway.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "base/float16.h"
#include "base/parallel.h"
#include "kv/codec.h"
#include "ops/attention_amx.h"

namespace triaxial {
namespace {

constexpr Format kAllFormats[] = {Format::kK2V2, Format::kK4V2, Format::kK4V4, Format::kFp8, Format::kBf16};
constexpr uint8_t kNanByte = 0xff;  // FP16, BF16 and F32 of it are not numbers

struct SequenceShape {
  int rows = 1;
  std::vector<KvBlockRef> blocks;  // unit_row is filled in
};

// A step over a cache of random content.
struct Case {
  KvGeometry g;
  int group = 1;
  float q_size = 1;
  float k_size = 1;
  std::vector<SequenceShape> shapes;

  std::vector<uint8_t> arena;
  std::vector<float> q, k, v;
  std::vector<AttentionSequence> sequences;
  int rows = 0;

  int heads() const { return g.num_kv_heads * group; }

  void Fill(uint32_t seed) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    uint32_t unit_rows = 0;
    rows = 0;
    for (SequenceShape& shape : shapes) {
      for (KvBlockRef& block : shape.blocks) {
        block.unit_row = unit_rows;
        unit_rows += static_cast<uint32_t>(UnitsOf(g, block.format, block.capacity));
      }
      rows += shape.rows;
    }
    arena.assign(unit_rows * static_cast<size_t>(UnitRowBytes(g)), kNanByte);
    std::vector<float> keys(static_cast<size_t>(kBlockTokens * g.head_dim)), values(keys.size());
    for (const SequenceShape& shape : shapes) {
      for (const KvBlockRef& block : shape.blocks) {
        for (int head = 0; head < g.num_kv_heads; ++head) {
          for (size_t i = 0; i < keys.size(); ++i) {
            const size_t channel = i % static_cast<size_t>(g.head_dim);
            keys[i] = normal(random) * k_size * (channel == 5 ? 8.0f : 1.0f);
            values[i] = normal(random);
          }
          EncodeBlockScalar(g, block.format, {}, keys.data(), values.data(), g.head_dim, block.tokens,
                            Head(block, head), block.capacity);
          if (block.format == Format::kBf16) PoisonPastTokens(block, head);
        }
      }
    }
    q.resize(static_cast<size_t>(rows) * heads() * g.head_dim);
    k.resize(static_cast<size_t>(rows) * g.num_kv_heads * g.head_dim);
    v.resize(k.size());
    for (float& x : q) x = normal(random) * q_size;
    for (float& x : k) x = normal(random) * k_size;
    for (float& x : v) x = normal(random);
    sequences.clear();
    int row = 0;
    for (const SequenceShape& shape : shapes) {
      sequences.push_back({row, shape.rows, shape.blocks});
      row += shape.rows;
    }
  }

  uint8_t* Head(const KvBlockRef& block, int head) {
    return arena.data() + block.unit_row * UnitRowBytes(g) +
           head * HeadBytes(g, block.format, block.capacity);
  }

  // What lies past the tokens of a tail may be anything.
  void PoisonPastTokens(const KvBlockRef& block, int head) {
    for (int t = block.tokens; t < block.capacity; ++t) {
      for (int c = 0; c < g.head_dim; ++c) {
        std::memset(Head(block, head) + 2 * PlaceOfBf16(c, t, block.capacity), kNanByte, 2);
        std::memset(Head(block, head) + SideBytes(g, 16, block.capacity) + 2 * PlaceOfBf16(t, c, g.head_dim),
                    kNanByte, 2);
      }
    }
  }

  std::vector<float> Run(Attention& attention) const {
    std::vector<float> out(q.size(), NAN);
    attention.Run({.geometry = g,
                   .num_heads = heads(),
                   .scale = 1.0f / std::sqrt(static_cast<float>(g.head_dim)),
                   .arena = arena.data(),
                   .q = q.data(),
                   .k = k.data(),
                   .v = v.data(),
                   .out = out.data(),
                   .sequences = sequences});
    return out;
  }

  std::vector<double> Reference() {
    std::vector<double> out(q.size());
    for (const AttentionSequence& sequence : sequences) {
      for (int head = 0; head < g.num_kv_heads; ++head) {
        std::vector<float> keys, values;
        for (const KvBlockRef& block : sequence.blocks) {
          const size_t at = keys.size();
          keys.resize(at + static_cast<size_t>(block.tokens * g.head_dim));
          values.resize(keys.size());
          const uint8_t* stored = Head(block, head);
          DecodeSideScalar(g, block.format, Side::kK, stored, block.tokens, keys.data() + at, block.capacity);
          DecodeSideScalar(g, block.format, Side::kV, stored, block.tokens, values.data() + at,
                           block.capacity);
        }
        const size_t prefix = keys.size() / static_cast<size_t>(g.head_dim);
        for (int row = 0; row < sequence.rows; ++row) {
          const size_t place = static_cast<size_t>((sequence.row_begin + row) * g.num_kv_heads + head) *
                               static_cast<size_t>(g.head_dim);
          keys.insert(keys.end(), k.data() + place, k.data() + place + g.head_dim);
          values.insert(values.end(), v.data() + place, v.data() + place + g.head_dim);
        }
        for (int row = 0; row < sequence.rows; ++row) {
          for (int i = 0; i < group; ++i) {
            const size_t place =
                static_cast<size_t>((sequence.row_begin + row) * heads() + head * group + i) *
                static_cast<size_t>(g.head_dim);
            ReferenceQuery(q.data() + place, keys, values, prefix + static_cast<size_t>(row) + 1,
                           out.data() + place);
          }
        }
      }
    }
    return out;
  }

  void ReferenceQuery(const float* query, const std::vector<float>& keys, const std::vector<float>& values,
                      size_t tokens, double* out) const {
    const auto dim = static_cast<size_t>(g.head_dim);
    const double scale = 1.0f / std::sqrt(static_cast<float>(g.head_dim));
    std::vector<double> scores(tokens);
    for (size_t t = 0; t < tokens; ++t) {
      double dot = 0;
      for (size_t c = 0; c < dim; ++c) dot += static_cast<double>(query[c]) * keys[t * dim + c];
      scores[t] = dot * scale;
    }
    const double top = *std::max_element(scores.begin(), scores.end());
    double sum = 0;
    for (size_t t = 0; t < tokens; ++t) {
      const double weight = std::exp(scores[t] - top);
      sum += weight;
      for (size_t c = 0; c < dim; ++c) out[c] += weight * values[t * dim + c];
    }
    for (size_t c = 0; c < dim; ++c) out[c] /= sum;
  }
};

// Largest over the query vectors of |out - expected| / |expected|.
double RelativeError(const std::vector<float>& out, const std::vector<double>& expected, int head_dim) {
  double worst = 0;
  for (size_t at = 0; at < out.size(); at += static_cast<size_t>(head_dim)) {
    double error = 0, size = 0;
    for (size_t i = at; i < at + static_cast<size_t>(head_dim); ++i) {
      const double difference = out[i] - expected[i];
      error += difference * difference;
      size += expected[i] * expected[i];
    }
    const double relative = std::sqrt(error / size);
    if (!(relative <= worst)) worst = relative;  // keeps NaN
    if (std::isnan(worst)) return worst;
  }
  return worst;
}

// Runs a case on the fastest path and on the portable one of each instruction set.
void ExpectClose(Case& c, double tolerance, const std::string& what) {
  const std::vector<double> expected = c.Reference();
  Attention fastest;
  const double error = RelativeError(c.Run(fastest), expected, c.g.head_dim);
  EXPECT_LT(error, tolerance) << what << ", fastest path";
  Attention portable(Element::kF32, AttentionPath::kPortable);
  for (const uint32_t target : hwy::SupportedAndGeneratedTargets()) {
    hwy::SetSupportedTargetsForTest(target);
    const double portable_error = RelativeError(c.Run(portable), expected, c.g.head_dim);
    EXPECT_LT(portable_error, tolerance) << what << ", portable path, " << hwy::TargetName(target);
  }
  hwy::SetSupportedTargetsForTest(0);
}

std::vector<KvBlockRef> Blocks(int count, Format format, int tail_tokens) {
  std::vector<KvBlockRef> blocks(static_cast<size_t>(count), {0, kBlockTokens, format});
  if (tail_tokens > 0) blocks.push_back({0, static_cast<uint8_t>(tail_tokens), Format::kBf16});
  return blocks;
}

TEST(AttentionOracle, EveryFormatCodecHeadSizeAndGroup) {
  uint32_t seed = 1;
  for (const Codec codec : {Codec::kRotated, Codec::kPaper}) {
    for (const Format format : kAllFormats) {
      for (const int head_dim : {64, 128}) {
        for (const int group : {1, 2, 3, 4, 5, 8, 16}) {
          Case c{.g = {1, 2, head_dim, codec}, .group = group};
          c.shapes = {{1, Blocks(3, format, 0)}};
          c.Fill(seed++);
          ExpectClose(c, 1e-4,
                      std::string(Name(codec)) + " " + std::string(Name(format)) + " dim " +
                          std::to_string(head_dim) + " group " + std::to_string(group));
        }
      }
    }
  }
}

TEST(AttentionOracle, PartialBlocks) {
  for (const int tokens : {1, 2, 3, 4, 15, 16, 17, 31, 33, 62, 63}) {
    for (const Format format : {Format::kK2V2, Format::kK4V4, Format::kFp8, Format::kBf16}) {
      Case c{.g = {1, 1, 128, Codec::kRotated}, .group = 2};
      c.shapes = {{1, {{0, static_cast<uint8_t>(tokens), format}}}};
      c.Fill(static_cast<uint32_t>(tokens));
      ExpectClose(c, 1e-4, std::string(Name(format)) + " of " + std::to_string(tokens) + " tokens");
    }
  }
}

// Blocks with room for fewer than 64 tokens, alone and between others, for one row and for many.
TEST(AttentionOracle, TailsOfEveryCapacity) {
  uint32_t seed = 1;
  for (const int head_dim : {64, 128}) {
    for (const uint8_t capacity : {16, 32, 48, 64}) {
      for (const int tokens : {1, 2, capacity - 15, capacity - 1, int{capacity}}) {
        const KvBlockRef tail{0, static_cast<uint8_t>(tokens), Format::kBf16, capacity};
        Case c{.g = {1, 2, head_dim, Codec::kRotated}, .group = 3};
        c.shapes = {{1, {tail}},
                    {1, {{0, kBlockTokens, Format::kK2V2}, tail}},
                    {20, {{0, kBlockTokens, Format::kBf16}, tail}}};
        c.Fill(seed++);
        ExpectClose(c, 1e-4,
                    std::to_string(tokens) + " tokens of " + std::to_string(capacity) + ", dim " +
                        std::to_string(head_dim));
      }
    }
  }
}

TEST(AttentionOracle, StepWithoutPrefixIsCausal) {
  for (const int rows : {1, 2, 7, 63, 64, 65, 130}) {
    for (const int group : {1, 2, 8}) {
      Case c{.g = {1, 2, 128, Codec::kRotated}, .group = group};
      c.shapes = {{rows, {}}};
      c.Fill(static_cast<uint32_t>(rows));
      ExpectClose(c, 1e-4, std::to_string(rows) + " rows, group " + std::to_string(group));
    }
  }
}

TEST(AttentionOracle, RaggedBatchesOfMixedFormats) {
  std::mt19937 random(7);
  const auto pick = [&](int low, int high) { return std::uniform_int_distribution<int>(low, high)(random); };
  for (int round = 0; round < 12; ++round) {
    Case c{.g = {1, pick(1, 3), pick(0, 1) ? 64 : 128, pick(0, 2) ? Codec::kRotated : Codec::kPaper},
           .group = pick(1, 16)};
    for (int s = pick(1, 5); s > 0; --s) {
      SequenceShape shape{.rows = pick(0, 2) ? 1 : pick(2, 40), .blocks = {}};
      for (int b = pick(0, 6); b > 0; --b) {
        shape.blocks.push_back({0, kBlockTokens, static_cast<Format>(pick(0, kFormats - 1))});
      }
      for (int tails = pick(0, 2); tails > 0; --tails) {
        const int capacity = kTailStep * pick(1, 4);
        const KvBlockRef tail{0, static_cast<uint8_t>(pick(1, capacity)), Format::kBf16,
                              static_cast<uint8_t>(capacity)};
        shape.blocks.insert(shape.blocks.begin() + pick(0, static_cast<int>(shape.blocks.size())), tail);
      }
      c.shapes.push_back(shape);
    }
    c.Fill(static_cast<uint32_t>(round));
    ExpectClose(c, 1e-4, "round " + std::to_string(round));
  }
}

// Scores in the hundreds: the softmax is nearly one-hot, tops rise by hundreds from tile to tile, and naive
// exponentials overflow.
TEST(AttentionOracle, ExtremeLogits) {
  for (const Codec codec : {Codec::kRotated, Codec::kPaper}) {
    for (const Format format : kAllFormats) {
      for (const float size : {8.0f, 32.0f}) {
        Case c{.g = {1, 1, 128, codec}, .group = 4, .q_size = size, .k_size = size};
        c.shapes = {{1, Blocks(6, format, 9)}, {5, Blocks(2, format, 0)}};
        c.Fill(static_cast<uint32_t>(size));
        ExpectClose(c, 1e-3, std::string(Name(codec)) + " " + std::string(Name(format)));
      }
    }
  }
}

// All queries and keys zero: plain means, which no rounding of scores can spoil, and groups of zero range.
TEST(AttentionOracle, ZeroQueriesGiveTheMean) {
  for (const Codec codec : {Codec::kRotated, Codec::kPaper}) {
    Case c{.g = {1, 2, 64, codec}, .group = 2, .q_size = 0, .k_size = 0};
    c.shapes = {{3, Blocks(2, Format::kK2V2, 5)}};
    c.Fill(3);
    ExpectClose(c, 1e-4, std::string(Name(codec)));
  }
}

TEST(AttentionOracle, LongContextsOfMixedFormats) {
  for (const Codec codec : {Codec::kRotated, Codec::kPaper}) {
    Case c{.g = {1, 1, 128, codec}, .group = 2};
    SequenceShape shape;
    for (int b = 0; b < 512; ++b) {
      shape.blocks.push_back({0, kBlockTokens, static_cast<Format>(b / 100 % kFormats)});
    }
    shape.blocks.push_back({0, 21, Format::kBf16});
    c.shapes = {shape};
    c.Fill(11);
    ExpectClose(c, 1e-4, std::string(Name(codec)));
  }
}

// ---- Many rows in BF16: inputs are BF16 numbers, as a model's are that multiplies so; keys, values and
// weights are rounded on the way. The bounds are those of the GPU's kernels.

class AttentionBf16Oracle : public testing::Test {
 protected:
  void SetUp() override {
    if (!CpuHasAmx()) GTEST_SKIP() << "this CPU has no AMX for BF16, or the system does not let it be used";
  }

  static void Fill(Case& c, uint32_t seed) {
    c.Fill(seed);
    for (std::vector<float>* x : {&c.q, &c.k, &c.v}) {
      for (float& value : *x) value = Bf16ToFloat(FloatToBf16(value));
    }
  }

  // Over all query vectors within 2e-3, over each within 4e-3.
  static void ExpectCloseInBf16(Case& c, const std::string& what, double tolerance = 2e-3) {
    const std::vector<double> expected = c.Reference();
    Attention attention(Element::kBf16);
    const std::vector<float> out = c.Run(attention);
    double error = 0, size = 0;
    for (size_t i = 0; i < out.size(); ++i) {
      error += (out[i] - expected[i]) * (out[i] - expected[i]);
      size += expected[i] * expected[i];
    }
    EXPECT_LT(std::sqrt(error / size), tolerance) << what;
    EXPECT_LT(RelativeError(out, expected, c.g.head_dim), 2 * tolerance) << what << ", worst vector";
  }
};

TEST_F(AttentionBf16Oracle, EveryFormatCodecHeadSizeAndGroup) {
  uint32_t seed = 1;
  for (const Codec codec : {Codec::kRotated, Codec::kPaper}) {
    for (const Format format : kAllFormats) {
      for (const int head_dim : {64, 128}) {
        for (const int group : {1, 2, 3, 5, 16}) {
          Case c{.g = {1, 2, head_dim, codec}, .group = group};
          c.shapes = {{40, Blocks(3, format, 11)}};
          Fill(c, seed++);
          ExpectCloseInBf16(c, std::string(Name(codec)) + " " + std::string(Name(format)) + " dim " +
                                   std::to_string(head_dim) + " group " + std::to_string(group));
        }
      }
    }
  }
}

// Steps of less than a query tile to more than an item, behind tails of every size.
TEST_F(AttentionBf16Oracle, StepsAreCausal) {
  for (const int rows : {9, 17, 63, 64, 65, 127, 130, 300}) {
    for (const int group : {2, 3, 8}) {
      Case c{.g = {1, 1, rows % 2 == 0 ? 64 : 128, Codec::kRotated}, .group = group};
      c.shapes = {{rows, {}}, {rows, Blocks(1, Format::kBf16, rows % 63 + 1)}};
      Fill(c, static_cast<uint32_t>(rows));
      ExpectCloseInBf16(c, std::to_string(rows) + " rows, group " + std::to_string(group));
    }
  }
}

TEST_F(AttentionBf16Oracle, PartialBlocksAndTailsOfEveryCapacity) {
  uint32_t seed = 1;
  for (const uint8_t capacity : {16, 32, 48, 64}) {
    for (const int tokens : {1, 2, capacity - 15, capacity - 1, int{capacity}}) {
      const KvBlockRef tail{0, static_cast<uint8_t>(tokens), Format::kBf16, capacity};
      const KvBlockRef part{0, static_cast<uint8_t>(tokens), tokens % 2 == 0 ? Format::kK4V4 : Format::kFp8};
      Case c{.g = {1, 2, seed % 2 == 0 ? 64 : 128, Codec::kRotated}, .group = 2};
      c.shapes = {{20, {tail}}, {20, {part}}, {33, {{0, kBlockTokens, Format::kK2V2}, tail, part}}};
      Fill(c, seed++);
      ExpectCloseInBf16(c, std::to_string(tokens) + " tokens of " + std::to_string(capacity));
    }
  }
}

// Decode beside prefill, and contexts that are split over items, for any number of threads.
TEST_F(AttentionBf16Oracle, RaggedBatchesOfMixedFormats) {
  for (const Codec codec : {Codec::kRotated, Codec::kPaper}) {
    Case c{.g = {1, 2, 128, codec}, .group = 4};
    for (const int rows : {1, 70, 5, 1, 140}) {
      SequenceShape shape{.rows = rows, .blocks = {}};
      for (int b = 0; b < (rows == 70 ? 150 : rows % 9); ++b) {
        shape.blocks.push_back({0, kBlockTokens, static_cast<Format>(b % kFormats)});
      }
      shape.blocks.push_back({0, 21, Format::kBf16, 32});
      c.shapes.push_back(shape);
    }
    Fill(c, 5);
    ExpectCloseInBf16(c, std::string(Name(codec)));
    Attention attention(Element::kBf16);
    SetComputeThreads(1);
    const std::vector<float> one = c.Run(attention);
    SetComputeThreads(5);
    const std::vector<float> many = c.Run(attention);
    SetComputeThreads(0);
    EXPECT_EQ(one, many);
  }
}

// As ExtremeLogits above. Where two tokens compete, the rounding of keys shows, but for BF16 blocks.
TEST_F(AttentionBf16Oracle, ExtremeLogits) {
  for (const float size : {8.0f, 32.0f}) {
    Case c{.g = {1, 1, 128, Codec::kRotated}, .group = 4, .q_size = size, .k_size = size};
    c.shapes = {{30, Blocks(6, Format::kBf16, 9)}};
    Fill(c, static_cast<uint32_t>(size));
    ExpectCloseInBf16(c, "size " + std::to_string(size));
  }
}

}  // namespace
}  // namespace triaxial
