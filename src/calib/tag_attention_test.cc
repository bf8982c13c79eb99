#include "calib/tag_attention.h"

#include <gtest/gtest.h>

#include <cmath>
#include <random>

#include "base/json.h"
#include "base/parallel.h"

namespace triaxial {
namespace {

struct Case {
  KvGeometry geometry;
  ClipRatios clip;
  int num_heads;
  std::vector<TokenTurn> tokens;
  std::vector<float> q, k, v;
};

// Turns of a user, an answer and a picture; the first begins with instructions.
std::vector<TokenTurn> SomeTurns(int tokens, int turn_tokens) {
  std::vector<TokenTurn> out;
  for (int i = 0; i < tokens; ++i) {
    const int turn = i / turn_tokens;
    const int at = i % turn_tokens;
    TokenTurn token{turn, Modal::kText, Semantic::kUser};
    if (at < turn_tokens / 4) {
      token.semantic = turn == 0 ? Semantic::kInst : Semantic::kDelim;
    } else if (at < turn_tokens / 2) {
      token.modal = Modal::kImage;
      token.semantic = Semantic::kObs;
    } else if (at >= 3 * turn_tokens / 4) {
      token.semantic = Semantic::kToolCall;
    }
    out.push_back(token);
  }
  return out;
}

// The generator of tools/reference/kv_codec_reference.py: the same bits in any language.
std::vector<float> Draw(uint64_t seed, int64_t n, float scale) {
  std::vector<float> x;
  for (int64_t i = 0; i < n; ++i) {
    seed = seed * 6364136223846793005u + 1442695040888963407u;
    const auto word = static_cast<uint32_t>(seed >> 32);
    x.push_back(static_cast<float>(static_cast<int64_t>(word >> 8) - (1 << 23)) * 0x1p-23f * scale);
  }
  return x;
}

Case MakeCase(Codec codec, int tokens, uint64_t seed, float scale) {
  Case c{{1, 2, 64, codec}, {0.9f, 0.96f}, 6, SomeTurns(tokens, 23), {}, {}, {}};
  c.q = Draw(seed, int64_t{tokens} * c.num_heads * 64, scale);
  c.k = Draw(seed + 1, int64_t{tokens} * 2 * 64, scale);
  c.v = Draw(seed + 2, int64_t{tokens} * 2 * 64, 1);
  return c;
}

std::vector<TagAttention::Errors> RunAll(const Case& c, TagTime time, int64_t step,
                                         const float* gram = nullptr) {
  TagAttention attention({c.geometry, c.clip, c.num_heads, gram}, c.tokens, time);
  const auto n = static_cast<int64_t>(c.tokens.size());
  const int64_t dim = c.geometry.head_dim;
  for (int64_t begin = 0; begin < n; begin += step) {
    attention.Append(std::min(step, n - begin), c.q.data() + begin * c.num_heads * dim,
                     c.k.data() + begin * c.geometry.num_kv_heads * dim,
                     c.v.data() + begin * c.geometry.num_kv_heads * dim);
  }
  return attention.errors();
}

// Against tools/reference/calibration_reference.py, in float64.
TEST(TagAttentionTest, EqualsTheReferenceWithinOnePercent) {
  const Result<Json> golden = ReadJsonFile("tests/data/kv/sensitivity_golden.json");
  ASSERT_TRUE(golden.ok()) << golden.status().message();
  int compared = 0;
  for (const Json& entry : (*golden)["cases"]) {
    const Case c = MakeCase(*ParseCodec(entry["codec"].get<std::string>()), entry["tokens"].get<int>(),
                            entry["seed"].get<uint64_t>(), entry["scale"].get<float>());
    const TagTime time = entry["tags_at"] == "turn" ? TagTime::kTurn : TagTime::kEnd;
    const std::vector<TagAttention::Errors> errors = RunAll(c, time, 64);
    for (const auto& [tag, heads] : entry["errors"].items()) {
      int t = 0;
      while (Name(Tag::FromIndex(t)) != tag) ++t;
      for (int f = 0; f < kFormats; ++f) {
        const std::string format(Name(static_cast<Format>(f)));
        if (!heads.contains(format)) continue;
        for (size_t h = 0; h < errors.size(); ++h) {
          const double expected = heads[format][h].get<double>();
          EXPECT_NEAR(errors[h].sum[static_cast<size_t>(t)][static_cast<size_t>(f)], expected,
                      0.01 * expected)
              << entry["codec"] << " " << entry["tags_at"] << " " << tag << " " << format << " head " << h;
          ++compared;
        }
      }
    }
  }
  EXPECT_GT(compared, 500);
}

// A gram of an orthogonal basis counts squares; one of a single channel sees no other.
TEST(TagAttentionTest, AGramWeighsErrors) {
  Case c = MakeCase(Codec::kRotated, 150, 7, 2);
  const int64_t dim = c.geometry.head_dim;
  const auto at = [&](int head, int64_t i, int64_t k) {
    return static_cast<size_t>((head * dim + i) * dim + k);
  };
  std::vector<float> gram(static_cast<size_t>(c.num_heads * dim * dim));
  const auto expect_equal = [&](const std::vector<TagAttention::Errors>& found,
                                const std::vector<TagAttention::Errors>& expected, double factor) {
    for (size_t h = 0; h < found.size(); ++h) {
      for (size_t t = 0; t < kTags; ++t) {
        for (size_t f = 0; f < kFormats; ++f) {
          EXPECT_NEAR(found[h].sum[t][f], factor * expected[h].sum[t][f],
                      2e-4 * factor * expected[h].sum[t][f]);
        }
      }
    }
  };
  for (int head = 0; head < c.num_heads; ++head) {
    for (int64_t i = 0; i < dim; ++i) gram[at(head, i, i)] = 3;
  }
  const auto plain = RunAll(c, TagTime::kTurn, 64);
  expect_equal(RunAll(c, TagTime::kTurn, 64, gram.data()), plain, 3.0 * static_cast<double>(dim));
  // The sum over single channels is the whole, and a pair of them adds what they share twice.
  const auto with = [&](std::initializer_list<std::pair<int64_t, int64_t>> ones) {
    std::fill(gram.begin(), gram.end(), 0.0f);
    for (int head = 0; head < c.num_heads; ++head) {
      for (const auto& [i, k] : ones) gram[at(head, i, k)] = 1;
    }
    return RunAll(c, TagTime::kTurn, 64, gram.data());
  };
  const auto five = with({{5, 5}}), nine = with({{9, 9}}), both = with({{5, 5}, {9, 9}});
  const auto shared = with({{5, 5}, {9, 9}, {5, 9}, {9, 5}});
  double sum = 0, sum_both = 0, sum_shared = 0;
  for (size_t h = 0; h < five.size(); ++h) {
    for (size_t t = 0; t < kTags; ++t) {
      sum += five[h].sum[t][0] + nine[h].sum[t][0];
      sum_both += both[h].sum[t][0];
      sum_shared += shared[h].sum[t][0];
      EXPECT_LE(five[h].sum[t][0], static_cast<double>(dim) * plain[h].sum[t][0] * (1 + 1e-5));
      EXPECT_LE(shared[h].sum[t][0], 2 * both[h].sum[t][0] * (1 + 1e-5)) << "(a + b)^2 <= 2 a^2 + 2 b^2";
    }
  }
  EXPECT_NEAR(sum_both, sum, 1e-4 * sum);
  EXPECT_NE(sum_shared, sum_both);
}

TEST(TagAttentionTest, DependsNeitherOnStepsNorOnThreads) {
  const Case c = MakeCase(Codec::kPaper, 200, 5, 2);
  const auto one = RunAll(c, TagTime::kTurn, 256);
  SetComputeThreads(1);
  const auto two = RunAll(c, TagTime::kTurn, 256);
  SetComputeThreads(0);
  const auto three = RunAll(c, TagTime::kTurn, 64);
  for (size_t h = 0; h < one.size(); ++h) {
    EXPECT_EQ(one[h].sum, two[h].sum);
    for (size_t t = 0; t < kTags; ++t) {
      for (size_t f = 0; f < kFormats; ++f) {
        EXPECT_NEAR(three[h].sum[t][f], one[h].sum[t][f], 1e-3 * one[h].sum[t][f]);
      }
    }
  }
}

TEST(TagAttentionTest, ATagThatTakesAllOfTheAttentionIsJudgedByItself) {
  Case c = MakeCase(Codec::kRotated, 100, 9, 1);
  for (TokenTurn& token : c.tokens) token = {0, Modal::kText, Semantic::kUser};
  const auto errors = RunAll(c, TagTime::kEnd, 128);
  const size_t tag = static_cast<size_t>(Tag{Temporal::kCurrent, Modal::kText, Semantic::kUser}.index());
  for (const TagAttention::Errors& head : errors) {
    double last = INFINITY;
    for (int f = 0; f < kFormats; ++f) {
      const double error = head.sum[tag][static_cast<size_t>(f)];
      EXPECT_LE(error, last);
      last = error;
      EXPECT_TRUE(static_cast<Format>(f) == Format::kBf16 || error > 0);
    }
    EXPECT_EQ(last, 0) << "bf16 is what errors are against";
    for (size_t t = 0; t < kTags; ++t) {
      EXPECT_TRUE(t == tag || head.sum[t][0] == 0) << t;
    }
  }
}

TEST(TagAttentionTest, ExtremeScoresStayFinite) {
  // Scores of hundreds, whose quantized versions are off by dozens.
  for (const Codec codec : {Codec::kRotated, Codec::kPaper}) {
    const auto errors = RunAll(MakeCase(codec, 130, 3, 60), TagTime::kTurn, 128);
    for (const TagAttention::Errors& head : errors) {
      for (const auto& tag : head.sum) {
        for (const double error : tag) {
          EXPECT_TRUE(std::isfinite(error));
          EXPECT_LT(error, 130 * 5) << "outputs lie among the values, which lie in [-1, 1] or a step beyond";
        }
      }
    }
  }
}

TEST(TagAttentionTest, TokensAreCountedAsTheQueriesSeeThem) {
  const std::vector<TokenTurn> tokens = SomeTurns(100, 23);
  const TagTotals end = TokensByTag(tokens, TagTime::kEnd);
  const TagTotals turn = TokensByTag(tokens, TagTime::kTurn);
  double sum_end = 0;
  double sum_turn = 0;
  TagTotals brute{};
  for (size_t i = 0; i < tokens.size(); ++i) {
    for (size_t j = 0; j <= i; ++j) {
      const Tag tag{Age(tokens[j].turn, tokens[i].turn), tokens[j].modal, tokens[j].semantic};
      brute[static_cast<size_t>(tag.index())] += 0.01;
    }
  }
  for (size_t t = 0; t < kTags; ++t) {
    sum_end += end[t];
    sum_turn += turn[t];
    EXPECT_NEAR(turn[t], brute[t], 1e-9) << Name(Tag::FromIndex(static_cast<int>(t)));
  }
  EXPECT_EQ(sum_end, 100);
  EXPECT_NEAR(sum_turn, 50.5, 1e-9) << "a query sees half of the tokens in the mean";
}

}  // namespace
}  // namespace triaxial
