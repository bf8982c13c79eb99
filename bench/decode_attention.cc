// Attention over a cache in memory: decode (one query row over a long context) and prefill (a chunk of rows
// over a prefix), by format. Caches of many layers are visited in turn, so that every byte comes from memory,
// as in a model. Nothing is timed before its result was compared with a float64 reference. On a machine with
// other work, run it with OMP_PROC_BIND=true OMP_WAIT_POLICY=passive: its threads then neither share a core
// nor spin.
#include <fmt/core.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "apps/bench_machine.h"
#include "base/checked_math.h"
#include "base/file.h"
#include "base/float16.h"
#include "base/parallel.h"
#include "kv/arena.h"
#include "kv/codec.h"
#include "ops/attention.h"

namespace triaxial {
namespace {

constexpr int kKvHeads = 8;
constexpr int kHeadDim = 128;
constexpr int kChunkRows = 512;
// Several times the largest last-level cache at hand.
constexpr int64_t kWorkingSet = int64_t{768} << 20;
constexpr Format kAllFormats[] = {Format::kBf16, Format::kK4V4, Format::kK4V2, Format::kK2V2};

// Random codes with plausible scales, or BF16 near 1.
void FillBlocks(const KvGeometry& g, Format f, uint8_t* data, int64_t blocks, uint32_t seed) {
  std::mt19937_64 random(seed);
  for (int64_t i = 0; i < blocks * g.num_kv_heads; ++i) {
    for (const Side side : {Side::kK, Side::kV}) {
      const int bits = Bits(f, side);
      for (int b = 0; b < CodeBytes(g, bits); b += 8) {
        uint64_t word = random();
        // Exponents 124 to 127, any sign and mantissa: magnitudes from 1/8 to 2.
        if (bits == 16) word = (word & 0x81ff81ff81ff81ffu) | 0x3e003e003e003e00u;
        std::memcpy(data + b, &word, sizeof(word));
      }
      data += CodeBytes(g, bits);
      for (int m = 0; m < 2 * MetaGroups(g, bits); ++m, data += 2) {
        const float size = static_cast<float>(random() % 1024) / 1024.0f + 0.5f;
        const float levels = static_cast<float>((1 << bits) - 1);
        const fp16_t x = FloatToFp16(m < MetaGroups(g, bits) ? 2 * size / levels : -size);
        std::memcpy(data, &x, sizeof(x));
      }
    }
  }
}

// One sequence of `context` tokens in one format, in as many layers as make the working set.
struct Cache {
  KvArena arena;
  std::vector<KvBlockRef> blocks;

  static Cache Make(Format f, Codec codec, int64_t context, int64_t working_set) {
    KvGeometry g{1, kKvHeads, kHeadDim, codec};
    const int64_t count = context / kBlockTokens;
    const int64_t layer_bytes = count * BlockBytes(g, f);
    g.num_layers =
        static_cast<int>(std::max<int64_t>(4, CeilDiv(working_set, std::max<int64_t>(layer_bytes, 1))));
    if (count == 0) g.num_layers = 4;
    // An arena holds one BF16 block at least.
    const int64_t bytes = std::max(count * BlockBytes(g, f), BlockBytes(g, Format::kBf16));
    Result<KvArena> arena = KvArena::Create(g, bytes);
    CHECK(arena.ok());
    Cache cache{std::move(arena).value(), {}};
    ParallelFor(g.num_layers, [&](int64_t layer) {
      FillBlocks(g, f, cache.arena.LayerData(static_cast<int>(layer)), count, static_cast<uint32_t>(layer));
    });
    for (int64_t i = 0; i < count; ++i) {
      cache.blocks.push_back({static_cast<uint32_t>(i * UnitsOf(g, f)), kBlockTokens, f});
    }
    std::shuffle(cache.blocks.begin(), cache.blocks.end(), std::mt19937(1));  // as blocks come and go
    return cache;
  }
};

struct Step {
  int group, rows;
  std::vector<float> q, k, v, out;

  Step(int query_group, int step_rows) : group(query_group), rows(step_rows) {
    const auto vectors = static_cast<size_t>(rows) * kKvHeads;
    q.resize(vectors * static_cast<size_t>(group) * kHeadDim);
    k.resize(vectors * kHeadDim);
    v.resize(k.size());
    out.resize(q.size());
    std::mt19937 random(2);
    std::normal_distribution<float> normal;
    for (std::vector<float>* x : {&q, &k, &v}) {
      for (float& value : *x) value = normal(random);
    }
  }

  void Run(Attention& attention, const Cache& cache, int layer) {
    const AttentionSequence sequence{0, rows, cache.blocks};
    attention.Run({cache.arena.geometry(),
                   kKvHeads * group,
                   1 / std::sqrt(float{kHeadDim}),
                   cache.arena.LayerData(layer),
                   q.data(),
                   k.data(),
                   v.data(),
                   out.data(),
                   {&sequence, 1}});
  }
};

// |out - reference| / |reference| of the last row of the last query head, in float64.
double RelativeError(const Cache& cache, const Step& step) {
  const KvGeometry& g = cache.arena.geometry();
  std::vector<float> keys, values;
  for (const KvBlockRef& block : cache.blocks) {
    const uint8_t* head = cache.arena.LayerData(0) + block.unit_row * UnitRowBytes(g) +
                          (kKvHeads - 1) * HeadBytes(g, block.format);
    keys.resize(keys.size() + kBlockTokens * kHeadDim);
    values.resize(keys.size());
    DecodeSideScalar(g, block.format, Side::kK, head, kBlockTokens, &*keys.end() - kBlockTokens * kHeadDim);
    DecodeSideScalar(g, block.format, Side::kV, head, kBlockTokens, &*values.end() - kBlockTokens * kHeadDim);
  }
  for (int row = 0; row < step.rows; ++row) {
    const float* k = step.k.data() + (row * kKvHeads + kKvHeads - 1) * kHeadDim;
    const float* v = step.v.data() + (row * kKvHeads + kKvHeads - 1) * kHeadDim;
    keys.insert(keys.end(), k, k + kHeadDim);
    values.insert(values.end(), v, v + kHeadDim);
  }
  const float* q = &*step.q.end() - kHeadDim;
  const float* out = &*step.out.end() - kHeadDim;
  std::vector<double> scores;
  for (size_t t = 0; t < keys.size(); t += kHeadDim) {
    double dot = 0;
    for (size_t c = 0; c < kHeadDim; ++c) dot += double{q[c]} * keys[t + c];
    scores.push_back(dot / std::sqrt(double{kHeadDim}));
  }
  const double top = *std::max_element(scores.begin(), scores.end());
  std::vector<double> expected(kHeadDim);
  double sum = 0;
  for (size_t t = 0; t < scores.size(); ++t) {
    const double weight = std::exp(scores[t] - top);
    sum += weight;
    for (size_t c = 0; c < kHeadDim; ++c) expected[c] += weight * values[t * kHeadDim + c];
  }
  double error = 0, size = 0;
  for (size_t c = 0; c < kHeadDim; ++c) {
    error += std::pow(out[c] - expected[c] / sum, 2);
    size += std::pow(expected[c] / sum, 2);
  }
  return std::sqrt(error / size);
}

// Seconds of a step in one layer; false if its result is wrong.
bool Time(const Cache& cache, Step& step, double budget, double* seconds, double* error) {
  Attention attention;
  step.Run(attention, cache, 0);
  *error = RelativeError(cache, step);
  if (!(*error < 1e-3)) {
    fmt::print(stderr, "decode_attention: relative error {:.2e} against the reference\n", *error);
    return false;
  }
  // A round is long against the clock and short against a time slice; the next goes on where it stopped.
  constexpr double kRound = 1e-3;
  const int layers = cache.arena.geometry().num_layers;
  int layer = 0, per_round = 1;
  const auto round = [&] {
    for (int i = 0; i < per_round; ++i, layer = (layer + 1) % layers) step.Run(attention, cache, layer);
  };
  per_round = std::max(1, static_cast<int>(kRound / BestSeconds(budget / 8, round)));
  *seconds = BestSeconds(budget, round) / per_round;
  return true;
}

bool MeasureDecode(Codec codec, double budget, double copy, Json& results) {
  fmt::print("{:>5} {:>8} {:>6} {:>10} {:>8} {:>8} {:>8} {:>9}\n", "group", "context", "format", "ns/token",
             "GB/s", "of copy", "x bf16", "error");
  for (const int context : {2048, 8192, 32768}) {
    double bf16[2] = {};
    for (const Format f : kAllFormats) {
      const Cache cache = Cache::Make(f, codec, context, kWorkingSet);
      const KvGeometry& g = cache.arena.geometry();
      for (const int group : {4, 8}) {
        Step step(group, 1);
        double seconds, error;
        if (!Time(cache, step, budget, &seconds, &error)) return false;
        double& base = bf16[group == 8];
        if (f == Format::kBf16) base = seconds;
        const double ns = seconds * 1e9 / context;
        const double gb =
            1e-9 * static_cast<double>(BlockBytes(g, f) / g.num_layers) * context / kBlockTokens / seconds;
        fmt::print("{:>5} {:>8} {:>6} {:>10.1f} {:>8.1f} {:>7.0f}% {:>8.2f} {:>9.1e}\n", group, context,
                   Name(f), ns, gb, 100 * gb / copy, base / seconds, error);
        results.push_back({{"group", group},
                           {"context", context},
                           {"format", Name(f)},
                           {"ns_per_token", ns},
                           {"gb_per_s", gb},
                           {"share_of_copy", gb / copy},
                           {"times_bf16", base / seconds},
                           {"relative_error", error}});
      }
    }
  }
  return true;
}

bool MeasurePrefill(Codec codec, double budget, Json& results) {
  constexpr int kGroup = 4;
  fmt::print("\n{:>5} {:>8} {:>6} {:>10} {:>10} {:>9}   ({} rows)\n", "group", "prefix", "format", "ms",
             "GFLOP/s", "error", kChunkRows);
  for (const int prefix : {0, 2048, 8192}) {
    for (const Format f : kAllFormats) {
      if (prefix == 0 && f != Format::kBf16) continue;  // the step itself is in F32
      const Cache cache = Cache::Make(f, codec, prefix, 0);
      Step step(kGroup, kChunkRows);
      double seconds, error;
      if (!Time(cache, step, budget, &seconds, &error)) return false;
      const double flop = 4.0 * kChunkRows * kKvHeads * kGroup * kHeadDim * (prefix + (kChunkRows + 1) / 2.0);
      fmt::print("{:>5} {:>8} {:>6} {:>10.2f} {:>10.0f} {:>9.1e}\n", kGroup, prefix,
                 prefix == 0 ? "-" : Name(f), seconds * 1e3, 1e-9 * flop / seconds, error);
      results.push_back({{"group", kGroup},
                         {"rows", kChunkRows},
                         {"prefix", prefix},
                         {"format", prefix == 0 ? "" : Name(f)},
                         {"ms", seconds * 1e3},
                         {"gflop_per_s", 1e-9 * flop / seconds},
                         {"relative_error", error}});
    }
  }
  return true;
}

int Main(int argc, char** argv) {
  CLI::App app("Times attention over the KV cache, by format");
  int threads = 0;
  double budget = 1;
  std::string json, codec_name = "rotated";
  app.add_option("--threads", threads, "compute threads (default: all cores)");
  app.add_option("--budget", budget, "seconds per measurement; its fastest pass counts")
      ->check(CLI::Range(0.01, 1000.0));
  app.add_option("--codec", codec_name)->check(CLI::IsMember({"rotated", "paper"}));
  app.add_option("--json", json, "file for the results");
  CLI11_PARSE(app, argc, argv);
  SetComputeThreads(threads);
  const Codec codec = *ParseCodec(codec_name);

  Json report = DescribeRun();
  const double copy = CopyBandwidth(), read = ReadBandwidth();
  fmt::print(
      "{}, {} threads: copy {:.1f} GB/s (read + write), read {:.1f} GB/s; {} KV heads of {}, codec {}\n\n",
      report["cpu"].get<std::string>(), ComputeThreads(), copy, read, kKvHeads, kHeadDim, codec_name);
  report["copy_gb_per_s"] = copy;
  report["read_gb_per_s"] = read;
  report["codec"] = codec_name;
  report["kv_heads"] = kKvHeads;
  report["head_dim"] = kHeadDim;
  if (!MeasureDecode(codec, budget, copy, report["decode"])) return 1;
  if (!MeasurePrefill(codec, budget, report["prefill"])) return 1;
  if (json.empty()) return 0;
  const Status status = WriteFile(json, report.dump(1) + "\n");
  if (!status.ok()) fmt::print(stderr, "decode_attention: {}\n", status.message());
  return status.ok() ? 0 : 1;
}

}  // namespace
}  // namespace triaxial

int main(int argc, char** argv) { return triaxial::Main(argc, argv); }
