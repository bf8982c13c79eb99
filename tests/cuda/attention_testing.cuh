// What tests and benchmarks of attention share: a cache with random blocks of every format, made straight
// from the layout's description (layout.h), and a reference in float64 over what such a cache holds.
#ifndef TRIAXIAL_TESTS_CUDA_ATTENTION_TESTING_CUH_
#define TRIAXIAL_TESTS_CUDA_ATTENTION_TESTING_CUH_

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "ops/cuda/attention.h"
#include "ops/cuda/device.h"
#include "ops/cuda/layout.h"

namespace triaxial::cuda {

inline constexpr auto kAllFormats = [] {
  std::array<Format, kFormats> all{};
  for (int f = 0; f < kFormats; ++f) all[static_cast<size_t>(f)] = static_cast<Format>(f);
  return all;
}();

__host__ __device__ inline uint32_t Mix(uint32_t x) {
  x ^= x >> 16, x *= 0x7feb352du, x ^= x >> 15, x *= 0x846ca68bu, x ^= x >> 16;
  return x;
}
// About normal, from a number.
__device__ inline float Normal(uint32_t id) {
  const float u = (Mix(id) + 1.0f) * 2.3283064e-10f, v = Mix(id ^ 0x9e3779b9u) * 2.3283064e-10f;
  return sqrtf(-2.0f * logf(u)) * cospif(2.0f * v);
}

inline int BlockHeadBytes(const KvGeometry& g, const KvBlockRef& b) {
  return SideSize(g.codec, g.head_dim, Bits(b.format, Side::kK), b.capacity) +
         SideSize(g.codec, g.head_dim, Bits(b.format, Side::kV), b.capacity);
}

struct FillBlock {
  int64_t offset;  // of head 0 from the arena's start
  int head_bytes;
  int v_offset;
  int k_bits, v_bits;
  int tokens, capacity;
};

// Quantizes random values: one thread block for each (block, head, side). Keys have channels of different
// loudness, values have tokens of different loudness.
__global__ void FillCache(uint8_t* arena, const FillBlock* blocks, Codec codec, int dim, int heads,
                          uint32_t seed) {
  __shared__ float x[64][129];
  const int block = blockIdx.x / (2 * heads), head = blockIdx.x / 2 % heads;
  const Side side = blockIdx.x % 2 == 0 ? Side::kK : Side::kV;
  const FillBlock b = blocks[block];
  const int bits = side == Side::kK ? b.k_bits : b.v_bits;
  uint8_t* out = arena + b.offset + int64_t{head} * b.head_bytes + (side == Side::kK ? 0 : b.v_offset);
  const int bytes = SideSize(codec, dim, bits, b.capacity);
  for (int i = threadIdx.x; i < bytes / 4; i += blockDim.x) reinterpret_cast<uint32_t*>(out)[i] = 0;
  for (int i = threadIdx.x; i < 64 * dim; i += blockDim.x) {
    const int token = i / dim, channel = i % dim;
    float value = Normal(Mix(seed + blockIdx.x) + i);
    if (side == Side::kK) {
      value = value * (0.5f + (Mix(seed + head * 131 + channel) & 255) / 256.0f) + 0.3f;
    } else {
      value *= 0.3f + (Mix(seed ^ (blockIdx.x * 64 + token)) & 255) / 256.0f;
    }
    x[token][channel] = value;
  }
  __syncthreads();
  if (bits == 16) {
    for (int i = threadIdx.x; i < b.tokens * dim; i += blockDim.x) {
      const int token = i / dim, channel = i % dim;
      *reinterpret_cast<__nv_bfloat16*>(out + PlaceOfElement(dim, 16, side, token, channel).byte) =
          __float2bfloat16_rn(x[token][channel]);
    }
    return;
  }
  const bool paper = codec == Codec::kPaper && bits != 8;
  const bool along_tokens = paper && side == Side::kK && bits == 2;
  const int size = paper ? kPaperGroup : dim;
  for (int group = threadIdx.x; group < 64 * dim / size; group += blockDim.x) {
    // Element j of the group.
    const auto token_of = [&](int j) { return along_tokens ? group / dim * 32 + j : group % 64; };
    const auto channel_of = [&](int j) { return along_tokens ? group % dim : group / 64 * 32 + j; };
    float low = INFINITY, high = -INFINITY;
    for (int j = 0; j < size; ++j) {
      if (token_of(j) >= b.tokens) continue;
      const float value = x[token_of(j)][channel_of(j)];
      low = fminf(low, value), high = fmaxf(high, value);
    }
    if (low > high) continue;
    const int most = (1 << bits) - 1;
    __half scale = __float2half_rn(bits == 8 ? fmaxf(-low, high) / 448 : (high - low) / most);
    __half minimum = __float2half_rn(bits == 8 ? 0.0f : low);
    const MetaPlace meta = PlaceOfScale(codec, dim, bits, side, token_of(0), channel_of(0));
    *reinterpret_cast<__half*>(out + meta.scale) = scale;
    *reinterpret_cast<__half*>(out + meta.minimum) = minimum;
    for (int j = 0; j < size; ++j) {
      const int token = token_of(j), channel = channel_of(j);
      if (token >= b.tokens) continue;
      const float value = (x[token][channel] - __half2float(minimum)) / __half2float(scale);
      const uint32_t code = bits == 8 ? __nv_cvt_float_to_fp8(value, __NV_SATFINITE, __NV_E4M3)
                                      : static_cast<uint32_t>(fminf(fmaxf(rintf(value), 0.0f), most));
      const BitPlace place = PlaceOfElement(dim, bits, side, token, channel);
      atomicOr(reinterpret_cast<uint32_t*>(out + place.byte / 4 * 4),
               code << (place.byte % 4 * 8 + place.shift));
    }
  }
}

__device__ inline double Dequantize(const uint8_t* side_bytes, Codec codec, int dim, int bits, Side side,
                                    int token, int channel) {
  const BitPlace place = PlaceOfElement(dim, bits, side, token, channel);
  if (bits == 16) {
    return __bfloat162float(*reinterpret_cast<const __nv_bfloat16*>(side_bytes + place.byte));
  }
  const MetaPlace meta = PlaceOfScale(codec, dim, bits, side, token, channel);
  const double scale = __half2float(*reinterpret_cast<const __half*>(side_bytes + meta.scale));
  const double minimum = __half2float(*reinterpret_cast<const __half*>(side_bytes + meta.minimum));
  if (bits == 8) {
    const __half_raw value = __nv_cvt_fp8_to_halfraw(side_bytes[place.byte], __NV_E4M3);
    return scale * static_cast<double>(__half2float(__half(value)));
  }
  return minimum + scale * (side_bytes[place.byte] >> place.shift & ((1 << bits) - 1));
}

// One (row, query head) to be computed in float64.
struct Probe {
  int row;    // of the step
  int head;   // query head
  int table;  // the sequence's blocks
  int blocks;
  int row_begin;  // of the sequence
};

struct ReferenceArgs {
  LayerAttention layer;
  Codec codec;
  int dim, num_heads, num_kv_heads;
  const FillBlock* blocks;  // as in the table, any order
  const Probe* probes;
  double* scores;  // [probes][max_tokens]
  int64_t max_tokens;
  double* out;  // [probes][dim], not rotated back
};

__global__ void Reference(ReferenceArgs a) {
  __shared__ double reduced[256];
  __shared__ double query[128];
  const Probe probe = a.probes[blockIdx.x];
  const int kv_head = probe.head / (a.num_heads / a.num_kv_heads), dim = a.dim;
  double* scores = a.scores + blockIdx.x * a.max_tokens;
  const auto bf16 = [](uint16_t bits) { return static_cast<double>(__uint_as_float(uint32_t{bits} << 16)); };
  if (threadIdx.x < dim)
    query[threadIdx.x] = bf16(a.layer.q[probe.row * a.layer.q_stride + probe.head * dim + threadIdx.x]);
  __syncthreads();
  int64_t tokens = 0;
  for (int i = 0; i < probe.blocks; ++i) {
    const FillBlock b = a.blocks[probe.table + i];
    const uint8_t* k = a.layer.arena + b.offset + int64_t{kv_head} * b.head_bytes;
    for (int t = threadIdx.x; t < b.tokens; t += blockDim.x) {
      double dot = 0;
      for (int c = 0; c < dim; ++c) dot += query[c] * Dequantize(k, a.codec, dim, b.k_bits, Side::kK, t, c);
      scores[tokens + t] = dot * a.layer.scale;
    }
    tokens += b.tokens;
  }
  for (int row = probe.row_begin + static_cast<int>(threadIdx.x); row <= probe.row; row += blockDim.x) {
    double dot = 0;
    for (int c = 0; c < dim; ++c)
      dot += query[c] * bf16(a.layer.k[row * a.layer.kv_stride + kv_head * dim + c]);
    scores[tokens + row - probe.row_begin] = dot * a.layer.scale;
  }
  tokens += probe.row - probe.row_begin + 1;
  __syncthreads();
  double max = -INFINITY;
  for (int64_t t = threadIdx.x; t < tokens; t += blockDim.x) max = fmax(max, scores[t]);
  reduced[threadIdx.x] = max;
  __syncthreads();
  for (int n = 128; n > 0; n /= 2) {
    if (threadIdx.x < n) reduced[threadIdx.x] = fmax(reduced[threadIdx.x], reduced[threadIdx.x + n]);
    __syncthreads();
  }
  max = reduced[0];
  __syncthreads();
  double sum = 0;
  for (int64_t t = threadIdx.x; t < tokens; t += blockDim.x) sum += scores[t] = exp(scores[t] - max);
  reduced[threadIdx.x] = sum;
  __syncthreads();
  for (int n = 128; n > 0; n /= 2) {
    if (threadIdx.x < n) reduced[threadIdx.x] += reduced[threadIdx.x + n];
    __syncthreads();
  }
  sum = reduced[0];
  if (threadIdx.x >= dim) return;
  const int c = static_cast<int>(threadIdx.x);
  double out = 0;
  int64_t at = 0;
  for (int i = 0; i < probe.blocks; ++i) {
    const FillBlock b = a.blocks[probe.table + i];
    const uint8_t* v = a.layer.arena + b.offset + int64_t{kv_head} * b.head_bytes + b.v_offset;
    for (int t = 0; t < b.tokens; ++t)
      out += scores[at++] * Dequantize(v, a.codec, dim, b.v_bits, Side::kV, t, c);
  }
  for (int row = probe.row_begin; row <= probe.row; ++row) {
    out += scores[at++] * bf16(a.layer.v[row * a.layer.kv_stride + kv_head * dim + c]);
  }
  a.out[blockIdx.x * dim + c] = out / sum;
}

__global__ void FillRows(uint16_t* x, int64_t n, float scale, uint32_t seed) {
  for (int64_t i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) {
    x[i] = __bfloat16_as_ushort(__float2bfloat16_rn(scale * Normal(Mix(seed) + static_cast<uint32_t>(i))));
  }
}

template <typename T>
DeviceBuffer ToDevice(const std::vector<T>& from) {
  DeviceBuffer buffer(std::max<size_t>(1, from.size()) * sizeof(T));
  CUDA_OK(cudaMemcpy(buffer.data(), from.data(), from.size() * sizeof(T), cudaMemcpyHostToDevice));
  return buffer;
}

// A sequence of a test: how many tokens lie in blocks of which format, and how many rows the step adds.
struct SequenceSpec {
  int rows = 1;
  std::vector<KvBlockRef> blocks;  // unit_row is chosen by RandomStep
};

// A step over a random cache of so many layers, each with other values. Blocks lie in the arena in random
// order.
class RandomStep {
 public:
  RandomStep(const KvGeometry& geometry, int num_heads, std::vector<SequenceSpec> specs, uint32_t seed,
             float query_scale = 1.0f, int layers = 1)
      : geometry_(geometry), num_heads_(num_heads), specs_(std::move(specs)) {
    std::vector<KvBlockRef*> order;
    for (SequenceSpec& spec : specs_) {
      for (KvBlockRef& block : spec.blocks) order.push_back(&block);
      sequences_.push_back({.row_begin = rows_, .rows = spec.rows, .blocks = spec.blocks});
      rows_ += spec.rows;
    }
    std::mt19937 random(seed);
    std::shuffle(order.begin(), order.end(), random);
    int64_t units = 0;
    for (KvBlockRef* block : order) {
      block->unit_row = static_cast<uint32_t>(units);
      units += BlockHeadBytes(geometry, *block) / kUnitBytes;
    }
    layer_bytes_ = std::max<int64_t>(1, units) * kUnitBytes * geometry.num_kv_heads;
    arena_.Reserve(static_cast<size_t>(layer_bytes_ * layers));
    for (const SequenceSpec& spec : specs_) {
      for (const KvBlockRef& block : spec.blocks) fill_.push_back(FillOf(block));
    }
    device_fill_ = ToDevice(fill_);
    const int dim = geometry.head_dim;
    if (!fill_.empty()) {
      const size_t thread_blocks = fill_.size() * 2 * static_cast<size_t>(geometry.num_kv_heads);
      for (int layer = 0; layer < layers; ++layer) {
        FillCache<<<static_cast<unsigned>(thread_blocks), 256>>>(
            arena_.data() + layer * layer_bytes_, device_fill_.data<FillBlock>(), geometry.codec, dim,
            geometry.num_kv_heads, seed + static_cast<uint32_t>(layer));
      }
      CUDA_OK(cudaGetLastError());
    }
    // q, k and v are columns of one matrix.
    const int64_t stride = (num_heads + 2 * geometry.num_kv_heads) * dim + 8;
    qkv_.Reserve<uint16_t>(rows_ * stride);
    FillRows<<<512, 256>>>(qkv_.data<uint16_t>(), rows_ * stride, query_scale, seed + 1);
    CUDA_OK(cudaGetLastError());
    out_.Reserve<uint16_t>(int64_t{rows_} * num_heads * dim);
    layer_ = {.arena = arena_.data(),
              .q = qkv_.data<uint16_t>(),
              .k = qkv_.data<uint16_t>() + num_heads * dim,
              .v = qkv_.data<uint16_t>() + (num_heads + geometry.num_kv_heads) * dim,
              .q_stride = stride,
              .kv_stride = stride,
              .out = out_.data<uint16_t>(),
              .scale = 1.0f / std::sqrt(static_cast<float>(dim))};
    CUDA_OK(cudaDeviceSynchronize());
  }

  const std::vector<AttentionSequence>& sequences() const { return sequences_; }
  const LayerAttention& layer() const { return layer_; }
  LayerAttention& layer() { return layer_; }
  // The same for the cache of another layer.
  LayerAttention layer(int index) const {
    LayerAttention layer = layer_;
    layer.arena += index * layer_bytes_;
    return layer;
  }
  int rows() const { return rows_; }
  int64_t blocks() const { return static_cast<int64_t>(fill_.size()); }
  AttentionLimits limits() const {
    return {.sequences = static_cast<int>(specs_.size()),
            .blocks = std::max<int64_t>(1, blocks()),
            .rows = rows_};
  }
  void PoisonOutput() {
    CUDA_OK(cudaMemset(out_.data(), 0xff, static_cast<size_t>(rows_) * num_heads_ * geometry_.head_dim * 2));
  }

  // ||out - reference|| / ||reference|| over up to `count` random (row, head) pairs, and that of the worst of
  // them. NaN if anything is not a number. `rounding`: what would be left if only the result were rounded, to
  // BF16; over few channels it may pass 2e-3.
  struct Error {
    double all = 0;
    double worst = 0;
    double rounding = 0;
  };
  Error Compare(int count, uint32_t seed) const {
    const int dim = geometry_.head_dim;
    std::mt19937 random(seed);
    std::vector<Probe> probes;
    int64_t max_tokens = 1;
    std::vector<int> table_of;
    int table = 0;
    for (const SequenceSpec& spec : specs_) {
      table_of.push_back(table);
      table += static_cast<int>(spec.blocks.size());
      int64_t tokens = spec.rows;
      for (const KvBlockRef& block : spec.blocks) tokens += block.tokens;
      max_tokens = std::max(max_tokens, tokens);
    }
    const int64_t pairs = int64_t{rows_} * num_heads_;
    for (int64_t i = 0; i < std::min<int64_t>(count, pairs); ++i) {
      const int64_t pair = pairs <= count ? i : static_cast<int64_t>(random() % static_cast<uint64_t>(pairs));
      const int row = static_cast<int>(pair / num_heads_);
      size_t s = 0;
      while (row >= sequences_[s].row_begin + sequences_[s].rows) ++s;
      probes.push_back({row, static_cast<int>(pair % num_heads_), table_of[s],
                        static_cast<int>(specs_[s].blocks.size()), sequences_[s].row_begin});
    }
    const DeviceBuffer device_probes = ToDevice(probes);
    DeviceBuffer scores(probes.size() * static_cast<size_t>(max_tokens) * 8),
        expected(probes.size() * dim * 8);
    Reference<<<static_cast<unsigned>(probes.size()), 256>>>({.layer = layer_,
                                                              .codec = geometry_.codec,
                                                              .dim = dim,
                                                              .num_heads = num_heads_,
                                                              .num_kv_heads = geometry_.num_kv_heads,
                                                              .blocks = device_fill_.data<FillBlock>(),
                                                              .probes = device_probes.data<Probe>(),
                                                              .scores = scores.data<double>(),
                                                              .max_tokens = max_tokens,
                                                              .out = expected.data<double>()});
    CUDA_OK(cudaGetLastError());
    std::vector<double> want(probes.size() * static_cast<size_t>(dim));
    CUDA_OK(cudaMemcpy(want.data(), expected.data(), want.size() * 8, cudaMemcpyDeviceToHost));
    std::vector<uint16_t> got(static_cast<size_t>(rows_) * num_heads_ * static_cast<size_t>(dim));
    CUDA_OK(cudaMemcpy(got.data(), out_.data(), got.size() * 2, cudaMemcpyDeviceToHost));
    double error = 0, norm = 0, worst = 0, rounding = 0;
    for (size_t i = 0; i < probes.size(); ++i) {
      double* w = want.data() + i * static_cast<size_t>(dim);
      if (geometry_.codec == Codec::kRotated) {
        for (int d = 1; d < dim; d *= 2) {
          for (int c = 0; c < dim; ++c) {
            if ((c & d) != 0) continue;
            const double a = w[c], b = w[c + d];
            w[c] = a + b, w[c + d] = a - b;
          }
        }
        for (int c = 0; c < dim; ++c) w[c] /= std::sqrt(static_cast<double>(dim));
      }
      const uint16_t* g =
          got.data() + (static_cast<size_t>(probes[i].row) * num_heads_ + probes[i].head) * dim;
      double e = 0, n = 0;
      for (int c = 0; c < dim; ++c) {
        const uint32_t bits = static_cast<uint32_t>(g[c]) << 16;
        float value;
        std::memcpy(&value, &bits, 4);
        e += (value - w[c]) * (value - w[c]), n += w[c] * w[c];
        const double rounded = __bfloat162float(__double2bfloat16(w[c]));
        rounding += (rounded - w[c]) * (rounded - w[c]);
      }
      error += e, norm += n;
      if (!(std::sqrt(e / n) <= worst)) worst = std::sqrt(e / n);
    }
    return {std::sqrt(error / norm), worst, std::sqrt(rounding / norm)};
  }

 private:
  FillBlock FillOf(const KvBlockRef& block) const {
    const int k_bits = Bits(block.format, Side::kK), v_bits = Bits(block.format, Side::kV);
    return {.offset = int64_t{block.unit_row} * kUnitBytes * geometry_.num_kv_heads,
            .head_bytes = BlockHeadBytes(geometry_, block),
            .v_offset = SideSize(geometry_.codec, geometry_.head_dim, k_bits, block.capacity),
            .k_bits = k_bits,
            .v_bits = v_bits,
            .tokens = block.tokens,
            .capacity = block.capacity};
  }

  KvGeometry geometry_;
  int num_heads_;
  std::vector<SequenceSpec> specs_;
  std::vector<AttentionSequence> sequences_;
  std::vector<FillBlock> fill_;
  int rows_ = 0;
  int64_t layer_bytes_ = 0;
  DeviceBuffer arena_, device_fill_, qkv_, out_;
  LayerAttention layer_;
};

// `tokens` tokens in blocks whose formats are drawn by weight (k2v2, k4v2, ...); the last block is a BF16
// tail.
inline SequenceSpec RandomSequence(int64_t tokens, const std::vector<double>& weights, std::mt19937& random,
                                   int rows = 1) {
  SequenceSpec spec = {.rows = rows};
  std::discrete_distribution<size_t> draw(weights.begin(), weights.end());
  for (; tokens >= kBlockTokens; tokens -= kBlockTokens) {
    spec.blocks.push_back({.tokens = kBlockTokens, .format = kAllFormats[draw(random)]});
  }
  if (tokens > 0) {
    const auto count = static_cast<uint8_t>(tokens);
    const auto least = static_cast<uint8_t>((count + 15) / 16 * 16);
    const auto capacity = static_cast<uint8_t>(least + random() % ((64 - least) / 16 + 1) * 16);
    spec.blocks.push_back({.tokens = count, .format = Format::kBf16, .capacity = capacity});
  }
  return spec;
}

}  // namespace triaxial::cuda

#endif  // TRIAXIAL_TESTS_CUDA_ATTENTION_TESTING_CUH_
