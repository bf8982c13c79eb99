// The operators of ops/ under measurement. Caches of many layers are visited in turn, so that every byte
// comes from memory, as in a model.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <random>

#include "apps/bench_kernels.h"
#include "apps/bench_machine.h"
#include "base/checked_math.h"
#include "base/float16.h"
#include "base/parallel.h"
#include "kv/arena.h"
#include "kv/codec.h"
#include "ops/attention.h"
#include "ops/attention_amx.h"
#include "ops/kv_store.h"
#include "ops/linear.h"

namespace triaxial {
namespace {

// Of one query vector; with many rows products are of BF16 where the CPU has a unit for them.
constexpr double kLargestError = 1e-3, kLargestErrorInBf16 = 4e-3;
constexpr int kPool = 32;  // different block heads of a format

// BF16 numbers, as those of a model that multiplies so.
std::vector<float> Normal(size_t n, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> x(n);
  for (float& value : x) value = Bf16ToFloat(FloatToBf16(normal(random)));
  return x;
}

// Encoded heads of random blocks: [kPool][HeadBytes].
std::vector<uint8_t> EncodedHeads(const KvGeometry& g, Format f, uint32_t seed) {
  const auto bytes = static_cast<size_t>(HeadBytes(g, f));
  std::vector<uint8_t> pool(kPool * bytes);
  const auto values = static_cast<size_t>(kBlockTokens * g.head_dim);
  for (uint32_t i = 0; i < kPool; ++i) {
    const std::vector<float> k = Normal(values, seed + 2 * i), v = Normal(values, seed + 2 * i + 1);
    EncodeBlockScalar(g, f, {}, k.data(), v.data(), g.head_dim, kBlockTokens, &pool[i * bytes]);
  }
  return pool;
}

// Runs `step` on layer after layer; seconds of one layer. A round is long against the clock and short against
// a time slice; the next goes on where it stopped.
template <typename Step>
double SecondsOfLayer(int layers, double budget, const Step& step) {
  constexpr double kRound = 1e-3;
  int layer = 0, per_round = 1;
  const auto round = [&] {
    for (int i = 0; i < per_round; ++i, layer = (layer + 1) % layers) step(layer);
  };
  per_round = std::max(1, static_cast<int>(kRound / BestSeconds(budget / 8, round)));
  return BestSeconds(budget, round) / per_round;
}

class CpuBench final : public KernelBench {
 public:
  explicit CpuBench(int64_t working_set) : working_set_(working_set) {}
  std::string device() const override {
    return DescribeRun()["cpu"].get<std::string>() + ", " + std::to_string(ComputeThreads()) + " threads";
  }
  double CopyGbPerS() override { return CopyBandwidth(); }
  double ReadGbPerS() override { return ReadBandwidth(); }
  std::vector<KernelResources> Resources() const override { return {}; }

  Result<KernelTime> TimeAttention(const AttentionCase& c, double budget) override;
  Result<KernelTime> TimeCodec(const CodecCase& c, double budget) override;

 private:
  // Layers whose caches together are out of reach of the processor's.
  int LayersFor(int64_t layer_bytes) const {
    return static_cast<int>(std::max<int64_t>(4, CeilDiv(working_set_, std::max<int64_t>(layer_bytes, 1))));
  }
  const std::vector<uint8_t>& Pool(const KvGeometry& g, Format f) {
    std::vector<uint8_t>& pool = pools_[{g.codec, g.head_dim, f}];
    if (pool.empty()) pool = EncodedHeads(g, f, 1000 * (static_cast<uint32_t>(f) + 1));
    return pool;
  }

  const int64_t working_set_;
  std::map<std::tuple<Codec, int, Format>, std::vector<uint8_t>> pools_;
};

Result<KernelTime> CpuBench::TimeAttention(const AttentionCase& c, double budget) {
  KvGeometry g = c.geometry;
  const std::vector<Format> formats = c.mix.Spread(c.context / kBlockTokens);
  KernelTime time;
  time.bytes = c.batch * LayerBytes(g, formats);
  // Decode is bound by memory, a chunk by arithmetic.
  g.num_layers = c.rows == 1 ? LayersFor(time.bytes) : 4;
  int64_t rows = 0;
  std::vector<std::vector<KvBlockRef>> blocks(static_cast<size_t>(c.batch));
  for (auto& sequence : blocks) {
    for (const Format f : formats) {
      sequence.push_back({static_cast<uint32_t>(rows), kBlockTokens, f});
      rows += UnitsOf(g, f);
    }
  }
  // An arena holds one BF16 block at least.
  rows = std::max<int64_t>(rows, UnitsOf(g, Format::kBf16));
  ASSIGN_OR_RETURN(KvArena arena, KvArena::Create(g, rows * UnitRowBytes(g) * g.num_layers));
  for (const Format f : formats) Pool(g, f);
  ParallelFor(g.num_layers, [&](int64_t layer) {
    std::mt19937 random(static_cast<uint32_t>(layer));
    uint8_t* data = arena.LayerData(static_cast<int>(layer));
    for (const auto& sequence : blocks) {
      for (const KvBlockRef& block : sequence) {
        const auto bytes = static_cast<size_t>(HeadBytes(g, block.format));
        const uint8_t* pool = pools_.at({g.codec, g.head_dim, block.format}).data();
        uint8_t* out = data + block.unit_row * UnitRowBytes(g);
        for (int h = 0; h < g.num_kv_heads; ++h, out += bytes)
          std::memcpy(out, pool + random() % kPool * bytes, bytes);
      }
    }
  });
  std::mt19937 shuffler(1);
  std::vector<AttentionSequence> sequences;
  for (auto& sequence : blocks) {
    std::shuffle(sequence.begin(), sequence.end(), shuffler);  // as blocks come and go
    sequences.push_back({static_cast<int32_t>(sequences.size()) * c.rows, c.rows, sequence});
  }

  const auto vectors = static_cast<size_t>(c.batch) * static_cast<size_t>(c.rows * g.num_kv_heads);
  const auto d = static_cast<size_t>(g.head_dim);
  const std::vector<float> q = Normal(vectors * static_cast<size_t>(c.group) * d, 2),
                           k = Normal(vectors * d, 3), v = Normal(vectors * d, 4);
  std::vector<float> out(q.size());
  const auto scale = static_cast<float>(1 / std::sqrt(static_cast<double>(g.head_dim)));
  Attention attention(HasBf16Products() ? Element::kBf16 : Element::kF32);
  const auto run = [&](int layer) {
    attention.Run({g, g.num_kv_heads * c.group, scale, arena.LayerData(layer), q.data(), k.data(), v.data(),
                   out.data(), sequences});
  };
  run(0);
  // The last query head of the last row of the first and of the last sequence.
  for (const size_t s : {size_t{0}, sequences.size() - 1}) {
    std::vector<float> keys, values, side(kBlockTokens * d);
    for (const KvBlockRef& block : blocks[s]) {
      const uint8_t* head = arena.LayerData(0) + block.unit_row * UnitRowBytes(g) +
                            (g.num_kv_heads - 1) * HeadBytes(g, block.format);
      DecodeSideScalar(g, block.format, Side::kK, head, kBlockTokens, side.data());
      keys.insert(keys.end(), side.begin(), side.end());
      DecodeSideScalar(g, block.format, Side::kV, head, kBlockTokens, side.data());
      values.insert(values.end(), side.begin(), side.end());
    }
    const auto heads = static_cast<size_t>(g.num_kv_heads);
    const size_t first = s * static_cast<size_t>(c.rows), end = first + static_cast<size_t>(c.rows);
    for (size_t row = first; row < end; ++row) {
      const size_t at = (row * heads + heads - 1) * d;
      keys.insert(keys.end(), &k[at], &k[at] + d);
      values.insert(values.end(), &v[at], &v[at] + d);
    }
    const size_t last = (end * heads * static_cast<size_t>(c.group) - 1) * d;
    time.error = std::max(time.error, AttentionError(&q[last], scale, keys, values, g.head_dim, &out[last]));
  }
  if (!(time.error < (c.rows > 1 && CpuHasAmx() ? kLargestErrorInBf16 : kLargestError)))
    return Internal("attention over " + c.mix.Name() + " is off by " + std::to_string(time.error) +
                    " of its length");
  time.seconds = SecondsOfLayer(g.num_layers, budget, run);
  return time;
}

Result<KernelTime> CpuBench::TimeCodec(const CodecCase& c, double budget) {
  KvGeometry g = c.geometry;
  const bool append = c.op == CodecCase::Op::kAppend, convert = c.op == CodecCase::Op::kConvert;
  const Format to = append ? Format::kBf16 : c.to;
  const int row_values = g.num_kv_heads * g.head_dim;
  const int rows_of_block = append ? 1 : kBlockTokens;
  KernelTime time;
  const int64_t to_bytes = int64_t{HeadBytes(g, to)} * g.num_kv_heads;
  const int64_t from_bytes = convert ? int64_t{HeadBytes(g, c.from)} * g.num_kv_heads
                                     : int64_t{2} * rows_of_block * row_values * int64_t{sizeof(float)};
  time.bytes = c.blocks * (from_bytes + (append ? to_bytes / kBlockTokens : to_bytes));
  const int from_units = convert ? UnitsOf(g, c.from) : 0, units = from_units + UnitsOf(g, to);
  g.num_layers = LayersFor(c.blocks * units * UnitRowBytes(g));
  ASSIGN_OR_RETURN(KvArena arena, KvArena::Create(g, c.blocks * units * UnitRowBytes(g) * g.num_layers));
  const auto values = static_cast<size_t>(c.blocks) * static_cast<size_t>(rows_of_block * row_values);
  const std::vector<float> k = Normal(values, 5), v = Normal(values, 6);
  std::vector<KvStore> stores;
  std::vector<KvConvert> converts;
  for (int64_t b = 0; b < c.blocks; ++b) {
    const auto row = static_cast<uint32_t>(b * units), place = row + static_cast<uint32_t>(from_units);
    stores.push_back(
        {place, place, static_cast<int32_t>(b) * rows_of_block, 0, static_cast<uint8_t>(rows_of_block), to});
    converts.push_back({row, place, c.from, to});
  }
  if (convert) {
    Pool(g, c.from);
    ParallelFor(g.num_layers, [&](int64_t layer) {
      const std::vector<uint8_t>& pool = pools_.at({g.codec, g.head_dim, c.from});
      std::mt19937 random(static_cast<uint32_t>(layer));
      const auto bytes = static_cast<size_t>(HeadBytes(g, c.from));
      for (int64_t b = 0; b < c.blocks; ++b) {
        uint8_t* out = arena.LayerData(static_cast<int>(layer)) + b * units * UnitRowBytes(g);
        for (int h = 0; h < g.num_kv_heads; ++h, out += bytes)
          std::memcpy(out, &pool[random() % kPool * bytes], bytes);
      }
    });
  }
  const auto run = [&](int layer) {
    if (convert)
      ConvertKv(g, {}, arena.LayerData(layer), converts);
    else
      StoreKv(g, {}, arena.LayerData(layer), k.data(), v.data(), stores);
  };
  run(0);
  // The last head of the last block, as the scalar codec has it.
  const auto d = static_cast<size_t>(g.head_dim);
  std::vector<float> sides[2] = {std::vector<float>(kBlockTokens * d), std::vector<float>(kBlockTokens * d)};
  for (const Side side : {Side::kK, Side::kV}) {
    std::vector<float>& x = sides[side == Side::kK ? 0 : 1];
    if (convert) {
      DecodeSideScalar(g, c.from, side,
                       arena.LayerData(0) + converts.back().from_row * UnitRowBytes(g) +
                           (g.num_kv_heads - 1) * HeadBytes(g, c.from),
                       kBlockTokens, x.data());
      continue;
    }
    const std::vector<float>& source = side == Side::kK ? k : v;
    for (size_t t = 0; t < static_cast<size_t>(rows_of_block); ++t) {
      const size_t row = static_cast<size_t>(stores.back().row_begin) + t;
      const float* from =
          &source[row * static_cast<size_t>(row_values) + static_cast<size_t>(row_values) - d];
      for (size_t i = 0; i < d; ++i) x[t * d + i] = Bf16ToFloat(FloatToBf16(from[i]));
    }
  }
  std::vector<uint8_t> expected(static_cast<size_t>(HeadBytes(g, to)));
  EncodeBlockScalar(g, to, {}, sides[0].data(), sides[1].data(), g.head_dim, rows_of_block, expected.data());
  const uint8_t* head =
      arena.LayerData(0) + stores.back().unit_row * UnitRowBytes(g) + (g.num_kv_heads - 1) * HeadBytes(g, to);
  if (!std::equal(expected.begin(), expected.end(), head))
    return Internal(std::string(Name(c.op)) + " to " + std::string(Name(to)) +
                    " differs from the scalar codec");
  time.seconds = SecondsOfLayer(g.num_layers, budget, run);
  return time;
}

}  // namespace

std::unique_ptr<KernelBench> CpuKernelBench(int64_t working_set) {
  return std::make_unique<CpuBench>(working_set);
}

}  // namespace triaxial
