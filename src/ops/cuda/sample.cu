#include <cmath>

#include "ops/cuda/device.h"
#include "ops/cuda/sample.h"

namespace triaxial::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kCandidates = 4096;      // that fit in shared memory
constexpr int kFewK = 512;             // up to so many are looked for among the threads' best
constexpr float kHuge = 1e36f;         // stands for infinity
constexpr float kWeightOne = 0x1p40f;  // weights are integers, so that sums do not depend on the order
constexpr int kWays = 8;               // a search halves its range three times a pass

// Order of logits as integers: 0 for minus infinity and NaN, which are never taken.
__device__ uint32_t KeyOf(float x) {
  if (!(x > -INFINITY)) return 0;
  const uint32_t bits = __float_as_uint(fminf(x, kHuge));
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ float LogitOf(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

struct Entry {
  uint32_t key;
  int32_t id;
};

// Where entries are read from: all logits of the row, or the candidates that a first pass left.
struct Row {
  const float* logits;
  int count;
  __device__ int size() const { return count; }
  __device__ Entry operator[](int i) const { return {KeyOf(logits[i]), i}; }
};
struct Candidates {
  const Entry* entries;
  int count;
  __device__ int size() const { return count; }
  __device__ Entry operator[](int i) const { return entries[i]; }
};

struct Scratch {
  unsigned long long sums[kWays][kThreads / 32];
  Entry candidates[kCandidates];
  int count;
};

// The sums over the block of `values`, in all threads.
template <int n>
__device__ void BlockSums(unsigned long long (&values)[n], Scratch* scratch) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int j = 0; j < n; ++j) {
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2)
      values[j] += __shfl_xor_sync(~0u, values[j], distance);
    if (lane == 0) scratch->sums[j][warp] = values[j];
  }
  __syncthreads();
#pragma unroll
  for (int j = 0; j < n; ++j) {
    values[j] = scratch->sums[j][lane];
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2)
      values[j] += __shfl_xor_sync(~0u, values[j], distance);
  }
  __syncthreads();
}

__device__ unsigned long long BlockMax(unsigned long long value, Scratch* scratch) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2)
    value = max(value, __shfl_xor_sync(~0u, value, distance));
  if (lane == 0) scratch->sums[0][warp] = value;
  __syncthreads();
  value = scratch->sums[0][lane];
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2)
    value = max(value, __shfl_xor_sync(~0u, value, distance));
  __syncthreads();
  return value;
}

// Largest t below 2^(3 rounds) for which the sum of weight(entry) over entries with place(entry) >= t is at
// least `target`; 0 if even the sum of all is less.
template <typename Source, typename Place, typename Weight>
__device__ uint32_t Search(const Source& source, int rounds, unsigned long long target, const Place& place,
                           const Weight& weight, Scratch* scratch) {
  unsigned long long found = 0;
  for (int round = rounds - 1; round >= 0; --round) {
    const unsigned long long step = 1ull << (3 * round);
    unsigned long long sums[kWays - 1] = {};
    for (int i = static_cast<int>(threadIdx.x); i < source.size(); i += kThreads) {
      const Entry entry = source[i];
      const unsigned long long at = place(entry);
      if (at < found + step) continue;
      const unsigned long long w = weight(entry);
#pragma unroll
      for (int j = 1; j < kWays; ++j) {
        if (at >= found + j * step) sums[j - 1] += w;
      }
    }
    BlockSums(sums, scratch);
    int way = 0;
#pragma unroll
    for (int j = 1; j < kWays; ++j) {
      if (sums[j - 1] >= target) way = j;
    }
    found += way * step;
  }
  return static_cast<uint32_t>(found);
}
constexpr int kKeyRounds = 11;
constexpr int kIdRounds = 7;  // ids below 2^21

// The best entries whose weights together reach a target, fewest first: those above `key`, and of those at it
// the ones with ids up to `id`.
struct Bound {
  uint32_t key = 1;
  int32_t id = INT32_MAX;
  __device__ bool Keeps(const Entry& e) const { return e.key > key || (e.key == key && e.id <= id); }
};

template <typename Source, typename Weight>
__device__ Bound FewestReaching(const Source& source, unsigned long long target, const Weight& weight,
                                Scratch* scratch) {
  Bound bound;
  bound.key = max(1u, Search(
                          source, kKeyRounds, target, [](const Entry& e) { return e.key; }, weight, scratch));
  unsigned long long sums[2] = {};  // above the key; entries at the key
  for (int i = static_cast<int>(threadIdx.x); i < source.size(); i += kThreads) {
    const Entry entry = source[i];
    if (entry.key > bound.key) sums[0] += weight(entry);
    if (entry.key == bound.key) ++sums[1];
  }
  BlockSums(sums, scratch);
  if (sums[1] <= 1 || sums[0] >= target) return bound;
  // Of equals those with the smallest ids: the least id at which the sum reaches what is left.
  constexpr uint32_t kTop = 1u << (3 * kIdRounds);
  const auto turned = [&](const Entry& e) {
    return e.key == bound.key ? kTop - 1 - static_cast<uint32_t>(e.id) : 0u;
  };
  const uint32_t at = Search(
      source, kIdRounds, target - sums[0], turned,
      [&](const Entry& e) { return e.key == bound.key ? weight(e) : 0ull; }, scratch);
  bound.id = static_cast<int32_t>(kTop - 1 - at);
  return bound;
}

__device__ unsigned long long WeightOf(uint32_t key, float max_logit, float inverse_temperature) {
  if (key == 0) return 0;
  return static_cast<unsigned long long>(expf((LogitOf(key) - max_logit) * inverse_temperature) * kWeightOne);
}

// `whole`: the weight of the tokens that top-k left, of which top-p is a share, if `source` lacks some; else
// 0.
template <typename Source>
__device__ int32_t Draw(const Source& source, const TokenDraw& draw, float max_logit,
                        unsigned long long whole, Scratch* scratch) {
  const float inverse = 1.0f / draw.temperature;
  Bound best;  // of top-k
  if (draw.top_k > 0) {
    best = FewestReaching(
        source, static_cast<unsigned long long>(draw.top_k),
        [](const Entry& e) { return e.key != 0 ? 1ull : 0ull; }, scratch);
  }
  const auto of_best = [&](const Entry& e) {
    return best.Keeps(e) ? WeightOf(e.key, max_logit, inverse) : 0ull;
  };
  const auto sum_of = [&](const auto& weight) {
    unsigned long long sum[1] = {};
    for (int i = static_cast<int>(threadIdx.x); i < source.size(); i += kThreads) sum[0] += weight(source[i]);
    BlockSums(sum, scratch);
    return sum[0];
  };
  Bound nucleus;
  if (draw.top_p < 1) {
    if (whole == 0) whole = sum_of(of_best);
    const auto mass = static_cast<unsigned long long>(static_cast<double>(whole) * draw.top_p);
    nucleus = FewestReaching(source, max(mass, 1ull), of_best, scratch);
  }
  const auto least = static_cast<unsigned long long>(draw.min_p * kWeightOne);
  const auto kept = [&](const Entry& e) {
    const unsigned long long w = nucleus.Keeps(e) ? of_best(e) : 0ull;
    return w >= least ? w : 0ull;
  };
  const unsigned long long total = sum_of(kept);
  // The first id at which the running sum passes uniform * total is the last from which on the rest is at
  // least total - floor(uniform * total).
  const auto before = static_cast<unsigned long long>(draw.uniform * static_cast<double>(total));
  const unsigned long long rest = total - min(before, total - 1);
  return static_cast<int32_t>(Search(
      source, kIdRounds, rest, [](const Entry& e) { return static_cast<uint32_t>(e.id); }, kept, scratch));
}

// Leaves the entries that `keep` in scratch->candidates; false if they are too many.
template <typename Keep>
__device__ bool Collect(const Row& row, const Keep& keep, Scratch* scratch) {
  if (threadIdx.x == 0) scratch->count = 0;
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < row.size(); i += kThreads) {
    const Entry entry = row[i];
    if (!keep(entry)) continue;
    const int place = atomicAdd(&scratch->count, 1);
    if (place < kCandidates) scratch->candidates[place] = entry;
  }
  __syncthreads();
  return scratch->count <= kCandidates;
}

__global__ void __launch_bounds__(kThreads)
    SampleKernel(const float* logits, int vocab, const TokenDraw* draws, int32_t* tokens) {
  __shared__ Scratch scratch;
  const TokenDraw draw = draws[blockIdx.x];
  const Row row{logits + int64_t{blockIdx.x} * vocab, vocab};
  unsigned long long mine = 0;  // key, then the id turned round, so that the smaller one wins
  for (int i = static_cast<int>(threadIdx.x); i < vocab; i += kThreads) {
    mine = max(mine,
               static_cast<unsigned long long>(row[i].key) << 32 | (0xffffffffu - static_cast<uint32_t>(i)));
  }
  const unsigned long long top = BlockMax(mine, &scratch);
  const uint32_t top_key = static_cast<uint32_t>(top >> 32);
  int32_t token = static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(top));
  if (top_key == 0) token = -1;
  if (top_key != 0 && draw.temperature >= kGreedyBelow) {
    const float max_logit = LogitOf(top_key);
    bool few = false;  // whether what can be chosen fits in shared memory
    unsigned long long whole = 0;
    if (draw.top_k > 0 && draw.top_k <= kFewK) {
      // At least k logits are as good as the k-th best of the threads' best ones.
      const auto mine_key = static_cast<uint32_t>(mine >> 32);
      scratch.candidates[threadIdx.x] = {mine_key, static_cast<int32_t>(threadIdx.x)};
      __syncthreads();
      const uint32_t bound = Search(
          Candidates{scratch.candidates, kThreads}, kKeyRounds, static_cast<unsigned long long>(draw.top_k),
          [](const Entry& e) { return e.key; }, [](const Entry& e) { return e.key != 0 ? 1ull : 0ull; },
          &scratch);
      few = Collect(
          row, [&](const Entry& e) { return e.key >= max(bound, 1u); }, &scratch);
    } else if (draw.top_k <= 0 && (draw.top_p < 1 || draw.min_p > 0)) {
      // Tokens below this weight together hold less than 1 - top_p: the nucleus never needs one of them.
      const float inverse = 1.0f / draw.temperature;
      unsigned long long sum[1] = {};
      for (int i = static_cast<int>(threadIdx.x); i < vocab; i += kThreads) {
        sum[0] += WeightOf(row[i].key, max_logit, inverse);
      }
      BlockSums(sum, &scratch);
      whole = sum[0];
      const double outside = 0.99 * (1.0 - fminf(draw.top_p, 1.0f)) * static_cast<double>(whole) / vocab;
      const auto least =
          static_cast<unsigned long long>(fmax(outside, static_cast<double>(draw.min_p * kWeightOne)));
      few = Collect(
          row, [&](const Entry& e) { return WeightOf(e.key, max_logit, inverse) >= max(least, 1ull); },
          &scratch);
    }
    token = few ? Draw(Candidates{scratch.candidates, scratch.count}, draw, max_logit, whole, &scratch)
                : Draw(row, draw, max_logit, whole, &scratch);
  }
  if (threadIdx.x == 0) tokens[blockIdx.x] = token;
}

}  // namespace

void SampleTokens(const float* logits, int64_t rows, int vocab, const TokenDraw* draws, int32_t* tokens,
                  cudaStream_t stream) {
  if (vocab > 1 << (3 * kIdRounds))
    throw CudaError("a vocabulary of more than 2^21 tokens has no sampling kernel");
  SampleKernel<<<static_cast<unsigned>(rows), kThreads, 0, stream>>>(logits, vocab, draws, tokens);
  CUDA_OK(cudaGetLastError());
}

}  // namespace triaxial::cuda
