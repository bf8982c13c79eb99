#include "ops/full_attention.h"

#include <algorithm>
#include <map>
#include <oneapi/dnnl/dnnl.hpp>
#include <tuple>

#include "base/parallel.h"
#include "ops/buffer.h"
#include "ops/elementwise.h"

namespace triaxial {
namespace {

using dnnl::memory;

// Scores of a tile: enough rows for products at full speed, few enough bytes for the last-level cache.
constexpr int64_t kTileScores = int64_t{2} << 20;
constexpr int64_t kMinTileRows = 64;
constexpr int64_t kMaxTileRows = 512;
constexpr size_t kMaxShapes = 32;
// Query rows to one task of the softmax.
constexpr int64_t kSoftmaxRows = 8;

memory::data_type TypeOf(Element element) {
  return element == Element::kF32 ? memory::data_type::f32 : memory::data_type::bf16;
}

// [m][k] x [k][n] -> F32 [m][n], the right side in the layout that oneDNN prefers.
struct Product {
  dnnl::matmul primitive;
  dnnl::reorder pack;
  memory left, plain, packed, result;
  Buffer packed_bytes;

  Product(const dnnl::engine& engine, int64_t m, int64_t k, int64_t n, Element type,
          memory::format_tag right_order) {
    const memory::desc a({m, k}, TypeOf(type), memory::format_tag::ab);
    const memory::desc any({k, n}, TypeOf(type), memory::format_tag::any);
    const memory::desc b({k, n}, TypeOf(type), right_order);
    const memory::desc c({m, n}, memory::data_type::f32, memory::format_tag::ab);
    const dnnl::matmul::primitive_desc desc(dnnl::matmul::desc(a, any, c), engine);
    primitive = dnnl::matmul(desc);
    left = memory(a, engine, DNNL_MEMORY_NONE);
    plain = memory(b, engine, DNNL_MEMORY_NONE);
    packed = memory(desc.weights_desc(), engine, packed_bytes.Reserve(desc.weights_desc().get_size()));
    result = memory(c, engine, DNNL_MEMORY_NONE);
    pack = dnnl::reorder(plain, packed);
  }
  void Pack(dnnl::stream& stream, const void* right) {
    plain.set_data_handle(const_cast<void*>(right));
    pack.execute(stream, plain, packed);
  }
  void Run(dnnl::stream& stream, const void* a, float* c) {
    left.set_data_handle(const_cast<void*>(a));
    result.set_data_handle(c);
    primitive.execute(stream, {{DNNL_ARG_SRC, left}, {DNNL_ARG_WEIGHTS, packed}, {DNNL_ARG_DST, result}});
  }
};

}  // namespace

struct FullAttention::State {
  struct Products {
    Product scores, values;
  };
  dnnl::engine engine{dnnl::engine::kind::cpu, 0};
  dnnl::stream stream{engine};
  std::map<std::tuple<int64_t, int64_t, int, Element>, Products> products;  // by tile rows, rows, head_dim
  Buffer scores, weights, sums, values;

  Products& For(int64_t tile, int64_t rows, int head_dim, Element type) {
    const std::tuple key(tile, rows, head_dim, type);
    const auto found = products.find(key);
    if (found != products.end()) return found->second;
    return products
        .emplace(key, Products{Product(engine, tile, head_dim, rows, type, memory::format_tag::ba),
                               Product(engine, tile, rows, head_dim, type, memory::format_tag::ab)})
        .first->second;
  }
};

FullAttention::FullAttention() : state_(std::make_unique<State>()) {}
FullAttention::~FullAttention() = default;

void FullAttention::Run(int64_t rows, int heads, int head_dim, Element type, const void* q, const void* k,
                        const void* v, void* out) {
  State& s = *state_;
  if (s.products.size() >= kMaxShapes) s.products.clear();
  const int64_t tile = std::min(
      rows, std::clamp(kTileScores / rows / kMinTileRows * kMinTileRows, kMinTileRows, kMaxTileRows));
  auto* scores = s.scores.Reserve<float>(tile * rows);
  void* weights = s.weights.Reserve(static_cast<size_t>(tile * rows * ByteSize(type)));
  auto* sums = s.sums.Reserve<float>(tile);
  auto* values = s.values.Reserve<float>(tile * head_dim);
  const int64_t size = ByteSize(type);
  const auto at = [&](const void* base, int64_t index) {
    return static_cast<const uint8_t*>(base) + index * size;
  };
  for (int h = 0; h < heads; ++h) {
    const int64_t head = int64_t{h} * rows * head_dim;
    const auto pack = [&](int64_t tile_rows) -> State::Products& {
      State::Products& p = s.For(tile_rows, rows, head_dim, type);
      p.scores.Pack(s.stream, at(k, head));
      p.values.Pack(s.stream, at(v, head));
      return p;
    };
    State::Products* p = nullptr;
    for (int64_t row = 0; row < rows; row += tile) {
      const int64_t count = std::min(tile, rows - row);
      if (row == 0 || count != tile) p = &pack(count);
      p->scores.Run(s.stream, at(q, head + row * head_dim), scores);
      ParallelFor((count + kSoftmaxRows - 1) / kSoftmaxRows, [&](int64_t i) {
        for (int64_t r = i * kSoftmaxRows; r < std::min(count, (i + 1) * kSoftmaxRows); ++r) {
          sums[r] = SoftmaxNumerators(scores + r * rows, rows, type,
                                      static_cast<uint8_t*>(weights) + r * rows * size);
        }
      });
      p->values.Run(s.stream, weights, values);
      for (int64_t r = 0; r < count; ++r) {
        Convert(values + r * head_dim, 1.0f / sums[r], head_dim, type,
                static_cast<uint8_t*>(out) + (((row + r) * heads + h) * head_dim) * size);
      }
    }
  }
}

}  // namespace triaxial
