// What the cache's bookkeeping promises in figures: capacity is a sum of bytes whatever the mix of formats,
// and a decode step costs neither memory nor time that grows with the context. Prints what it measures.
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <new>
#include <random>
#include <vector>

#include "kv/cache.h"

namespace {
int64_t allocations = 0;
}  // namespace

// Not inlined, or g++ takes malloc and free for a mismatched pair.
[[gnu::noinline]] void* operator new(size_t size) {
  ++allocations;
  if (void* memory = std::malloc(size)) return memory;
  throw std::bad_alloc();
}
[[gnu::noinline]] void operator delete(void* memory) noexcept { std::free(memory); }
[[gnu::noinline]] void operator delete(void* memory, size_t) noexcept { std::free(memory); }

namespace triaxial {
namespace {

// Qwen3-VL-32B; rows and bytes scale with heads and layers alike, so the figures hold for all.
constexpr KvGeometry kGeometry{.num_layers = 64, .num_kv_heads = 8, .head_dim = 128};

// Prefills and decodes sequences of random length until the arena is full, ends one, goes on; again and
// again. Returns the smallest and the mean share of the arena in use when an append was refused.
struct Fill {
  double worst = 1;
  double mean = 0;
  int refusals = 0;
  int compactions = 0;
  double worst_uncompacted = 1;  // share in use where the free rows sufficed but lay scattered
  double tokens_against_ideal = 0;
};

Fill FillWithChurn(double share_of_k4v4, int64_t rows, Codec codec) {
  KvGeometry geometry = kGeometry;
  geometry.codec = codec;
  KvCache cache(geometry, rows, TagNeeds::ByIndex());
  std::mt19937 random(7);
  const auto below = [&](int n) { return std::uniform_int_distribution<int>(0, n - 1)(random); };
  std::vector<SequenceId> running;
  std::vector<KvToken> tokens;
  KvAppend append;
  Fill fill;
  const auto used = [&] { return 1 - static_cast<double>(cache.free_rows()) / static_cast<double>(rows); };
  while (fill.refusals < 200) {
    SequenceId id = 0;
    if (running.size() < 4 || below(4) == 0) {
      running.push_back(id = cache.CreateSequence());
    } else {
      id = running[static_cast<size_t>(below(static_cast<int>(running.size())))];
    }
    for (int chunk = 1 + below(6); chunk > 0; --chunk) {
      tokens.clear();
      const int count = below(2) == 0 ? 512 : 1 + below(100);
      for (int i = 0; i < count; ++i) {
        if (i % 64 == 0) {
          const Format wish = below(1000) < 1000 * share_of_k4v4 ? Format::kK4V4 : Format::kK2V2;
          tokens.push_back({{}, static_cast<uint8_t>(wish)});
        }
        if (i % 64 != 0) tokens.push_back(tokens.back());
      }
      const int64_t needed = cache.RowsToAppend(id, tokens);
      if (!cache.Append(id, tokens, &append).ok()) {
        if (cache.Fits(needed)) {
          ++fill.compactions;
          fill.worst_uncompacted = std::min(fill.worst_uncompacted, used());
          cache.Compact([](uint32_t, uint32_t, int) {});
          EXPECT_TRUE(cache.Append(id, tokens, &append).ok());
        } else {
          ++fill.refusals;
          fill.worst = std::min(fill.worst, used());
          fill.mean += used() / 200;
          const KvUsage usage = cache.Usage();
          const double ideal = static_cast<double>(usage.total_tokens() - usage.tail_tokens) / 64 *
                               static_cast<double>(share_of_k4v4 * BlockBytes(geometry, Format::kK4V4) +
                                                   (1 - share_of_k4v4) * BlockBytes(geometry, Format::kK2V2));
          const double arena = static_cast<double>(rows) * UnitRowBytes(geometry) * geometry.num_layers;
          fill.tokens_against_ideal += ideal / (arena - static_cast<double>(usage.tail_bytes)) / 200;
          const size_t gone = static_cast<size_t>(below(static_cast<int>(running.size())));
          cache.FreeSequence(running[gone]);
          running.erase(running.begin() + static_cast<std::ptrdiff_t>(gone));
          cache.FinishStep();
          break;
        }
      }
      cache.FinishStep();
    }
  }
  const Status status = cache.CheckIntegrity();
  EXPECT_TRUE(status.ok()) << status.message();
  return fill;
}

TEST(KvCapacityTest, IsASumOfBytesForEveryMixOfFormats) {
  constexpr int64_t kRows = 100000;
  std::printf(
      "codec    k4v4 share | in use when refused: mean, worst | tokens / predicted | compactions, in use "
      "before the worst\n");
  for (const Codec codec : {Codec::kRotated, Codec::kPaper}) {
    for (const double share : {0.0, 0.1, 0.25, 0.5, 0.75, 1.0}) {
      const Fill fill = FillWithChurn(share, kRows, codec);
      std::printf("%-8s %10.2f | %12.4f %12.4f         | %18.4f | %6d %14.4f\n",
                  std::string(Name(codec)).c_str(), share, fill.mean, fill.worst, fill.tokens_against_ideal,
                  fill.compactions, fill.worst_uncompacted);
      EXPECT_GT(fill.worst, 0.97) << "share " << share;
      EXPECT_NEAR(fill.tokens_against_ideal, 1.0, 0.03) << "share " << share;
    }
  }
}

// Of the processor, so that a busy machine does not count.
double ThreadNanoseconds() {
  timespec time;
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &time);
  return static_cast<double>(time.tv_sec) * 1e9 + static_cast<double>(time.tv_nsec);
}

// Decodes `steps` tokens for `sequences` sequences of `context` tokens; returns ns per token.
double Decode(int sequences, int context, int steps, bool count_allocations) {
  KvCache cache(kGeometry, int64_t{sequences} * ((context + steps) / 64 + 2) * 40 + sequences * 128,
                TagNeeds::ByIndex());
  KvAppend append;
  std::vector<SequenceId> ids;
  const std::vector<KvToken> prompt(static_cast<size_t>(context),
                                    KvToken{{}, static_cast<uint8_t>(Format::kK2V2)});
  for (int s = 0; s < sequences; ++s) {
    ids.push_back(cache.CreateSequence());
    EXPECT_TRUE(cache.Append(ids.back(), prompt, &append).ok());
  }
  cache.FinishStep();
  const KvToken token{{}, static_cast<uint8_t>(Format::kK4V4)};
  int64_t blocks = 0;
  const double start = ThreadNanoseconds();
  for (int i = 0; i < steps; ++i) {
    const int64_t before = allocations;
    int64_t rows = 0;
    for (const SequenceId id : ids) rows += cache.RowsToAppend(id, std::span(&token, 1));
    EXPECT_TRUE(cache.Fits(rows));
    for (const SequenceId id : ids) {
      EXPECT_TRUE(cache.Append(id, std::span(&token, 1), &append).ok());
      blocks += static_cast<int64_t>(cache.View(id).size());
    }
    cache.FinishStep();
    if (count_allocations && rows == 0) {
      EXPECT_EQ(allocations, before) << "step " << i;
    }
  }
  const double time = ThreadNanoseconds() - start;
  EXPECT_GE(blocks, int64_t{steps} * sequences * (context / 64));
  EXPECT_TRUE(cache.CheckIntegrity().ok());
  return time / steps / sequences;
}

TEST(KvDecodeTest, AllocatesNothingUnlessABlockCompletesOrATailGrows) {
  Decode(/*sequences=*/3, /*context=*/2048, /*steps=*/1000, /*count_allocations=*/true);
}

TEST(KvDecodeTest, CostDoesNotGrowWithTheContext) {
  // The fastest of three: on a busy machine the memory of a fresh cache may come slowly.
  const auto fastest = [](int context) {
    double time = Decode(8, context, 4096, false);
    for (int i = 0; i < 2; ++i) time = std::min(time, Decode(8, context, 4096, false));
    return time;
  };
  const double short_context = fastest(1024);
  const double long_context = fastest(32768);
  std::printf(
      "decode: %.0f ns per token at 1k tokens of context, %.0f ns at 32k (plan, append, view, finish)\n",
      short_context, long_context);
  EXPECT_LT(long_context, 3 * short_context + 100) << "32 times the context";
}

}  // namespace
}  // namespace triaxial
