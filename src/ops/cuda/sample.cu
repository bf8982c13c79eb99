#include <cmath>

#include "ops/cuda/device.h"
#include "ops/cuda/sample.h"

namespace triaxial::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kCandidates = kThreads;  // that are sorted, one a thread
constexpr int kFewK = 512;             // up to so many are looked for among the threads' best
constexpr float kHuge = 1e36f;         // stands for infinity
constexpr float kWeightOne = 0x1p40f;  // weights are integers, so that sums do not depend on the order
constexpr int kWays = 8;               // a search halves its range three times a pass

// Order of logits as integers: 0 for minus infinity and NaN, which are never taken.
__device__ uint32_t KeyOf(float x) {
  if (!(x > -INFINITY)) return 0;
  const uint32_t bits = __float_as_uint(__fadd_rn(fminf(x, kHuge), 0.0f));  // -0 equals +0
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ float LogitOf(uint32_t key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

struct Entry {
  uint32_t key;
  int32_t id;
};

// An entry as one number that sorts by logit, then by id turned round, so that of equals the smaller one is
// ahead.
__device__ uint64_t Pack(const Entry& e) {
  return static_cast<uint64_t>(e.key) << 32 | (0xffffffffu - static_cast<uint32_t>(e.id));
}
__device__ Entry Unpack(uint64_t packed) {
  return {static_cast<uint32_t>(packed >> 32),
          static_cast<int32_t>(0xffffffffu - static_cast<uint32_t>(packed))};
}

struct Row {
  const float* logits;
  int count;

  // Calls visit(entry) for this thread's share of the row, four loads of 16 bytes at a time.
  template <typename Visit>
  __device__ void ForEach(const Visit& visit) const {
    int i = static_cast<int>(threadIdx.x) * 4;
    if (count % 4 == 0) {  // so that every row is aligned
      constexpr int kStep = kThreads * 4;
      for (; i + 3 * kStep < count; i += 4 * kStep) {
        float4 x[4];
#pragma unroll
        for (int j = 0; j < 4; ++j) x[j] = *reinterpret_cast<const float4*>(logits + i + j * kStep);
#pragma unroll
        for (int j = 0; j < 4; ++j) VisitFour(x[j], i + j * kStep, visit);
      }
      for (; i < count; i += kStep) VisitFour(*reinterpret_cast<const float4*>(logits + i), i, visit);
    } else {
      for (i = static_cast<int>(threadIdx.x); i < count; i += kThreads) visit(Entry{KeyOf(logits[i]), i});
    }
  }

 private:
  template <typename Visit>
  __device__ static void VisitFour(const float4& x, int i, const Visit& visit) {
    visit(Entry{KeyOf(x.x), i});
    visit(Entry{KeyOf(x.y), i + 1});
    visit(Entry{KeyOf(x.z), i + 2});
    visit(Entry{KeyOf(x.w), i + 3});
  }
};

struct Scratch {
  unsigned long long sums[kWays][kThreads / 32];
  uint64_t candidates[kCandidates];
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
template <typename Place, typename Weight>
__device__ uint32_t Search(const Row& source, int rounds, unsigned long long target, const Place& place,
                           const Weight& weight, Scratch* scratch) {
  unsigned long long found = 0;
  for (int round = rounds - 1; round >= 0; --round) {
    const unsigned long long step = 1ull << (3 * round);
    unsigned long long sums[kWays - 1] = {};
    source.ForEach([&](const Entry& entry) {
      const unsigned long long at = place(entry);
      if (at < found + step) return;
      const unsigned long long w = weight(entry);
#pragma unroll
      for (int j = 1; j < kWays; ++j) {
        if (at >= found + j * step) sums[j - 1] += w;
      }
    });
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

template <typename Weight>
__device__ Bound FewestReaching(const Row& source, unsigned long long target, const Weight& weight,
                                Scratch* scratch) {
  Bound bound;
  bound.key = max(1u, Search(
                          source, kKeyRounds, target, [](const Entry& e) { return e.key; }, weight, scratch));
  unsigned long long sums[2] = {};  // above the key; entries at the key
  source.ForEach([&](const Entry& entry) {
    if (entry.key > bound.key) sums[0] += weight(entry);
    if (entry.key == bound.key) ++sums[1];
  });
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

// The choice from a whole row, in the order of ids.
__device__ int32_t DrawFromAll(const Row& row, const TokenDraw& draw, float max_logit, Scratch* scratch) {
  const float inverse = 1.0f / draw.temperature;
  Bound best;  // of top-k
  if (draw.top_k > 0) {
    best = FewestReaching(
        row, static_cast<unsigned long long>(draw.top_k),
        [](const Entry& e) { return e.key != 0 ? 1ull : 0ull; }, scratch);
  }
  const auto of_best = [&](const Entry& e) {
    return best.Keeps(e) ? WeightOf(e.key, max_logit, inverse) : 0ull;
  };
  const auto sum_of = [&](const auto& weight) {
    unsigned long long sum[1] = {};
    row.ForEach([&](const Entry& e) { sum[0] += weight(e); });
    BlockSums(sum, scratch);
    return sum[0];
  };
  Bound nucleus;
  if (draw.top_p < 1) {
    const auto mass = static_cast<unsigned long long>(static_cast<double>(sum_of(of_best)) * draw.top_p);
    nucleus = FewestReaching(row, max(mass, 1ull), of_best, scratch);
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
      row, kIdRounds, rest, [](const Entry& e) { return static_cast<uint32_t>(e.id); }, kept, scratch));
}

// Sorts one value a thread, the largest first (a bitonic network).
__device__ uint64_t SortDescending(uint64_t value, uint64_t* shared) {
  const int thread = static_cast<int>(threadIdx.x);
  for (int size = 2; size <= kThreads; size *= 2) {
    for (int distance = size / 2; distance > 0; distance /= 2) {
      uint64_t other;
      if (distance >= 32) {
        shared[thread] = value;
        __syncthreads();
        other = shared[thread ^ distance];
        __syncthreads();
      } else {
        other = __shfl_xor_sync(~0u, value, distance);
      }
      const bool descending = (thread & size) == 0, lower = (thread & distance) == 0;
      value = descending == lower ? max(value, other) : min(value, other);
    }
  }
  return value;
}

// Sum of `value` over this thread and those before it.
__device__ unsigned long long RunningSum(unsigned long long value, Scratch* scratch) {
  const int warp = static_cast<int>(threadIdx.x) / 32, lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int distance = 1; distance < 32; distance *= 2) {
    const unsigned long long before = __shfl_up_sync(~0u, value, distance);
    if (lane >= distance) value += before;
  }
  if (lane == 31) scratch->sums[0][warp] = value;
  __syncthreads();
  unsigned long long earlier = lane < warp ? scratch->sums[0][lane] : 0;
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) earlier += __shfl_xor_sync(~0u, earlier, distance);
  __syncthreads();
  return value + earlier;
}

// The choice among candidates, one a thread and sorted, best first: what is left out cannot be chosen.
// `whole` is the weight that top-p is a share of; 0: that of what top-k leaves. All threads return the token.
__device__ int32_t DrawFromSorted(const Entry& entry, const TokenDraw& draw, float max_logit,
                                  unsigned long long whole, Scratch* scratch) {
  const bool best = draw.top_k <= 0 || static_cast<int>(threadIdx.x) < draw.top_k;
  const unsigned long long weight = best ? WeightOf(entry.key, max_logit, 1.0f / draw.temperature) : 0;
  const unsigned long long until = RunningSum(weight, scratch);
  if (threadIdx.x == kThreads - 1) scratch->sums[1][0] = until;
  __syncthreads();
  if (whole == 0) whole = scratch->sums[1][0];
  auto mass = ~0ull;
  if (draw.top_p < 1)
    mass = max(static_cast<unsigned long long>(static_cast<double>(whole) * draw.top_p), 1ull);
  const auto least = max(static_cast<unsigned long long>(draw.min_p * kWeightOne), 1ull);
  const bool kept = until - weight < mass && weight >= least;
  unsigned long long total[1] = {kept ? weight : 0};
  BlockSums(total, scratch);
  const auto at =
      min(static_cast<unsigned long long>(draw.uniform * static_cast<double>(total[0])), total[0] - 1);
  if (kept && until - weight <= at && at < until) scratch->count = entry.id;
  __syncthreads();
  return scratch->count;
}

// Leaves the entries that `keep` in scratch->candidates; false if they are too many.
template <typename Keep>
__device__ bool Collect(const Row& row, const Keep& keep, Scratch* scratch) {
  if (threadIdx.x == 0) scratch->count = 0;
  __syncthreads();
  row.ForEach([&](const Entry& entry) {
    if (!keep(entry)) return;
    const int place = atomicAdd(&scratch->count, 1);
    if (place < kCandidates) scratch->candidates[place] = Pack(entry);
  });
  __syncthreads();
  return scratch->count <= kCandidates;
}

__global__ void __launch_bounds__(kThreads)
    SampleKernel(const float* logits, int vocab, const TokenDraw* draws, int32_t* tokens) {
  __shared__ Scratch scratch;
  const TokenDraw draw = draws[blockIdx.x];
  const Row row{logits + int64_t{blockIdx.x} * vocab, vocab};
  unsigned long long mine = 0;
  row.ForEach([&](const Entry& entry) { mine = max(mine, static_cast<unsigned long long>(Pack(entry))); });
  const Entry top = Unpack(BlockMax(mine, &scratch));
  int32_t token = top.key == 0 ? -1 : top.id;
  if (top.key != 0 && draw.temperature >= kGreedyBelow) {
    const float max_logit = LogitOf(top.key);
    const float inverse = 1.0f / draw.temperature;
    bool few = false;  // whether the candidates can be sorted
    unsigned long long whole = 0;
    if (draw.top_k > 0 && draw.top_k <= kFewK) {
      // At least k logits are as good as the k-th best of the threads' best ones.
      const uint64_t sorted = SortDescending(mine, scratch.candidates);
      if (static_cast<int>(threadIdx.x) == draw.top_k - 1) scratch.count = static_cast<int>(sorted >> 32);
      __syncthreads();
      const uint32_t bound = max(static_cast<uint32_t>(scratch.count), 1u);
      __syncthreads();
      few = Collect(
          row, [&](const Entry& e) { return e.key >= bound; }, &scratch);
    } else if (draw.top_k <= 0 && (draw.top_p < 1 || draw.min_p > 0)) {
      // Tokens below this weight together hold less than 1 - top_p: the nucleus never needs one of them.
      unsigned long long sum[1] = {};
      row.ForEach([&](const Entry& e) { sum[0] += WeightOf(e.key, max_logit, inverse); });
      BlockSums(sum, &scratch);
      whole = sum[0];
      const double outside = 0.99 * (1.0 - fminf(draw.top_p, 1.0f)) * static_cast<double>(whole) / vocab;
      const auto least =
          static_cast<unsigned long long>(fmax(outside, static_cast<double>(draw.min_p * kWeightOne)));
      few = Collect(
          row, [&](const Entry& e) { return WeightOf(e.key, max_logit, inverse) >= max(least, 1ull); },
          &scratch);
    }
    if (few) {
      const bool mine_exists = static_cast<int>(threadIdx.x) < scratch.count;
      const uint64_t candidate = mine_exists ? scratch.candidates[threadIdx.x] : 0;
      __syncthreads();
      token = DrawFromSorted(Unpack(SortDescending(candidate, scratch.candidates)), draw, max_logit, whole,
                             &scratch);
    } else {
      token = DrawFromAll(row, draw, max_logit, &scratch);
    }
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
