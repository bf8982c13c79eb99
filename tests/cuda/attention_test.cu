// Attention on the device against a reference in float64 over the same cache: sizes, formats, groups, ragged
// batches, CUDA graphs. Inputs are fresh in every case.
#include <numeric>

#include "attention_testing.cuh"
#include "gpu_test.h"

namespace triaxial::cuda {
namespace {

constexpr double kTolerance = 2e-3;
constexpr int kProbes = 512;

uint32_t NextSeed() {
  static uint32_t seed = std::random_device{}();
  return Mix(++seed);
}

KvGeometry Geometry(int head_dim, int num_kv_heads, Codec codec = Codec::kRotated) {
  return {.num_layers = 1, .num_kv_heads = num_kv_heads, .head_dim = head_dim, .codec = codec};
}

const std::vector<double> kEven(std::size(kAllFormats), 1.0);

// Runs the step twice (what a launch leaves behind must not harm the next) and compares.
void Check(const char* what, const KvGeometry& geometry, int num_heads, std::vector<SequenceSpec> specs,
           float query_scale = 1.0f, double worst_tolerance = 2 * kTolerance) {
  const uint32_t seed = NextSeed();
  RandomStep step(geometry, num_heads, std::move(specs), seed, query_scale);
  Attention attention(geometry, num_heads, step.limits());
  attention.Plan(step.sequences(), nullptr);
  for (int run = 0; run < 2; ++run) {
    step.PoisonOutput();
    attention.RunDecode(step.layer(), nullptr);
    attention.RunPrefill(step.layer(), nullptr);

    CUDA_OK(cudaDeviceSynchronize());
    const RandomStep::Error error = step.Compare(kProbes, seed);
    EXPECT(error.all <= std::max(kTolerance, 1.1 * error.rounding) && error.worst <= worst_tolerance,
           "%s, run %d, seed %u: error %.2e (rounding alone %.2e), worst head %.2e", what, run, seed,
           error.all, error.rounding, error.worst);
    if (run == 0) std::printf("  %-40s error %.2e, worst head %.2e\n", what, error.all, error.worst);
  }
}

CASE(DecodeEachFormat) {
  std::mt19937 random(NextSeed());
  for (const int dim : {128, 64}) {
    for (size_t f = 0; f < std::size(kAllFormats); ++f) {
      std::vector<double> weights(std::size(kAllFormats), 0.0);
      weights[f] = 1;
      for (const int tokens : Sizes({64, 1024, 5000}, {64, 300})) {
        const std::string what = std::string(Name(kAllFormats[f])) + ", head_dim " + std::to_string(dim) +
                                 ", " + std::to_string(tokens) + " tokens";
        Check(what.c_str(), Geometry(dim, 8), 64, {RandomSequence(tokens, weights, random)});
      }
    }
  }
}

CASE(DecodeOneToken) {
  // Nothing in the cache: the row attends to itself.
  Check("empty cache", Geometry(128, 8), 64, {{.rows = 1}});
  std::mt19937 random(NextSeed());
  for (const int tokens : {1, 2, 15, 16, 17, 33, 63}) {
    Check(("tail of " + std::to_string(tokens)).c_str(), Geometry(128, 8), 64,
          {RandomSequence(tokens, kEven, random)});
  }
}

CASE(DecodeMixedRagged) {
  std::mt19937 random(NextSeed());
  for (const int sequences : Sizes({1, 3, 17, 64, 256}, {1, 5})) {
    std::vector<SequenceSpec> specs;
    for (int s = 0; s < sequences; ++s) {
      const int64_t tokens = static_cast<int64_t>(
          std::exp(std::uniform_real_distribution(0.0, SmallSizes() ? 6.0 : 9.0)(random)));
      specs.push_back(RandomSequence(tokens, kEven, random));
    }
    Check((std::to_string(sequences) + " ragged sequences").c_str(), Geometry(128, 8), 64, specs);
  }
}

CASE(DecodeLong) {
  std::mt19937 random(NextSeed());
  const int tokens = SmallSizes() ? 4095 : 131071;
  Check("long", Geometry(128, 8), 64, {RandomSequence(tokens, kEven, random)});
  Check("long and 1 token", Geometry(128, 4), 16,
        {RandomSequence(tokens, kEven, random), RandomSequence(1, kEven, random)});
}

CASE(DecodeGroups) {
  std::mt19937 random(NextSeed());
  for (const int dim : {128, 64}) {
    for (const int group : Sizes({1, 2, 3, 4, 5, 6, 7, 8, 16}, {1, 5, 16})) {
      for (const int kv_heads : Sizes({1, 2, 8}, {2})) {
        const std::string what = "group " + std::to_string(group) + ", " + std::to_string(kv_heads) +
                                 " KV heads, head_dim " + std::to_string(dim);
        Check(what.c_str(), Geometry(dim, kv_heads), kv_heads * group,
              {RandomSequence(SmallSizes() ? 300 : 900, kEven, random), RandomSequence(77, kEven, random)});
      }
    }
  }
}

CASE(DecodeLoudQueries) {
  // Peaked attention, whose maximum is found late: it rises many times. Where two tokens compete, the
  // rounding of the queries to FP16 shows.
  std::mt19937 random(NextSeed());
  for (const float scale : {0.01f, 4.0f, 16.0f}) {
    Check(("queries times " + std::to_string(scale)).c_str(), Geometry(128, 8), 64,
          {RandomSequence(SmallSizes() ? 400 : 3000, kEven, random), RandomSequence(200, kEven, random)},
          scale, 3e-2);
  }
}

CASE(PrefillEachFormat) {
  std::mt19937 random(NextSeed());
  for (const Codec codec : {Codec::kRotated, Codec::kPaper}) {
    for (const int dim : {128, 64}) {
      for (size_t f = 0; f < std::size(kAllFormats); ++f) {
        std::vector<double> weights(std::size(kAllFormats), 0.0);
        weights[f] = 1;
        const std::string what = std::string(Name(codec)) + " " + std::string(Name(kAllFormats[f])) +
                                 ", head_dim " + std::to_string(dim);
        Check(what.c_str(), Geometry(dim, 2, codec), 16,
              {RandomSequence(SmallSizes() ? 150 : 1000, weights, random, SmallSizes() ? 20 : 100)});
      }
    }
  }
}

// Small enough for compute-sanitizer's racecheck.
CASE(PrefillSmall) {
  std::mt19937 random(NextSeed());
  Check("40 rows after 330", Geometry(128, 1), 8, {RandomSequence(330, kEven, random, 40)});
}

CASE(PrefillSizes) {
  std::mt19937 random(NextSeed());
  // Without a prefix, and rows and prefixes about the edges of tiles.
  for (const int rows : Sizes({2, 15, 16, 17, 63, 64, 65, 127, 300}, {2, 17, 65})) {
    for (const int tokens : Sizes({0, 1, 63, 64, 65, 700}, {0, 65, 200})) {
      const std::string what = std::to_string(rows) + " rows after " + std::to_string(tokens);
      Check(what.c_str(), Geometry(128, 2), 16, {RandomSequence(tokens, kEven, random, rows)});
    }
  }
  if (SmallSizes()) return;
  Check("2000 rows after 30000", Geometry(128, 8), 64, {RandomSequence(30000, kEven, random, 2000)});
  Check("2 rows after 131000", Geometry(128, 2), 16, {RandomSequence(131000, kEven, random, 2)});
}

// More items than run at a time, of sequences that differ.
CASE(PrefillManyItems) {
  std::mt19937 random(NextSeed());
  if (SmallSizes()) {
    Check("300 rows after 100, 70 after 200", Geometry(128, 8), 64,
          {RandomSequence(100, kEven, random, 300), RandomSequence(200, kEven, random, 70)});
    return;
  }
  Check("1000 rows after 33000, 500 after 20000", Geometry(128, 8), 64,
        {RandomSequence(33000, kEven, random, 1000), RandomSequence(20000, kEven, random, 500),
         RandomSequence(100, kEven, random, 2)});
  std::vector<double> k2v2(std::size(kAllFormats), 0.0);
  k2v2[0] = 1;
  Check("20 rows after 150000", Geometry(128, 8), 64,
        {RandomSequence(150000, k2v2, random, 20), RandomSequence(100, kEven, random, 2)});
}

CASE(PrefillBesideDecode) {
  std::mt19937 random(NextSeed());
  for (const Codec codec : {Codec::kRotated, Codec::kPaper}) {
    for (const int group : Sizes({1, 2, 3, 4, 5, 6, 7, 8, 16}, {1, 8})) {
      std::vector<SequenceSpec> specs;
      for (const int rows : Sizes({1, 40, 1, 1, 333, 2, 1}, {1, 40, 1, 2})) {
        const int64_t tokens = static_cast<int64_t>(
            std::exp(std::uniform_real_distribution(0.0, SmallSizes() ? 5.5 : 8.0)(random)));
        specs.push_back(RandomSequence(tokens, kEven, random, rows));
      }
      const std::string what = std::string(Name(codec)) + ", group " + std::to_string(group);
      Check(what.c_str(), Geometry(group % 2 == 0 ? 128 : 64, 4, codec), 4 * group, specs);
    }
  }
}

CASE(DecodePaper) {
  std::mt19937 random(NextSeed());
  for (size_t f = 0; f < std::size(kAllFormats); ++f) {
    std::vector<double> weights(std::size(kAllFormats), 0.0);
    weights[f] = 1;
    Check(("paper " + std::string(Name(kAllFormats[f]))).c_str(), Geometry(128, 8, Codec::kPaper), 64,
          {RandomSequence(SmallSizes() ? 300 : 3000, weights, random), RandomSequence(1, weights, random)});
  }
}

// A graph that was captured once is replayed after other plans.
CASE(DecodeInGraph) {
  std::mt19937 random(NextSeed());
  const KvGeometry geometry = Geometry(128, 8);
  std::vector<SequenceSpec> specs;
  for (int s = 0; s < 6; ++s)
    specs.push_back(RandomSequence(1 + random() % (SmallSizes() ? 300 : 3000), kEven, random));
  RandomStep step(geometry, 64, specs, NextSeed());
  Attention attention(geometry, 64, step.limits());
  cudaStream_t stream;
  CUDA_OK(cudaStreamCreate(&stream));
  LayerAttention layer = step.layer();
  for (const bool overlap : {false, true}) {
    layer.overlap = overlap;
    cudaGraph_t graph;
    cudaGraphExec_t executable;
    CUDA_OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
    attention.RunDecode(layer, stream);
    attention.RunDecode(layer, stream);
    CUDA_OK(cudaStreamEndCapture(stream, &graph));
    CUDA_OK(cudaGraphInstantiate(&executable, graph, 0));
    for (const size_t count : {6, 2, 6}) {
      // With fewer sequences, the rows of the others keep what they had: the result of the step before.
      if (count == 6) step.PoisonOutput();
      CUDA_OK(cudaDeviceSynchronize());
      attention.Plan(std::span(step.sequences()).first(count), stream);
      CUDA_OK(cudaGraphLaunch(executable, stream));
      CUDA_OK(cudaStreamSynchronize(stream));
      const RandomStep::Error error = step.Compare(kProbes, NextSeed());
      EXPECT(error.all <= kTolerance, "overlap %d, %zu sequences: error %.2e", overlap, count, error.all);
    }
    CUDA_OK(cudaGraphExecDestroy(executable));
    CUDA_OK(cudaGraphDestroy(graph));
  }
  CUDA_OK(cudaStreamDestroy(stream));
}

}  // namespace
}  // namespace triaxial::cuda

int main(int argc, char** argv) { return triaxial::cuda::RunGpuCases(argc, argv); }
