#include "ops/linear.h"

#include <algorithm>
#include <cstring>
#include <map>
#include <oneapi/dnnl/dnnl.hpp>

#include "base/check.h"
#include "ops/buffer.h"

namespace triaxial {
namespace {

using dnnl::memory;

// Rows of one call of oneDNN: more reuse of the weights brings nothing, and the row counts stay few.
constexpr int64_t kMaxRows = 512;
// Any row count gives the same layout of the weights; this one is asked.
constexpr int64_t kLayoutRows = 64;
// A primitive takes about 75 KB and 0.1 ms to make; past this number all are dropped and made anew.
constexpr size_t kMaxPrimitives = 1024;

memory::data_type TypeOf(Element element) {
  return element == Element::kF32 ? memory::data_type::f32 : memory::data_type::bf16;
}

dnnl::primitive_attr AttributesOf(const LinearShape& shape) {
  dnnl::post_ops ops;
  switch (shape.epilogue) {
    case Epilogue::kNone:
      break;
    case Epilogue::kAdd:
      ops.append_sum(1.0f);
      break;
    case Epilogue::kGeluTanh:
      ops.append_eltwise(1.0f, dnnl::algorithm::eltwise_gelu_tanh, 0.0f, 0.0f);
      break;
    case Epilogue::kGeluErf:
      ops.append_eltwise(1.0f, dnnl::algorithm::eltwise_gelu_erf, 0.0f, 0.0f);
      break;
  }
  dnnl::primitive_attr attributes;
  attributes.set_post_ops(ops);
  return attributes;
}

dnnl::matmul::primitive_desc Describe(const dnnl::engine& engine, const LinearShape& shape, int64_t rows,
                                      const memory::desc& weights) {
  const memory::desc x({rows, shape.in}, TypeOf(shape.input), memory::format_tag::ab);
  const memory::desc y({rows, shape.out}, TypeOf(shape.output), memory::format_tag::ab);
  const dnnl::primitive_attr attributes = AttributesOf(shape);
  if (!shape.bias) return {dnnl::matmul::desc(x, weights, y), attributes, engine};
  const memory::desc bias({1, shape.out}, memory::data_type::f32, memory::format_tag::ab);
  return {dnnl::matmul::desc(x, weights, bias, y), attributes, engine};
}

}  // namespace

bool HasBf16Products() {
  switch (dnnl::get_effective_cpu_isa()) {
    case dnnl::cpu_isa::avx512_core_bf16:
    case dnnl::cpu_isa::avx512_core_amx:
      return true;
    default:
      return false;
  }
}

struct LinearCache::State {
  // A primitive with memory objects that are pointed at each call's data.
  struct Product {
    dnnl::matmul primitive;
    memory x, y;
  };

  dnnl::engine engine{dnnl::engine::kind::cpu, 0};
  dnnl::stream stream{engine};
  std::map<LinearShape, memory::desc> layouts;
  std::map<std::pair<LinearShape, int64_t>, Product> products;

  const memory::desc& LayoutOf(const LinearShape& shape) {
    const auto found = layouts.find(shape);
    if (found != layouts.end()) return found->second;
    const memory::desc any({shape.in, shape.out}, TypeOf(shape.input), memory::format_tag::any);
    return layouts.emplace(shape, Describe(engine, shape, kLayoutRows, any).weights_desc()).first->second;
  }

  Product& ProductFor(const LinearShape& shape, int64_t rows) {
    const auto found = products.find({shape, rows});
    if (found != products.end()) return found->second;
    if (products.size() >= kMaxPrimitives) products.clear();
    const dnnl::matmul::primitive_desc desc = Describe(engine, shape, rows, LayoutOf(shape));
    Product product{dnnl::matmul(desc), memory(desc.src_desc(), engine, DNNL_MEMORY_NONE),
                    memory(desc.dst_desc(), engine, DNNL_MEMORY_NONE)};
    return products.emplace(std::pair(shape, rows), std::move(product)).first->second;
  }
};

struct Linear::Packed {
  Buffer weight_bytes, bias_bytes;
  memory weights, bias;
};

LinearCache::LinearCache() : state_(std::make_unique<State>()) {}
LinearCache::~LinearCache() = default;

Linear::Linear() = default;
Linear::Linear(Linear&&) noexcept = default;
Linear& Linear::operator=(Linear&&) noexcept = default;
Linear::~Linear() = default;

Linear::Linear(LinearCache* cache, const LinearShape& shape, const void* weights, const float* bias)
    : cache_(cache), shape_(shape), packed_(std::make_unique<Packed>()) {
  CHECK(shape.in > 0 && shape.out > 0 && shape.bias == (bias != nullptr));
  CHECK(shape.epilogue != Epilogue::kAdd || shape.output == Element::kF32);
  LinearCache::State& state = *cache->state_;
  const memory::desc& layout = state.LayoutOf(shape);
  bytes_ = static_cast<int64_t>(layout.get_size());
  packed_->weights = memory(layout, state.engine, packed_->weight_bytes.Reserve(layout.get_size()));
  // [out][in] row-major is "ba" of oneDNN's [in][out].
  const memory::desc plain({shape.in, shape.out}, TypeOf(shape.input), memory::format_tag::ba);
  memory from(plain, state.engine, const_cast<void*>(weights));
  dnnl::reorder(from, packed_->weights).execute(state.stream, from, packed_->weights);
  state.stream.wait();
  if (bias != nullptr) {
    auto* copy = packed_->bias_bytes.Reserve<float>(shape.out);
    std::memcpy(copy, bias, static_cast<size_t>(shape.out) * sizeof(float));
    packed_->bias =
        memory({{1, shape.out}, memory::data_type::f32, memory::format_tag::ab}, state.engine, copy);
    bytes_ += shape.out * int64_t{sizeof(float)};
  }
}

void Linear::Run(const void* x, int64_t rows, void* y) const {
  LinearCache::State& state = *cache_->state_;
  for (int64_t row = 0; row < rows; row += kMaxRows) {
    const int64_t count = std::min(kMaxRows, rows - row);
    LinearCache::State::Product& p = state.ProductFor(shape_, count);
    const auto* from = static_cast<const uint8_t*>(x) + row * shape_.in * ByteSize(shape_.input);
    p.x.set_data_handle(const_cast<uint8_t*>(from));
    p.y.set_data_handle(static_cast<uint8_t*>(y) + row * shape_.out * ByteSize(shape_.output));
    // The C interface takes the arguments as an array: the map of the C++ one would allocate in every call.
    const dnnl_exec_arg_t arguments[] = {{DNNL_ARG_SRC, p.x.get()},
                                         {DNNL_ARG_WEIGHTS, packed_->weights.get()},
                                         {DNNL_ARG_DST, p.y.get()},
                                         {DNNL_ARG_BIAS, packed_->bias.get(true)}};
    CHECK(dnnl_primitive_execute(p.primitive.get(), state.stream.get(), shape_.bias ? 4 : 3, arguments) ==
          dnnl_success);
  }
}

}  // namespace triaxial
