// What it costs attention that a block ages step by step, each time from what it holds, instead of being
// quantized once from BF16 into its last format.
//
// Queries, keys and values are those of the pocket agent on recorded conversations, and synthetic ones with
// loud key channels, which stand for a large model. A query reads the complete blocks before its own at the
// format in question and its own block in BF16, as in the cache; attention itself is computed in F64.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <span>
#include <string>
#include <vector>

#include "apps/bench_machine.h"
#include "apps/terminal.h"
#include "base/file.h"
#include "base/parallel.h"
#include "calib/sensitivity.h"
#include "calib/trajectories.h"
#include "ops/kv_codec.h"

namespace triaxial {
namespace {

constexpr int kQueryStride = 8;  // of the queries in the second half, one in so many is measured

// Formats that a block takes one after the other, from BF16.
using Path = std::vector<Format>;
const std::vector<Path>& Paths() {
  using enum Format;
  static const std::vector<Path> paths = {
      {},      {kFp8},         {kK4V4},        {kFp8, kK4V4},         {kK4V2},       {kK4V4, kK4V2},
      {kK2V2}, {kK4V2, kK2V2}, {kK4V4, kK2V2}, {kK4V4, kK4V2, kK2V2}, {kFp8, kK2V2}, {kFp8, kK4V4, kK2V2}};
  return paths;
}

std::string NameOf(const Path& path) {
  std::string name = "bf16";
  for (const Format format : path) name += " > " + std::string(Name(format));
  return name;
}

// The path that goes to the same format at once.
size_t OneShotOf(size_t path) {
  const Path& steps = Paths()[path];
  if (steps.empty()) return path;
  return static_cast<size_t>(std::find(Paths().begin(), Paths().end(), Path{steps.back()}) - Paths().begin());
}

// What one layer attends to, in the codec's basis: q [tokens][num_heads][head_dim], k and v
// [tokens][num_kv_heads][head_dim].
struct Layer {
  std::vector<float> q, k, v;
};

// Squares, summed over queries, heads and channels: of the output, and of its error after each path.
struct Sums {
  double output = 0;
  std::vector<double> error = std::vector<double>(Paths().size(), 0.0);

  void Add(const Sums& other) {
    output += other.output;
    for (size_t p = 0; p < error.size(); ++p) error[p] += other.error[p];
  }
  double Relative(size_t path) const { return std::sqrt(error[path] / output); }
  double Excess(size_t path) const { return Relative(path) / Relative(OneShotOf(path)) - 1; }
};

// One KV head's side, [tokens][head_dim]: exact, and as BF16 holds it.
struct HeadSide {
  std::vector<float> exact, bf16;
};

HeadSide Gather(const KvGeometry& g, const std::vector<float>& x, int head) {
  const size_t dim = static_cast<size_t>(g.head_dim), heads = static_cast<size_t>(g.num_kv_heads);
  HeadSide side;
  for (size_t row = static_cast<size_t>(head) * dim; row < x.size(); row += heads * dim) {
    side.exact.insert(side.exact.end(), x.begin() + static_cast<int64_t>(row),
                      x.begin() + static_cast<int64_t>(row + dim));
  }
  side.bf16.resize(side.exact.size());
  RoundToBf16(side.exact.data(), static_cast<int64_t>(side.exact.size()), side.bf16.data());
  return side;
}

// Complete blocks of k and v take the path's formats in turn.
void Age(const KvGeometry& g, const ClipRatios& clip, const Path& path, std::vector<float>* k,
         std::vector<float>* v) {
  const int64_t block_values = int64_t{kBlockTokens} * g.head_dim;
  std::vector<uint8_t> block(static_cast<size_t>(HeadBytes(g, Format::kBf16)));
  for (int64_t at = 0; at + block_values <= static_cast<int64_t>(k->size()); at += block_values) {
    for (const Format format : path) {
      EncodeBlock(g, format, clip, k->data() + at, v->data() + at, g.head_dim, kBlockTokens, block.data());
      DecodeSide(g, format, Side::kK, block.data(), kBlockTokens, k->data() + at);
      DecodeSide(g, format, Side::kV, block.data(), kBlockTokens, v->data() + at);
    }
  }
}

// Attention of the query at `position`: keys and values of tokens before `recent` are `k` and `v`, later ones
// `recent_k` and `recent_v`.
std::vector<double> Attend(const float* q, int64_t position, int64_t recent, int dim,
                           const std::vector<float>& k, const std::vector<float>& v,
                           const std::vector<float>& recent_k, const std::vector<float>& recent_v) {
  std::vector<double> weights(static_cast<size_t>(position + 1));
  double top = -INFINITY, sum = 0;
  for (int64_t t = 0; t <= position; ++t) {
    const float* key = (t < recent ? k : recent_k).data() + t * dim;
    double score = 0;
    for (int c = 0; c < dim; ++c) score += double{q[c]} * key[c];
    weights[static_cast<size_t>(t)] = score / std::sqrt(static_cast<double>(dim));
    top = std::max(top, weights[static_cast<size_t>(t)]);
  }
  std::vector<double> out(static_cast<size_t>(dim), 0.0);
  for (int64_t t = 0; t <= position; ++t) {
    const double weight = std::exp(weights[static_cast<size_t>(t)] - top);
    const float* value = (t < recent ? v : recent_v).data() + t * dim;
    sum += weight;
    for (int c = 0; c < dim; ++c) out[static_cast<size_t>(c)] += weight * value[c];
  }
  for (double& x : out) x /= sum;
  return out;
}

Sums Measure(const KvGeometry& g, const ClipRatios& clip, int num_heads, const Layer& layer) {
  const int dim = g.head_dim;
  const auto tokens = static_cast<int64_t>(layer.q.size()) / (int64_t{num_heads} * dim);
  const int group = num_heads / g.num_kv_heads;
  Sums total;
  for (int kv_head = 0; kv_head < g.num_kv_heads; ++kv_head) {
    const HeadSide k = Gather(g, layer.k, kv_head), v = Gather(g, layer.v, kv_head);
    std::vector<std::vector<float>> aged_k(Paths().size(), k.bf16), aged_v(Paths().size(), v.bf16);
    for (size_t p = 0; p < Paths().size(); ++p) Age(g, clip, Paths()[p], &aged_k[p], &aged_v[p]);
    const int64_t first = tokens / 2, queries = (tokens - first + kQueryStride - 1) / kQueryStride;
    std::vector<Sums> sums(static_cast<size_t>(queries * group));
    ParallelFor(queries * group, [&](int64_t task) {
      const int64_t position = first + task / group * kQueryStride;
      const int64_t recent = position / kBlockTokens * kBlockTokens;
      const float* q = layer.q.data() + (position * num_heads + kv_head * group + task % group) * dim;
      Sums& sum = sums[static_cast<size_t>(task)];
      const auto exact = Attend(q, position, recent, dim, k.exact, v.exact, k.exact, v.exact);
      for (const double x : exact) sum.output += x * x;
      for (size_t p = 0; p < Paths().size(); ++p) {
        const auto aged = Attend(q, position, recent, dim, aged_k[p], aged_v[p], k.bf16, v.bf16);
        for (size_t c = 0; c < exact.size(); ++c) {
          sum.error[p] += (aged[c] - exact[c]) * (aged[c] - exact[c]);
        }
      }
    });
    for (const Sums& sum : sums) total.Add(sum);
  }
  return total;
}

// Gaussian queries, keys and values, where 4 of 64 pairs of key channels are loud: far from zero, by nearly
// the same amount for every token, and 3 times as wide; 2 value channels are 4 times as wide. The rotated
// codec equalizes keys by the rule of calib/codec_fit.cc, then transforms.
Layer Synthetic(const KvGeometry& g, int num_heads, int tokens, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<float> normal;
  const int dim = g.head_dim, half = dim / 2;
  const auto loud = [&](int c) { return c % half % 16 == 5; };
  Layer layer;
  for (int t = 0; t < tokens; ++t) {
    for (int i = 0; i < num_heads * dim; ++i) layer.q.push_back(2 * normal(random));
    for (int i = 0; i < g.num_kv_heads * dim; ++i) {
      const int c = i % dim;
      const float x = normal(random);
      layer.k.push_back(loud(c) ? (c < half ? 12.0f : -9.0f) + 3 * x : x);
    }
    for (int i = 0; i < g.num_kv_heads * dim; ++i) {
      layer.v.push_back((i % dim % half == 9 ? 4.0f : 1.0f) * normal(random));
    }
  }
  if (g.codec != Codec::kRotated) return layer;
  std::vector<double> q_energy(static_cast<size_t>(half)), k_energy(static_cast<size_t>(half));
  const auto pair_of = [&](size_t i) { return i % static_cast<size_t>(half); };
  for (size_t i = 0; i < layer.q.size(); ++i) q_energy[pair_of(i)] += double{layer.q[i]} * layer.q[i];
  for (size_t i = 0; i < layer.k.size(); ++i) k_energy[pair_of(i)] += double{layer.k[i]} * layer.k[i];
  const auto factor = [&](size_t i) {
    return static_cast<float>(std::pow(k_energy[pair_of(i)] / q_energy[pair_of(i)], 0.25));
  };
  for (size_t i = 0; i < layer.q.size(); ++i) layer.q[i] *= factor(i);
  for (size_t i = 0; i < layer.k.size(); ++i) layer.k[i] /= factor(i);
  for (std::vector<float>* x : {&layer.q, &layer.k, &layer.v}) {
    Hadamard(x->data(), static_cast<int64_t>(x->size()) / dim, dim);
  }
  return layer;
}

struct Flags {
  std::string model = "models/pocket-agent";
  size_t conversations = 4;
  std::string json;
};

Json SumsJson(const Sums& sums) {
  Json json = Json::object();
  for (size_t p = 0; p < Paths().size(); ++p) {
    json[NameOf(Paths()[p])] = {{"relative_error", sums.Relative(p)},
                                {"over_one_shot_percent", 100 * sums.Excess(p)}};
  }
  return json;
}

// Layers of conversations, or draws, together and each apart.
Json Report(const std::string& data, Codec codec, const std::vector<Sums>& parts) {
  Sums all;
  Json apart = Json::array();
  for (const Sums& part : parts) {
    all.Add(part);
    apart.push_back(SumsJson(part));
  }
  std::printf("\n%s, codec %s\n", data.c_str(), Bold(Name(codec)).c_str());
  Table table({"path", "error", "over one shot", "least", "most"}, {false, true, true, true, true});
  for (size_t p = 0; p < Paths().size(); ++p) {
    std::vector<std::string> row = {NameOf(Paths()[p]), Fixed(100 * all.Relative(p), 3) + "%", "", "", ""};
    if (OneShotOf(p) != p) {
      double least = INFINITY, most = -INFINITY;
      for (const Sums& part : parts) {
        least = std::min(least, part.Excess(p));
        most = std::max(most, part.Excess(p));
      }
      row[2] = Fixed(100 * all.Excess(p), 2) + "%";
      row[3] = Fixed(100 * least, 2) + "%";
      row[4] = Fixed(100 * most, 2) + "%";
    }
    table.Add(std::move(row));
  }
  table.Print();
  return {{"data", data},
          {"codec", std::string(Name(codec))},
          {"together", SumsJson(all)},
          {"apart", std::move(apart)}};
}

Status Run(const Flags& flags) {
  Json json = DescribeRun();
  json["query_stride"] = kQueryStride;
  json["results"] = Json::array();
  ASSIGN_OR_RETURN(const ServedModel served, LoadServedModel(flags.model, ""));
  ASSIGN_OR_RETURN(const Trajectories trajectories,
                   Trajectories::Open({flags.model + "/episodes/heldout.jsonl"}));
  for (const Codec codec : {Codec::kRotated, Codec::kPaper}) {
    ASSIGN_OR_RETURN(const auto meter,
                     SensitivityMeter::Create(flags.model, {.precision = Precision::kF32, .codec = codec},
                                              served.preprocessor, {}));
    const KvGeometry geometry = meter->model().geometry();
    const ClipRatios clip = meter->model().calibration().clip;
    const int num_heads = meter->model().config().text.num_heads;
    std::vector<Sums> real, synthetic;
    int64_t tokens = 0;
    const size_t conversations = std::min(flags.conversations, trajectories.size());
    for (size_t i = 0; i < conversations; ++i) {
      ASSIGN_OR_RETURN(const Prompt prompt, trajectories.Read(i, served));
      std::vector<LayerCapture> captures;
      RETURN_IF_ERROR(meter
                          ->Measure(
                              prompt, [](double) { return true; }, &captures)
                          .status());
      tokens += static_cast<int64_t>(prompt.tokens.size());
      for (LayerCapture& capture : captures) {
        real.push_back(Measure(geometry, clip, num_heads,
                               {std::move(capture.q), std::move(capture.k), std::move(capture.v)}));
      }
    }
    for (const uint64_t seed : {1, 2, 3, 4}) {
      synthetic.push_back(Measure(geometry, clip, num_heads, Synthetic(geometry, num_heads, 1024, seed)));
    }
    json["results"].push_back(Report("pocket agent, " + std::to_string(conversations) + " conversations, " +
                                         std::to_string(tokens) + " tokens",
                                     codec, real));
    json["results"].push_back(Report("synthetic, 4 draws of 1024 tokens", codec, synthetic));
  }
  return flags.json.empty() ? OkStatus() : WriteFile(flags.json, json.dump(1) + "\n");
}

}  // namespace
}  // namespace triaxial

int main(int argc, char** argv) {
  CLI::App app("Attention error of blocks that age step by step, against quantizing once");
  triaxial::Flags flags;
  app.add_option("--model", flags.model, "Checkpoint directory with episodes/heldout.jsonl")
      ->capture_default_str();
  app.add_option("--conversations", flags.conversations, "How many of them, from the first on")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  app.add_option("--json", flags.json, "JSON file to write, such as bench/results/requantize.json");
  CLI11_PARSE(app, argc, argv);
  const triaxial::Status status = triaxial::Run(flags);
  if (status.ok()) return 0;
  std::fprintf(stderr, "requantize: %s\n", status.message().c_str());
  return 1;
}
