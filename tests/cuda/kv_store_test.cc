// The write path on the GPU: bytes of blocks against the scalar codec (kv/codec.h), converted to the GPU's
// layout.
#include "ops/cuda/kv_store.h"

#include <cmath>
#include <cstring>
#include <random>
#include <vector>

#include "base/float16.h"
#include "gpu_test.h"
#include "kv/codec.h"
#include "ops/cuda/device.h"
#include "ops/cuda/layout.h"
#include "ops/cuda/layout_convert.h"

namespace triaxial::cuda {
namespace {

constexpr int kRows = 4096;  // unit rows of the cache
constexpr ClipRatios kClip = {0.92f, 0.85f, 1.2f, 1.35f};

struct Case {
  KvGeometry geometry;
  const char* name;
};
std::vector<Case> Cases() {
  return {{{3, 8, 128, Codec::kRotated}, "rotated 128"},
          {{2, 4, 64, Codec::kRotated}, "rotated 64"},
          {{2, 2, 128, Codec::kPaper}, "paper 128"},
          {{1, 3, 64, Codec::kPaper}, "paper 64"}};
}

// Values of every kind that keys and values may have: ordinary, large, tiny, constant groups, NaN and
// infinity.
std::vector<uint16_t> RandomValues(size_t n, std::mt19937& random) {
  std::normal_distribution<float> normal;
  std::uniform_int_distribution<int> kind(0, 199);
  std::vector<uint16_t> values(n);
  float factor = 1;
  for (size_t i = 0; i < n; ++i) {
    if (i % 64 == 0) {
      const int k = kind(random);
      factor = k < 4 ? 1e6f : k < 8 ? 1e-7f : k < 12 ? 0.0f : 1.0f;
    }
    float x = normal(random) * factor;
    const int k = kind(random) * 100 + kind(random) % 100;
    if (k == 0) x = INFINITY;
    if (k == 1) x = -INFINITY;
    if (k == 2) x = -0.0f;
    values[i] = k == 3 ? 0x7fff : FloatToBf16(x);
  }
  return values;
}

// A cache of one layer after the other, filled with noise, and its twin on the host that expectations are
// written to.
class Twin {
 public:
  explicit Twin(const KvGeometry& g) : g_(g), layer_bytes_(kRows * UnitRowBytes(g)) {
    host_.resize(static_cast<size_t>(layer_bytes_ * g.num_layers));
    for (size_t i = 0; i < host_.size(); ++i) host_[i] = static_cast<uint8_t>(i * 2654435761u >> 24);
    device_.Reserve(host_.size());
    CUDA_OK(cudaMemcpy(device_.data(), host_.data(), host_.size(), cudaMemcpyHostToDevice));
  }

  // What the scalar codec makes of a block's tokens: k, v [tokens][heads][dim].
  void Expect(int layer, uint32_t row, Format f, int capacity, const std::vector<uint16_t>& k,
              const std::vector<uint16_t>& v, int tokens) {
    const int width = g_.num_kv_heads * g_.head_dim;
    std::vector<float> wide_k, wide_v;
    for (int i = 0; i < tokens * width; ++i) {
      wide_k.push_back(Bf16ToFloat(k[static_cast<size_t>(i)]));
      wide_v.push_back(Bf16ToFloat(v[static_cast<size_t>(i)]));
    }
    if (f != Format::kBf16) capacity = kBlockTokens;
    const int head = f == Format::kBf16 ? 2 * capacity * g_.head_dim * 2 : HeadBytes(g_, f);
    std::vector<uint8_t> cpu(static_cast<size_t>(g_.num_kv_heads * head));
    for (int h = 0; h < g_.num_kv_heads; ++h) {
      uint8_t* out = cpu.data() + h * head;
      if (f != Format::kBf16) {
        EncodeBlockScalar(g_, f, kClip, wide_k.data() + h * g_.head_dim, wide_v.data() + h * g_.head_dim,
                          width, tokens, out);
        continue;
      }
      for (int t = 0; t < tokens; ++t) {
        for (int c = 0; c < g_.head_dim; ++c) {
          const size_t i = static_cast<size_t>(t * width + h * g_.head_dim + c);
          std::memcpy(out + 2 * PlaceOfBf16(c, t, capacity), &k[i], 2);
          std::memcpy(out + capacity * g_.head_dim * 2 + 2 * PlaceOfBf16(t, c, g_.head_dim), &v[i], 2);
        }
      }
    }
    CudaFromCpu(g_, f, capacity, cpu.data(), At(layer, row));
  }
  // What a conversion makes of what the host has in `from`.
  void ExpectConverted(int layer, const KvConvert& convert) {
    const int from_head = HeadBytes(g_, convert.from), to_head = HeadBytes(g_, convert.to);
    std::vector<uint8_t> in(static_cast<size_t>(g_.num_kv_heads * from_head));
    std::vector<uint8_t> out(static_cast<size_t>(g_.num_kv_heads * to_head));
    CpuFromCuda(g_, convert.from, kBlockTokens, At(layer, convert.from_row), in.data());
    std::vector<float> sides[2];
    for (int h = 0; h < g_.num_kv_heads; ++h) {
      for (const Side side : {Side::kK, Side::kV}) {
        sides[static_cast<int>(side)].resize(static_cast<size_t>(kBlockTokens * g_.head_dim));
        DecodeSideScalar(g_, convert.from, side, in.data() + h * from_head, kBlockTokens,
                         sides[static_cast<int>(side)].data());
      }
      EncodeBlockScalar(g_, convert.to, kClip, sides[0].data(), sides[1].data(), g_.head_dim, kBlockTokens,
                        out.data() + h * to_head);
      // A side whose bits stay is copied.
      for (const Side side : {Side::kK, Side::kV}) {
        const int bits = Bits(convert.from, side);
        if (bits != Bits(convert.to, side)) continue;
        const auto at = [&](Format f, int head_bytes) {
          const int before =
              side == Side::kK ? 0 : SideSize(g_.codec, g_.head_dim, Bits(f, Side::kK), kBlockTokens);
          return h * head_bytes + before;
        };
        std::memcpy(out.data() + at(convert.to, to_head), in.data() + at(convert.from, from_head),
                    static_cast<size_t>(SideSize(g_.codec, g_.head_dim, bits, kBlockTokens)));
      }
    }
    CudaFromCpu(g_, convert.to, kBlockTokens, out.data(), At(layer, convert.to_row));
  }

  // The whole cache: what nobody stored is as it was.
  void Compare(const char* what) const {
    std::vector<uint8_t> found(host_.size());
    CUDA_OK(cudaDeviceSynchronize());
    CUDA_OK(cudaMemcpy(found.data(), device_.data(), found.size(), cudaMemcpyDeviceToHost));
    size_t different = 0, first = 0;
    for (size_t i = 0; i < found.size(); ++i) {
      if (found[i] == host_[i]) continue;
      if (different++ == 0) first = i;
    }
    EXPECT(different == 0, "%s: %zu bytes differ, the first at row %zu, byte %zu of its row", what, different,
           first / static_cast<size_t>(UnitRowBytes(g_)), first % static_cast<size_t>(UnitRowBytes(g_)));
  }

  uint8_t* At(int layer, uint32_t row) {
    return host_.data() + layer * layer_bytes_ + row * UnitRowBytes(g_);
  }
  CacheRegion region() const { return {device_.data(), layer_bytes_, g_.num_layers}; }
  CacheRegion layer_region(int layer) const {
    return {device_.data() + layer * layer_bytes_, layer_bytes_, 1};
  }

 private:
  KvGeometry g_;
  int64_t layer_bytes_;
  std::vector<uint8_t> host_;
  DeviceBuffer device_;
};

template <typename T>
T* Upload(const std::vector<T>& values, DeviceBuffer* buffer) {
  T* to = buffer->Reserve<T>(static_cast<int64_t>(values.size() + 1));
  CUDA_OK(cudaMemcpy(to, values.data(), values.size() * sizeof(T), cudaMemcpyHostToDevice));
  return to;
}

std::vector<uint16_t> Slice(const std::vector<uint16_t>& rows, int begin, int count, int width) {
  return {rows.begin() + begin * width, rows.begin() + (begin + count) * width};
}
std::vector<uint16_t> Join(std::vector<uint16_t> a, const std::vector<uint16_t>& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

// Steps with many rows: opening, extending and growing tails, completing blocks from tails and from rows
// alone.
CASE(StoresOfPrefill) {
  for (const Case& test : Cases()) {
    const KvGeometry& g = test.geometry;
    std::mt19937 random(11);
    const int width = g.num_kv_heads * g.head_dim;
    Twin cache(g);
    const int stride = width + 64;  // columns of a wider matrix
    for (int layer = 0; layer < g.num_layers; ++layer) {
      const int rows = 700;
      const std::vector<uint16_t> k = RandomValues(static_cast<size_t>(rows * width), random);
      const std::vector<uint16_t> v = RandomValues(k.size(), random);
      std::vector<uint16_t> wide(static_cast<size_t>(2 * rows * stride));
      for (int r = 0; r < rows; ++r) {
        std::memcpy(&wide[static_cast<size_t>(r * stride)], &k[static_cast<size_t>(r * width)],
                    static_cast<size_t>(width) * 2);
        std::memcpy(&wide[static_cast<size_t>((rows + r) * stride)], &v[static_cast<size_t>(r * width)],
                    static_cast<size_t>(width) * 2);
      }
      // First step: three tails of different capacity are opened.
      std::vector<KvStore> first = {
          {.unit_row = 0,
           .tail_row = 0,
           .row_begin = 0,
           .from_tail = 0,
           .rows = 5,
           .tail_capacity = 16,
           .capacity = 16},
          {.unit_row = 200, .tail_row = 200, .row_begin = 5, .from_tail = 0, .rows = 40},
          {.unit_row = 400,
           .tail_row = 400,
           .row_begin = 45,
           .from_tail = 0,
           .rows = 33,
           .tail_capacity = 48,
           .capacity = 48}};
      // Second: the first tail grows, the second completes a block and opens again, the third completes in
      // BF16; blocks of all formats are made of rows alone.
      std::vector<KvStore> second = {
          {.unit_row = 130,
           .tail_row = 0,
           .row_begin = 100,
           .from_tail = 5,
           .rows = 20,
           .tail_capacity = 16,
           .capacity = 32},
          {.unit_row = 600,
           .tail_row = 200,
           .row_begin = 120,
           .from_tail = 40,
           .rows = 24,
           .format = Format::kK2V2},
          {.unit_row = 200, .tail_row = 200, .row_begin = 144, .from_tail = 0, .rows = 3},
          {.unit_row = 700,
           .tail_row = 400,
           .row_begin = 150,
           .from_tail = 33,
           .rows = 31,
           .tail_capacity = 48}};
      std::vector<KvStore> third = {
          {.unit_row = 200, .tail_row = 200, .row_begin = 500, .from_tail = 3, .rows = 9}};
      uint32_t row = 900;
      for (int f = 0; f < kFormats; ++f) {
        const auto format = static_cast<Format>(f);
        second.push_back({.unit_row = row,
                          .tail_row = row,
                          .row_begin = 200 + 64 * f,
                          .from_tail = 0,
                          .rows = 64,
                          .format = format});
        cache.Expect(layer, row, format, 64, Slice(k, 200 + 64 * f, 64, width),
                     Slice(v, 200 + 64 * f, 64, width), 64);
        row += static_cast<uint32_t>(UnitsOf(g, format));
      }
      for (const std::vector<KvStore>& step : {first, second, third}) {
        StoreList list;
        ListStores(step, &list);
        DeviceBuffer stores, groups, values;
        const uint16_t* at = Upload(wide, &values);
        StoreKv(g, kClip, cache.layer_region(layer), at, at + rows * stride, stride,
                Upload(list.stores, &stores), Upload(list.groups, &groups), list.groups[0], nullptr);
        CUDA_OK(cudaDeviceSynchronize());
      }
      const auto join = [&](const std::vector<uint16_t>& x, int a, int an, int b, int bn) {
        return Join(Slice(x, a, an, width), Slice(x, b, bn, width));
      };
      cache.Expect(layer, 0, Format::kBf16, 16, Slice(k, 0, 5, width), Slice(v, 0, 5, width), 5);
      cache.Expect(layer, 400, Format::kBf16, 48, Slice(k, 45, 33, width), Slice(v, 45, 33, width), 33);
      cache.Expect(layer, 130, Format::kBf16, 32, join(k, 0, 5, 100, 20), join(v, 0, 5, 100, 20), 25);
      cache.Expect(layer, 600, Format::kK2V2, 64, join(k, 5, 40, 120, 24), join(v, 5, 40, 120, 24), 64);
      cache.Expect(layer, 700, Format::kBf16, 64, join(k, 45, 33, 150, 31), join(v, 45, 33, 150, 31), 64);
      cache.Expect(layer, 200, Format::kBf16, 64, join(k, 144, 3, 500, 9), join(v, 144, 3, 500, 9), 12);
    }
    cache.Compare(test.name);
  }
}

// 130 steps of one row for each of four sequences, of different formats: rows go to their tails with
// FinishQkv, the rest at the end of the step for all layers at once.
CASE(StoresOfDecode) {
  for (const Case& test : Cases()) {
    const KvGeometry& g = test.geometry;
    std::mt19937 random(5);
    const int heads = 3, width = g.num_kv_heads * g.head_dim, all = (heads + 2 * g.num_kv_heads) * g.head_dim;
    constexpr int kSequences = 4;
    const Format formats[kSequences] = {Format::kK2V2, Format::kK4V2, Format::kK4V4, Format::kBf16};
    Twin cache(g);
    struct Sequence {
      std::vector<std::vector<uint16_t>> k, v;  // by layer: tokens of the open block
      uint32_t tail = 0;
      int capacity = 0;
    } sequences[kSequences];
    uint32_t next_row = 0;
    const auto allocate = [&](int units) {
      const uint32_t row = next_row;
      next_row += static_cast<uint32_t>(units);
      return row;
    };
    const auto tail_units = [&](int capacity) { return 2 * capacity * g.head_dim * 2 / kUnitBytes; };
    for (Sequence& s : sequences) {
      s.k.resize(static_cast<size_t>(g.num_layers));
      s.v.resize(static_cast<size_t>(g.num_layers));
    }
    DeviceBuffer qkv, out, cos, sin, ones, places_buffer, stores_buffer, groups_buffer;
    Upload(std::vector<float>(static_cast<size_t>(8 * g.head_dim), 1.0f), &cos);
    Upload(std::vector<float>(static_cast<size_t>(8 * g.head_dim), 0.0f), &sin);
    Upload(std::vector<float>(static_cast<size_t>(g.head_dim), 1.0f), &ones);
    out.Reserve(static_cast<size_t>((kSequences + 2) * all * 2));
    std::normal_distribution<float> normal;
    for (int step = 0; step < 130; ++step) {
      if (next_row > kRows - 600) break;
      std::vector<KvStore> stores;
      for (int s = 0; s < kSequences; ++s) {
        Sequence& sequence = sequences[s];
        const int tokens = step % 64;
        KvStore store{.row_begin = s, .from_tail = static_cast<uint8_t>(tokens), .rows = 1};
        if (tokens == 0) {
          sequence.capacity = s % 2 == 0 ? 16 : 64;
          sequence.tail = allocate(tail_units(sequence.capacity));
          store.unit_row = store.tail_row = sequence.tail;
          store.capacity = store.tail_capacity = static_cast<uint8_t>(sequence.capacity);
        } else if (tokens == 63 && formats[s] != Format::kBf16) {
          store.tail_row = sequence.tail;
          store.tail_capacity = static_cast<uint8_t>(sequence.capacity);
          store.format = formats[s];
          store.unit_row = allocate(UnitsOf(g, formats[s]));
        } else {
          store.tail_row = store.unit_row = sequence.tail;
          store.tail_capacity = store.capacity = static_cast<uint8_t>(sequence.capacity);
          if (tokens == sequence.capacity) {
            sequence.capacity += 16;
            sequence.tail = store.unit_row = allocate(tail_units(sequence.capacity));
            store.capacity = static_cast<uint8_t>(sequence.capacity);
          }
        }
        stores.push_back(store);
      }
      std::vector<RowPlace> places(kSequences + 2);  // two rows of a graph that nobody uses
      StoreList list;
      SplitStores(stores, std::span(places).first(kSequences), &list);
      for (int layer = 0; layer < g.num_layers; ++layer) {
        std::vector<float> in(static_cast<size_t>((kSequences + 2) * all));
        for (float& x : in) x = normal(random);
        FinishQkv({.geometry = g,
                   .num_heads = heads,
                   .rows = kSequences + 2,
                   .qkv = Upload(in, &qkv),
                   .q_norm = ones.data<float>(),
                   .k_norm = ones.data<float>(),
                   .eps = 1e-6f,
                   .cos = cos.data<float>(),
                   .sin = sin.data<float>(),
                   .out = out.data<uint16_t>(),
                   .arena_layer = cache.layer_region(layer).data,
                   .places = Upload(places, &places_buffer)},
                  nullptr);
        std::vector<uint16_t> rows(static_cast<size_t>((kSequences + 2) * all));
        CUDA_OK(cudaMemcpy(rows.data(), out.data(), rows.size() * 2, cudaMemcpyDeviceToHost));
        for (int s = 0; s < kSequences; ++s) {
          const auto k = rows.begin() + s * all + heads * g.head_dim;
          if (step % 64 == 0) {
            sequences[s].k[static_cast<size_t>(layer)].clear();
            sequences[s].v[static_cast<size_t>(layer)].clear();
          }
          sequences[s].k[static_cast<size_t>(layer)].insert(sequences[s].k[static_cast<size_t>(layer)].end(),
                                                            k, k + width);
          sequences[s].v[static_cast<size_t>(layer)].insert(sequences[s].v[static_cast<size_t>(layer)].end(),
                                                            k + width, k + 2 * width);
        }
      }
      StoreKv(g, kClip, cache.region(), nullptr, nullptr, 0, Upload(list.stores, &stores_buffer),
              Upload(list.groups, &groups_buffer), kSequences, nullptr);
      for (int s = 0; s < kSequences; ++s) {
        const KvStore& store = stores[static_cast<size_t>(s)];
        const int tokens = store.from_tail + 1;
        for (int layer = 0; layer < g.num_layers; ++layer) {
          const std::vector<uint16_t>& k = sequences[s].k[static_cast<size_t>(layer)];
          const std::vector<uint16_t>& v = sequences[s].v[static_cast<size_t>(layer)];
          cache.Expect(layer, store.unit_row, store.format, store.capacity, k, v, tokens);
          if (store.format != Format::kBf16) {
            cache.Expect(layer, store.tail_row, Format::kBf16, store.tail_capacity, k, v, tokens);
          }
        }
      }
      if (step < 3 || step % 16 == 0 || step % 64 == 63) cache.Compare(test.name);
    }
    cache.Compare(test.name);
  }
}

// Blocks from every format to every lower one, all layers at once, elsewhere and in place.
CASE(Conversions) {
  for (const Case& test : Cases()) {
    const KvGeometry& g = test.geometry;
    std::mt19937 random(3);
    const int width = g.num_kv_heads * g.head_dim;
    Twin cache(g);
    std::vector<KvStore> stores;
    std::vector<KvConvert> converts;
    uint32_t row = 0;
    for (int from = 1; from < kFormats; ++from) {
      for (int to = 0; to < from; ++to) {
        stores.push_back({.unit_row = row,
                          .tail_row = row,
                          .row_begin = 0,
                          .from_tail = 0,
                          .rows = 64,
                          .format = static_cast<Format>(from)});
        const uint32_t begin = row;
        row += static_cast<uint32_t>(UnitsOf(g, static_cast<Format>(from)));
        converts.push_back({begin, row, static_cast<Format>(from), static_cast<Format>(to)});
        row += static_cast<uint32_t>(UnitsOf(g, static_cast<Format>(to)));
      }
    }
    // The same in place, where the head's bytes become fewer.
    for (int from = 1; from < kFormats; ++from) {
      for (int to = 0; to < from; ++to) {
        stores.push_back({.unit_row = row,
                          .tail_row = row,
                          .row_begin = 0,
                          .from_tail = 0,
                          .rows = 64,
                          .format = static_cast<Format>(from)});
        converts.push_back({row, row, static_cast<Format>(from), static_cast<Format>(to)});
        row += static_cast<uint32_t>(UnitsOf(g, static_cast<Format>(from)));
      }
    }
    EXPECT(row <= kRows, "%u rows", row);
    StoreList list;
    ListStores(stores, &list);
    DeviceBuffer stores_buffer, groups_buffer, values, converts_buffer, count;
    for (int layer = 0; layer < g.num_layers; ++layer) {
      const std::vector<uint16_t> k = RandomValues(static_cast<size_t>(64 * width), random);
      const std::vector<uint16_t> v = RandomValues(k.size(), random);
      const uint16_t* at = Upload(Join(k, v), &values);
      StoreKv(g, kClip, cache.layer_region(layer), at, at + k.size(), width,
              Upload(list.stores, &stores_buffer), Upload(list.groups, &groups_buffer), list.groups[0],
              nullptr);
      CUDA_OK(cudaDeviceSynchronize());
      for (const KvStore& store : stores) cache.Expect(layer, store.unit_row, store.format, 64, k, v, 64);
      for (const KvConvert& convert : converts) cache.ExpectConverted(layer, convert);
    }
    ConvertKv(g, kClip, cache.region(), Upload(converts, &converts_buffer),
              Upload(std::vector<int32_t>{static_cast<int32_t>(converts.size())}, &count),
              static_cast<int>(converts.size()), nullptr);
    cache.Compare(test.name);
  }
}

// Norm, RoPE and rotation against F64, and the rotation of V bit for bit.
CASE(FinishQkvIsNormRopeAndRotation) {
  for (const Case& test : Cases()) {
    const KvGeometry& g = test.geometry;
    const int heads = 5, rows = 37, dim = g.head_dim, all = heads + 2 * g.num_kv_heads;
    std::mt19937 random(9);
    std::normal_distribution<float> normal;
    const auto numbers = [&](int n, float mean) {
      std::vector<float> x(static_cast<size_t>(n));
      for (float& value : x) value = mean + normal(random);
      return x;
    };
    const std::vector<float> qkv = numbers(rows * all * dim, 0), q_norm = numbers(dim, 1),
                             k_norm = numbers(dim, 1);
    std::vector<float> cos, sin;
    for (const float angle : numbers(rows * dim / 2, 0)) {
      cos.push_back(std::cos(angle));
      sin.push_back(std::sin(angle));
    }
    DeviceBuffer a, b, c, d, e, out;
    out.Reserve(qkv.size() * 2);
    FinishQkv({.geometry = g,
               .num_heads = heads,
               .rows = rows,
               .qkv = Upload(qkv, &a),
               .q_norm = Upload(q_norm, &b),
               .k_norm = Upload(k_norm, &c),
               .eps = 1e-5f,
               .cos = Upload(cos, &d),
               .sin = Upload(sin, &e),
               .out = out.data<uint16_t>()},
              nullptr);
    std::vector<uint16_t> found(qkv.size());
    CUDA_OK(cudaMemcpy(found.data(), out.data(), found.size() * 2, cudaMemcpyDeviceToHost));
    double error = 0, size = 0;
    int different_values = 0;
    for (int vector = 0; vector < rows * all; ++vector) {
      const int head = vector % all, row = vector / all;
      std::vector<double> x(qkv.begin() + vector * dim, qkv.begin() + (vector + 1) * dim);
      const bool is_value = head >= heads + g.num_kv_heads;
      if (!is_value) {
        double squares = 0;
        for (const double value : x) squares += value * value;
        for (int i = 0; i < dim; ++i) {
          x[static_cast<size_t>(i)] *=
              (head < heads ? q_norm : k_norm)[static_cast<size_t>(i)] / std::sqrt(squares / dim + 1e-5);
        }
        for (int i = 0; i < dim / 2; ++i) {
          const auto lower = static_cast<size_t>(i), upper = static_cast<size_t>(i + dim / 2);
          const double s = sin[static_cast<size_t>(row * dim / 2 + i)],
                       co = cos[static_cast<size_t>(row * dim / 2 + i)];
          const double first = x[lower], second = x[upper];
          x[lower] = first * co - second * s;
          x[upper] = second * co + first * s;
        }
      }
      std::vector<float> exact(x.begin(), x.end());
      if (g.codec == Codec::kRotated) {
        HadamardScalar(exact.data(), dim);
        std::vector<double> turned(static_cast<size_t>(dim));
        for (int i = 0; i < dim; ++i) {
          for (int j = 0; j < dim; ++j) {
            turned[static_cast<size_t>(i)] +=
                x[static_cast<size_t>(j)] * (__builtin_popcount(i & j) % 2 == 0 ? 1 : -1);
          }
        }
        for (int i = 0; i < dim; ++i)
          x[static_cast<size_t>(i)] = turned[static_cast<size_t>(i)] / std::sqrt(double(dim));
      }
      for (int i = 0; i < dim; ++i) {
        const uint16_t bits = found[static_cast<size_t>(vector * dim + i)];
        error += std::pow(Bf16ToFloat(bits) - x[static_cast<size_t>(i)], 2);
        size += std::pow(x[static_cast<size_t>(i)], 2);
        if (is_value) different_values += bits != FloatToBf16(exact[static_cast<size_t>(i)]);
      }
    }
    EXPECT(std::sqrt(error / size) < 3e-3, "%s: relative error %g", test.name, std::sqrt(error / size));
    EXPECT(different_values == 0, "%s: %d values differ", test.name, different_values);
  }
}

}  // namespace
}  // namespace triaxial::cuda

int main(int argc, char** argv) { return triaxial::cuda::RunGpuCases(argc, argv); }
