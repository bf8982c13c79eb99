// The operators of ops/cuda under measurement: as CUDA graphs whose launches visit the layers in turn, so
// that nothing waits in the L2 cache.
#include <algorithm>
#include <cmath>
#include <map>
#include <random>

#include "apps/bench_bandwidth.h"
#include "apps/bench_kernels.h"
#include "apps/bench_trace.h"
#include "base/checked_math.h"
#include "base/float16.h"
#include "kv/codec.h"
#include "ops/cuda/attention.h"
#include "ops/cuda/kv_memory.h"
#include "ops/cuda/kv_store.h"
#include "ops/cuda/layout_convert.h"

namespace triaxial::cuda {
namespace {

constexpr int64_t kWorkingSet = int64_t{512} << 20;  // ten times the L2 cache
constexpr double kLargestError = 2e-3;
constexpr int kPool = 32;  // different blocks, 64 rows of K and V each
constexpr int kMostLaunches = 64;

template <typename T>
T* Upload(DeviceBuffer* buffer, const std::vector<T>& values) {
  T* data = buffer->Reserve<T>(static_cast<int64_t>(std::max<size_t>(values.size(), 1)));
  CUDA_OK(cudaMemcpy(data, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
  return data;
}

std::vector<uint16_t> NormalBf16(size_t n, uint32_t seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  // Repeats after a prime number of values: drawing hundreds of millions would take minutes.
  std::vector<uint16_t> drawn(std::min<size_t>(n, 1'000'003)), values(n);
  for (uint16_t& x : drawn) x = FloatToBf16(normal(random));
  for (size_t i = 0; i < n; ++i) values[i] = drawn[i % drawn.size()];
  return values;
}

// Random rows of K and V, of which caches are made: [kPool * 64][kv_heads][head_dim].
struct RowPool {
  explicit RowPool(const KvGeometry& geometry) : g(geometry) {
    const auto values = static_cast<size_t>(kPool * kBlockTokens * g.num_kv_heads * g.head_dim);
    k = NormalBf16(values, 1);
    v = NormalBf16(values, 2);
    device_k = Upload(&k_buffer, k);
    device_v = Upload(&v_buffer, v);
  }
  int64_t stride() const { return int64_t{g.num_kv_heads} * g.head_dim; }
  // The first `rows` rows of a pool block at one head, F32.
  std::vector<float> Rows(Side side, int block, int head, int rows) const {
    const std::vector<uint16_t>& source = side == Side::kK ? k : v;
    std::vector<float> x;
    for (int t = 0; t < rows; ++t) {
      const int64_t at = (block * kBlockTokens + t) * stride() + int64_t{head} * g.head_dim;
      for (int c = 0; c < g.head_dim; ++c) x.push_back(Bf16ToFloat(source[static_cast<size_t>(at + c)]));
    }
    return x;
  }
  // One head as the scalar codec stores it.
  std::vector<uint8_t> Encoded(Format f, int block, int head, int rows = kBlockTokens) const {
    const std::vector<float> keys = Rows(Side::kK, block, head, rows),
                             values = Rows(Side::kV, block, head, rows);
    std::vector<uint8_t> out(static_cast<size_t>(HeadBytes(g, f)));
    EncodeBlockScalar(g, f, {}, keys.data(), values.data(), g.head_dim, rows, out.data());
    return out;
  }

  const KvGeometry g;
  std::vector<uint16_t> k, v;
  DeviceBuffer k_buffer, v_buffer;
  uint16_t *device_k = nullptr, *device_v = nullptr;
};

// Stores on the device, ready to run.
struct DeviceStores {
  explicit DeviceStores(const std::vector<KvStore>& wanted) {
    StoreList list;
    ListStores(wanted, &list);
    stores = Upload(&stores_buffer, list.stores);
    groups = Upload(&groups_buffer, list.groups);
    count = list.groups.front();
  }
  DeviceBuffer stores_buffer, groups_buffer;
  const KvStore* stores;
  const int32_t* groups;
  int count;
};

class CudaBench final : public KernelBench {
 public:
  std::string device() const override { return CurrentDevice().name; }
  double CopyGbPerS() override { return DeviceCopyGbPerS(); }
  double ReadGbPerS() override { return DeviceReadGbPerS(); }
  std::vector<KernelResources> Resources() const override { return resources_; }

  Result<KernelTime> TimeAttention(const AttentionCase& c, double seconds) override;
  Result<KernelTime> TimeCodec(const CodecCase& c, double seconds) override;

 private:
  RowPool& Pool(const KvGeometry& g) {
    std::unique_ptr<RowPool>& pool = pools_[{g.num_kv_heads, g.head_dim, g.codec}];
    if (pool == nullptr) pool = std::make_unique<RowPool>(g);
    return *pool;
  }
  static int LayersFor(int64_t layer_bytes) {
    return static_cast<int>(
        std::clamp<int64_t>(CeilDiv(kWorkingSet, std::max<int64_t>(layer_bytes, 1)), 2, kMostLaunches));
  }
  static CacheRegion Layer(const CudaKvMemory& memory, int layer) {
    const CacheRegion all = memory.region();
    return {all.data + layer * all.layer_bytes, all.layer_bytes, 1};
  }
  // Runs `record` once under the tracer and keeps what it says of the kernels.
  void Trace(const std::function<void(cudaStream_t)>& record) {
    StepTrace trace;
    if (!trace.Start().ok()) return;
    record(stream_);
    stream_.Synchronize();
    for (const TracedKernel& kernel : trace.Stop()) {
      const auto same = [&](const KernelResources& known) { return known.name == kernel.name; };
      if (kernel.name == "copy" || std::any_of(resources_.begin(), resources_.end(), same)) continue;
      resources_.push_back({kernel.name, kernel.registers, kernel.local_bytes, kernel.shared_bytes});
    }
  }

  Stream stream_;
  std::map<std::tuple<int, int, Codec>, std::unique_ptr<RowPool>> pools_;
  std::vector<KernelResources> resources_;
};

Result<KernelTime> CudaBench::TimeAttention(const AttentionCase& c, double budget) {
  KvGeometry g = c.geometry;
  const std::vector<Format> formats = c.mix.Spread(c.context / kBlockTokens);
  KernelTime time;
  time.bytes = c.batch * LayerBytes(g, formats);
  g.num_layers = c.rows == 1 ? LayersFor(time.bytes) : 2;
  RowPool& pool = Pool(c.geometry);
  std::mt19937 random(3);
  int64_t unit_rows = 0;
  std::vector<std::vector<KvBlockRef>> blocks(static_cast<size_t>(c.batch));
  std::vector<std::vector<int>> sources(blocks.size());  // pool block of each
  std::vector<KvStore> wanted;
  for (size_t s = 0; s < blocks.size(); ++s) {
    std::vector<Format> shuffled = formats;  // as blocks come and go
    std::shuffle(shuffled.begin(), shuffled.end(), random);
    for (const Format f : shuffled) {
      const auto row = static_cast<uint32_t>(unit_rows);
      blocks[s].push_back({row, kBlockTokens, f});
      sources[s].push_back(static_cast<int>(random() % kPool));
      wanted.push_back({row, row, sources[s].back() * kBlockTokens, 0, kBlockTokens, f});
      unit_rows += UnitsOf(g, f);
    }
  }
  // A cache holds one BF16 block at least.
  unit_rows = std::max<int64_t>(unit_rows, UnitsOf(g, Format::kBf16));
  ASSIGN_OR_RETURN(const std::unique_ptr<KvMemory> owned,
                   CudaKvMemory::Create(g, unit_rows * UnitRowBytes(g) * g.num_layers, stream_));
  const auto& memory = static_cast<const CudaKvMemory&>(*owned);
  if (!wanted.empty()) {
    const DeviceStores stores(wanted);
    for (int layer = 0; layer < g.num_layers; ++layer) {
      StoreKv(g, {}, Layer(memory, layer), pool.device_k, pool.device_v, pool.stride(), stores.stores,
              stores.groups, stores.count, stream_);
    }
    stream_.Synchronize();
  }

  const int num_heads = g.num_kv_heads * c.group;
  const int64_t rows = int64_t{c.batch} * c.rows, q_stride = int64_t{num_heads} * g.head_dim,
                kv_stride = pool.stride();
  const std::vector<uint16_t> q = NormalBf16(static_cast<size_t>(rows * q_stride), 4),
                              k = NormalBf16(static_cast<size_t>(rows * kv_stride), 5),
                              v = NormalBf16(static_cast<size_t>(rows * kv_stride), 6);
  DeviceBuffer q_buffer, k_buffer, v_buffer, out_buffer;
  LayerAttention layer;
  layer.q = Upload(&q_buffer, q);
  layer.k = Upload(&k_buffer, k);
  layer.v = Upload(&v_buffer, v);
  layer.q_stride = q_stride;
  layer.kv_stride = kv_stride;
  layer.out = out_buffer.Reserve<uint16_t>(rows * q_stride);
  layer.scale = static_cast<float>(1 / std::sqrt(static_cast<double>(g.head_dim)));
  layer.overlap = c.rows == 1;  // as in a model, where nothing that runs before writes these blocks
  std::vector<AttentionSequence> sequences;
  for (const auto& sequence : blocks)
    sequences.push_back({static_cast<int32_t>(sequences.size()) * c.rows, c.rows, sequence});
  cuda::Attention attention(g, num_heads,
                            {.sequences = c.batch,
                             .blocks = std::max<int64_t>(1, static_cast<int64_t>(wanted.size())),
                             .rows = static_cast<int>(rows)});
  attention.Plan(sequences, stream_);
  const auto run = [&](int l, cudaStream_t stream) {
    layer.arena = Layer(memory, l).data;
    if (c.rows == 1)
      attention.RunDecode(layer, stream);
    else
      attention.RunPrefill(layer, stream);
  };
  Trace([&](cudaStream_t stream) { run(0, stream); });
  run(0, stream_);
  stream_.Synchronize();
  std::vector<uint16_t> out(static_cast<size_t>(rows * q_stride));
  CUDA_OK(cudaMemcpy(out.data(), layer.out, out.size() * sizeof(uint16_t), cudaMemcpyDeviceToHost));
  // The last query head of the last row of the first and of the last sequence.
  const auto floats = [&](const std::vector<uint16_t>& x, int64_t at) {
    std::vector<float> y;
    for (int i = 0; i < g.head_dim; ++i) y.push_back(Bf16ToFloat(x[static_cast<size_t>(at + i)]));
    return y;
  };
  std::map<std::pair<Format, int>, std::array<std::vector<float>, 2>> decoded;
  for (const size_t s : {size_t{0}, blocks.size() - 1}) {
    std::vector<float> keys, values;
    for (size_t b = 0; b < blocks[s].size(); ++b) {
      auto& sides = decoded[{blocks[s][b].format, sources[s][b]}];
      if (sides[0].empty()) {
        const std::vector<uint8_t> head =
            pool.Encoded(blocks[s][b].format, sources[s][b], g.num_kv_heads - 1);
        for (const Side side : {Side::kK, Side::kV}) {
          std::vector<float>& x = sides[side == Side::kK ? 0 : 1];
          x.resize(static_cast<size_t>(kBlockTokens * g.head_dim));
          DecodeSideScalar(g, blocks[s][b].format, side, head.data(), kBlockTokens, x.data());
        }
      }
      keys.insert(keys.end(), sides[0].begin(), sides[0].end());
      values.insert(values.end(), sides[1].begin(), sides[1].end());
    }
    const int64_t first = static_cast<int64_t>(s) * c.rows, last = first + c.rows - 1;
    for (int64_t row = first; row <= last; ++row) {
      const std::vector<float> key = floats(k, (row + 1) * kv_stride - g.head_dim),
                               value = floats(v, (row + 1) * kv_stride - g.head_dim);
      keys.insert(keys.end(), key.begin(), key.end());
      values.insert(values.end(), value.begin(), value.end());
    }
    std::vector<float> got = floats(out, (last + 1) * q_stride - g.head_dim);
    if (g.codec == Codec::kRotated) HadamardScalar(got.data(), g.head_dim);  // it was rotated back
    time.error = std::max(time.error, AttentionError(floats(q, (last + 1) * q_stride - g.head_dim).data(),
                                                     layer.scale, keys, values, g.head_dim, got.data()));
  }
  // The output is BF16, which alone may be off by 2^-9 of a value.
  if (!(time.error < kLargestError))
    return Internal("attention over " + c.mix.Name() + " is off by " + std::to_string(time.error) +
                    " of its length");
  time.seconds = GraphSeconds(budget,
                              [&](cudaStream_t stream) {
                                for (int l = 0; l < g.num_layers; ++l) run(l, stream);
                              }) /
                 g.num_layers;
  return time;
}

Result<KernelTime> CudaBench::TimeCodec(const CodecCase& c, double budget) {
  KvGeometry g = c.geometry;
  RowPool& pool = Pool(c.geometry);
  const bool append = c.op == CodecCase::Op::kAppend, convert = c.op == CodecCase::Op::kConvert;
  const Format to = append ? Format::kBf16 : c.to;
  const int rows_of_block = append ? 1 : kBlockTokens;
  const int64_t to_bytes = int64_t{HeadBytes(g, to)} * g.num_kv_heads;
  const int64_t from_bytes = convert ? int64_t{HeadBytes(g, c.from)} * g.num_kv_heads
                                     : 2 * rows_of_block * pool.stride() * int64_t{sizeof(uint16_t)};
  KernelTime time;
  time.bytes = c.blocks * (from_bytes + (append ? to_bytes / kBlockTokens : to_bytes));
  const int from_units = convert ? UnitsOf(g, c.from) : 0, units = from_units + UnitsOf(g, to);
  g.num_layers = LayersFor(c.blocks * units * UnitRowBytes(g));
  ASSIGN_OR_RETURN(const std::unique_ptr<KvMemory> owned,
                   CudaKvMemory::Create(g, c.blocks * units * UnitRowBytes(g) * g.num_layers, stream_));
  const auto& memory = static_cast<const CudaKvMemory&>(*owned);
  std::vector<KvStore> fill, stores;
  std::vector<KvConvert> converts;
  for (int64_t b = 0; b < c.blocks; ++b) {
    const auto row = static_cast<uint32_t>(b * units), place = row + static_cast<uint32_t>(from_units);
    const auto source = static_cast<int32_t>(b % kPool * kBlockTokens);
    if (convert) fill.push_back({row, row, source, 0, kBlockTokens, c.from});
    stores.push_back({place, place, source, 0, static_cast<uint8_t>(rows_of_block), to});
    converts.push_back({row, place, c.from, to});
  }
  const auto store = [&](const DeviceStores& list, const CacheRegion& region, cudaStream_t stream) {
    StoreKv(g, {}, region, pool.device_k, pool.device_v, pool.stride(), list.stores, list.groups, list.count,
            stream);
  };
  if (convert) {
    const DeviceStores list(fill);
    for (int l = 0; l < g.num_layers; ++l) store(list, Layer(memory, l), stream_);
    stream_.Synchronize();
  }
  const DeviceStores list(stores);
  DeviceBuffer converts_buffer, count_buffer;
  const KvConvert* device_converts = Upload(&converts_buffer, converts);
  const int32_t* count = Upload(&count_buffer, std::vector<int32_t>{static_cast<int32_t>(converts.size())});
  // Stores run layer by layer, as a step's do; conversions of all layers are one launch.
  const auto run = [&](cudaStream_t stream) {
    if (convert)
      ConvertKv(g, {}, memory.region(), device_converts, count, static_cast<int>(converts.size()), stream);
    for (int l = 0; l < g.num_layers && !convert; ++l) store(list, Layer(memory, l), stream);
  };
  Trace(run);
  run(stream_);
  stream_.Synchronize();
  // The last block, as the scalar codec has it.
  const auto last = static_cast<int>((c.blocks - 1) % kPool);
  std::vector<uint8_t> expected,
      row_bytes(static_cast<size_t>(UnitsOf(g, to) * UnitRowBytes(g) * g.num_layers));
  for (int h = 0; h < g.num_kv_heads; ++h) {
    std::vector<uint8_t> head = pool.Encoded(convert ? c.from : to, last, h, rows_of_block);
    if (convert) {
      std::vector<float> sides[2];
      for (const Side side : {Side::kK, Side::kV}) {
        std::vector<float>& x = sides[side == Side::kK ? 0 : 1];
        x.resize(static_cast<size_t>(kBlockTokens * g.head_dim));
        DecodeSideScalar(g, c.from, side, head.data(), kBlockTokens, x.data());
      }
      head.resize(static_cast<size_t>(HeadBytes(g, to)));
      EncodeBlockScalar(g, to, {}, sides[0].data(), sides[1].data(), g.head_dim, kBlockTokens, head.data());
    }
    expected.insert(expected.end(), head.begin(), head.end());
  }
  RETURN_IF_ERROR(memory.Read(stores.back().unit_row, UnitsOf(g, to), row_bytes.data()));
  std::vector<uint8_t> got(expected.size());
  CpuFromCuda(g, to, kBlockTokens, row_bytes.data(), got.data());
  if (got != expected)
    return Internal(std::string(Name(c.op)) + " to " + std::string(Name(to)) +
                    " differs from the scalar codec");
  time.seconds = GraphSeconds(budget, run) / g.num_layers;
  return time;
}

}  // namespace
}  // namespace triaxial::cuda

namespace triaxial {

Result<std::unique_ptr<KernelBench>> CudaKernelBench() {
  std::string why;
  if (!cuda::FindDevice(&why)) return Unavailable("no GPU to measure: " + why + "; give --device cpu");
  return std::unique_ptr<KernelBench>(std::make_unique<cuda::CudaBench>());
}

}  // namespace triaxial
