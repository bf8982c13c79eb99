#include "ops/attention_vnni.h"

#include "base/check.h"

#if defined(__x86_64__)

#include <immintrin.h>

#include <algorithm>
#include <cstring>

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni,fma,f16c")

namespace triaxial {
namespace {

using Planes = AttentionWorkspace::Planes;

// Queries in one register block: 2 vectors of lanes x 4 queries x 2 or 3 planes are 16 or 24 of the 32
// registers.
constexpr int kBlockQueries = 4;
constexpr int kPairLanes = 32;
// The upper byte of a 24-bit value, rounded by the two signed ones below, fits eight bits up to 8355711; the
// margin is for the rounding of the product that makes it.
constexpr float kLargestSigned = 8355000.0f;
constexpr float kLargestUnsigned = 65535.0f;
// Error of a score (base 2, one standard deviation) that two planes of a query may cause.
constexpr float kCoarseError = 1e-4f;

inline __attribute__((always_inline)) __m512 LoadFp16(const uint8_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}

// Where 32 neighbouring lanes of a side lie: in two neighbouring fields of a column of words.
struct LanePair {
  const uint8_t* codes;
  int64_t step_bytes;  // between the words of four depths and of the next four
  __m512i mask;        // of both fields, after the upper one was shifted to the lower one's place
  __m128i shift;
  float unit;  // what a product with a code is worth, for the lower field is not shifted down

  inline __attribute__((always_inline)) LanePair(const uint8_t* side, int lane, int lanes, int bits) {
    const CodePlace first = PlaceOfCode(0, lane, lanes, bits);
    codes = side + first.byte;
    step_bytes = PlaceOfCode(4, lane, lanes, bits).byte - first.byte;
    mask = _mm512_set1_epi8(static_cast<char>(((1 << bits) - 1) << first.shift));
    shift = _mm_cvtsi32_si128(bits);
    unit = 1.0f / static_cast<float>(1 << first.shift);
  }
};

inline __attribute__((always_inline)) __m512i BroadcastWord(const int8_t* p) {
  int32_t word;
  std::memcpy(&word, p, sizeof(word));
  return _mm512_set1_epi32(word);
}

// Four products of unsigned and signed bytes a lane. The intrinsic makes GCC 12 copy every sum in every step.
inline __attribute__((always_inline)) void AddProducts(__m512i bytes, __m512i signed_bytes, __m512i& sum) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(bytes), "v"(signed_bytes));
}

enum class Factors { kSigned, kUnsigned };

// sum[q][i] = sum over 4 * steps depths of factor[q] * code of lanes 16 i.., in steps of the last plane.
template <int Q, int P, Factors kFactors>
inline __attribute__((always_inline)) void Dot(const LanePair& pair, int first_step, int steps,
                                               const int8_t (*planes)[3][kMaxHeadDim], __m512 (&sum)[Q][2]) {
  __m512i parts[Q][P][2];
  for (int q = 0; q < Q; ++q) {
    for (int p = 0; p < P; ++p) parts[q][p][0] = parts[q][p][1] = _mm512_setzero_si512();
  }
  const uint8_t* words_at = pair.codes + first_step * pair.step_bytes;
  const int8_t* factors = planes[0][0] + 4 * first_step;
  for (int s = 0; s < steps; ++s, words_at += pair.step_bytes, factors += 4) {
    const __m512i words = _mm512_loadu_si512(words_at);
    const __m512i codes[2] = {_mm512_and_si512(words, pair.mask),
                              _mm512_and_si512(_mm512_srl_epi32(words, pair.shift), pair.mask)};
    for (int q = 0; q < Q; ++q) {
      for (int p = 0; p < P; ++p) {
        const __m512i factor = BroadcastWord(factors + (q * 3 + p) * kMaxHeadDim);
        for (int i = 0; i < 2; ++i) {
          if (kFactors == Factors::kSigned) {
            AddProducts(codes[i], factor, parts[q][p][i]);
          } else {
            AddProducts(factor, codes[i], parts[q][p][i]);
          }
        }
      }
    }
  }
  for (int q = 0; q < Q; ++q) {
    for (int i = 0; i < 2; ++i) {  // below 2^29: 128 depths of 128 * 48 in the first plane
      const __m512i upper = _mm512_add_epi32(_mm512_slli_epi32(parts[q][0][i], 8), parts[q][1][i]);
      sum[q][i] = _mm512_cvtepi32_ps(upper);
      if constexpr (P == 3) {
        sum[q][i] = _mm512_fmadd_ps(sum[q][i], _mm512_set1_ps(256.0f), _mm512_cvtepi32_ps(parts[q][2][i]));
      }
    }
  }
}

inline __attribute__((always_inline)) void StoreBytes(int8_t* to, __m512i x) {
  _mm_store_si128(reinterpret_cast<__m128i*>(to), _mm512_cvtepi32_epi8(x));
}

// Three planes of N vectors of F32 whose largest magnitude sets the step. The lower two are signed, so that
// leaving out the last one rounds.
template <int N>
inline __attribute__((always_inline)) void QuantizeSigned(const __m512 (&x)[N], int query, Planes& planes) {
  __m512 largest = _mm512_abs_ps(x[0]);
  for (int i = 1; i < N; ++i) largest = _mm512_max_ps(largest, _mm512_abs_ps(x[i]));
  const float range = _mm512_reduce_max_ps(largest);
  // Below this no product is felt, and its inverse would overflow.
  const __m512 inverse = _mm512_set1_ps(range > 1e-30f ? kLargestSigned / range : 0.0f);
  planes.step[query] = range * (1.0f / kLargestSigned);
  auto& bytes = planes.bytes[query];
  for (int i = 0; i < N; ++i) {
    const __m512i fixed = _mm512_cvtps_epi32(_mm512_mul_ps(x[i], inverse));
    StoreBytes(bytes[0] + 16 * i, _mm512_srai_epi32(_mm512_add_epi32(fixed, _mm512_set1_epi32(0x8080)), 16));
    StoreBytes(bytes[1] + 16 * i, _mm512_srai_epi32(_mm512_add_epi32(fixed, _mm512_set1_epi32(0x80)), 8));
    StoreBytes(bytes[2] + 16 * i, fixed);
  }
}

template <int N>
void QuantizeQuery(const KvGeometry& g, int query, AttentionWorkspace& w) {
  __m512 x[N];
  for (int i = 0; i < N; ++i) x[i] = _mm512_load_ps(w.q + query * kMaxHeadDim + 16 * i);
  QuantizeSigned(x, query, w.queries);
  // Sums are of the rounded values, so that rounding errs by a part of the key, not of its code.
  const int group_channels = g.codec == Codec::kPaper ? kPaperGroup : 16 * N;
  const auto& bytes = w.queries.bytes[query];
  int coarse = 0;
  for (int group = 0; group < 16 * N / group_channels; ++group) {
    int sum = 0;
    for (int c = group * group_channels; c < (group + 1) * group_channels; ++c) {
      coarse += 256 * bytes[0][c] + bytes[1][c];
      sum += 65536 * bytes[0][c] + 256 * bytes[1][c] + bytes[2][c];
    }
    w.queries.sum[group][query] = w.queries.step[query] * static_cast<float>(sum);
  }
  w.coarse_sum[query] = 256.0f * w.queries.step[query] * static_cast<float>(coarse);
}

// The paper's 2-bit keys have a scale and a minimum per channel over 32 tokens: both go into the query.
template <int N>
void QuantizeScaledQuery(const uint8_t* scales, const uint8_t* minima, int query, AttentionWorkspace& w) {
  __m512 x[N];
  __m512 sum = _mm512_setzero_ps();
  for (int i = 0; i < N; ++i) {
    const __m512 q = _mm512_load_ps(w.q + query * kMaxHeadDim + 16 * i);
    x[i] = _mm512_mul_ps(q, LoadFp16(scales + 32 * i));
    sum = _mm512_fmadd_ps(q, LoadFp16(minima + 32 * i), sum);
  }
  QuantizeSigned(x, query, w.weights);
  w.weights.sum[0][query] = _mm512_reduce_add_ps(sum);
}

// The low bytes of four vectors of 16-bit values in order: token t at byte t. Packing interleaves by 128
// bits, which leaves the words of four tokens in a 4 x 4 transpose.
inline __attribute__((always_inline)) void StoreTokenBytes(int8_t* to, __m512i a, __m512i b) {
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  _mm512_store_si512(to, _mm512_permutexvar_epi32(order, _mm512_packus_epi16(a, b)));
}

// The weights of a tile times the scales of its tokens, two planes; middle is z, centre the value of code z.
inline __attribute__((always_inline)) void QuantizeWeights(const __m512 (&scale)[4],
                                                           const __m512 (&centre)[4], float middle, int query,
                                                           AttentionWorkspace& w) {
  __m512 x[4], largest = _mm512_setzero_ps(), sum = _mm512_setzero_ps();
  for (int i = 0; i < 4; ++i) {
    const __m512 weight = _mm512_load_ps(w.scores + query * kBlockTokens + 16 * i);
    x[i] = _mm512_mul_ps(weight, scale[i]);
    largest = _mm512_max_ps(largest, x[i]);
    sum = _mm512_fmadd_ps(weight, centre[i], sum);
  }
  const float range = _mm512_reduce_max_ps(largest);
  const __m512 inverse = _mm512_set1_ps(range > 1e-30f ? kLargestUnsigned / range : 0.0f);
  const float step = range * (1.0f / kLargestUnsigned);
  __m512i fixed[4];
  for (int i = 0; i < 4; ++i) fixed[i] = _mm512_cvtps_epi32(_mm512_mul_ps(x[i], inverse));
  const __m512i fixed_sum =
      _mm512_add_epi32(_mm512_add_epi32(fixed[0], fixed[1]), _mm512_add_epi32(fixed[2], fixed[3]));
  w.weights.step[query] = step;
  w.weights.sum[0][query] = _mm512_reduce_add_ps(
      _mm512_fnmadd_ps(_mm512_cvtepi32_ps(fixed_sum), _mm512_set1_ps(step * middle), sum));

  auto& bytes = w.weights.bytes[query];
  const __m512i words[2] = {_mm512_packus_epi32(fixed[0], fixed[1]), _mm512_packus_epi32(fixed[2], fixed[3])};
  const __m512i low = _mm512_set1_epi16(0xff);
  StoreTokenBytes(bytes[0], _mm512_srli_epi16(words[0], 8), _mm512_srli_epi16(words[1], 8));
  StoreTokenBytes(bytes[1], _mm512_and_si512(words[0], low), _mm512_and_si512(words[1], low));
}

// Spreads the prefetch of the next block over the calls of a kernel's inner loop.
class Prefetcher {
 public:
  Prefetcher(Prefetch next, int calls)
      : at_(next.data), end_(next.data + next.bytes), bytes_((next.bytes / calls + 63) / 64 * 64) {}
  inline __attribute__((always_inline)) void Step() {
    const uint8_t* to = std::min(at_ + bytes_, end_);
    for (; at_ < to; at_ += 64) _mm_prefetch(reinterpret_cast<const char*>(at_), _MM_HINT_T0);
  }

 private:
  const uint8_t* at_;
  const uint8_t* end_;
  int bytes_;
};

int QueryBlocks(int queries) { return (queries + kBlockQueries - 1) / kBlockQueries; }

// Scores of 32 tokens for Q queries, with scales and minima per token (and per 32 channels, if there are
// several groups).
template <int Q, int P>
inline __attribute__((always_inline)) void TokenScores(const LanePair& pair, int channel_groups, int head_dim,
                                                       const uint8_t* scales, const uint8_t* minima,
                                                       const AttentionWorkspace& w, int query,
                                                       float* scores) {
  const Planes& planes = w.queries;
  const float unit = P == 2 ? 256.0f * pair.unit : pair.unit;
  const float(*sums)[kItemQueries] = P == 2 ? &w.coarse_sum : planes.sum;
  __m512 total[Q][2];
  for (int q = 0; q < Q; ++q) total[q][0] = total[q][1] = _mm512_setzero_ps();
  const int steps = head_dim / channel_groups / 4;
  for (int group = 0; group < channel_groups; ++group) {
    __m512 sum[Q][2];
    Dot<Q, P, Factors::kSigned>(pair, group * steps, steps, planes.bytes + query, sum);
    for (int i = 0; i < 2; ++i) {
      const int place = 2 * (group * kBlockTokens + 16 * i);
      const __m512 scale = _mm512_mul_ps(LoadFp16(scales + place), _mm512_set1_ps(unit));
      const __m512 minimum = LoadFp16(minima + place);
      for (int q = 0; q < Q; ++q) {
        const __m512 product = _mm512_mul_ps(sum[q][i], _mm512_set1_ps(planes.step[query + q]));
        total[q][i] = _mm512_fmadd_ps(product, scale, total[q][i]);
        total[q][i] = _mm512_fmadd_ps(minimum, _mm512_set1_ps(sums[group][query + q]), total[q][i]);
      }
    }
  }
  for (int q = 0; q < Q; ++q) {
    for (int i = 0; i < 2; ++i) _mm512_store_ps(scores + q * kBlockTokens + 16 * i, total[q][i]);
  }
}

// Scores of 32 tokens for Q queries that carry the scales of the channels.
template <int Q>
inline __attribute__((always_inline)) void ChannelScores(const LanePair& pair, int head_dim,
                                                         const Planes& planes, int query, float* scores) {
  __m512 sum[Q][2];
  Dot<Q, 3, Factors::kSigned>(pair, 0, head_dim / 4, planes.bytes + query, sum);
  for (int q = 0; q < Q; ++q) {
    const __m512 factor = _mm512_set1_ps(planes.step[query + q] * pair.unit);
    const __m512 minima = _mm512_set1_ps(planes.sum[0][query + q]);
    for (int i = 0; i < 2; ++i) {
      _mm512_store_ps(scores + q * kBlockTokens + 16 * i, _mm512_fmadd_ps(sum[q][i], factor, minima));
    }
  }
}

// Adds the values of 32 channels for Q queries.
template <int Q>
inline __attribute__((always_inline)) void ChannelValues(const LanePair& pair, int steps, int query,
                                                         const AttentionWorkspace& w, float* out) {
  __m512 sum[Q][2];
  Dot<Q, 2, Factors::kUnsigned>(pair, 0, steps, w.weights.bytes + query, sum);
  for (int q = 0; q < Q; ++q) {
    const __m512 keep = _mm512_set1_ps(w.keep[query + q]);
    const __m512 centres = _mm512_set1_ps(w.weights.sum[0][query + q]);
    const __m512 factor = _mm512_set1_ps(w.weights.step[query + q] * pair.unit);
    for (int i = 0; i < 2; ++i) {
      float* to = out + q * kMaxHeadDim + 16 * i;
      const __m512 kept = _mm512_fmadd_ps(_mm512_load_ps(to), keep, centres);
      _mm512_store_ps(to, _mm512_fmadd_ps(sum[q][i], factor, kept));
    }
  }
}

// The largest step (of three planes) of a query for which two planes suffice for 64 keys of one group each.
// Rounding is uniform in +-128 steps, and a key of range r has a norm of about r / 5 * sqrt(head_dim).
float LargestCoarseStep(const uint8_t* scales, int bits, int head_dim) {
  __m512 largest = _mm512_setzero_ps();
  for (int i = 0; i < 4; ++i) largest = _mm512_max_ps(largest, LoadFp16(scales + 32 * i));
  const float range = _mm512_reduce_max_ps(largest) * static_cast<float>((1 << bits) - 1);
  const float root = head_dim == 128 ? 11.3f : 8.0f;
  return kCoarseError / (256.0f * 0.29f / 5.0f * root * std::max(range, 1e-10f));
}

// Calls fn.operator()<Q>(query) for blocks of four queries; one or two left over take a smaller block, three
// a whole one (what pads it is a number, and its results are not read).
template <class Fn>
inline __attribute__((always_inline)) void ForQueryBlocks(int queries, const Fn& fn) {
  int query = 0;
  for (; query + 2 < queries; query += kBlockQueries) fn.template operator()<kBlockQueries>(query);
  if (query < queries) fn.template operator()<2>(query);
}

}  // namespace

bool CpuHasVnni() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("fma");
}

void QuantizeQueries(const KvGeometry& g, int queries, AttentionWorkspace& w) {
  for (int i = 0; i < queries; ++i) {
    g.head_dim == 128 ? QuantizeQuery<8>(g, i, w) : QuantizeQuery<4>(g, i, w);
  }
}

void CodeScores(const KvGeometry& g, int bits, const uint8_t* side, int queries, Prefetch next,
                AttentionWorkspace& w) {
  const uint8_t* scales = side + CodeBytes(g, bits);
  const uint8_t* minima = scales + 2 * MetaGroups(g, bits);
  const bool paper = g.codec == Codec::kPaper;
  const float coarse = paper ? 0.0f : LargestCoarseStep(scales, bits, g.head_dim);
  Prefetcher prefetcher(next, kBlockTokens / kPairLanes * QueryBlocks(queries));
  for (int token = 0; token < kBlockTokens; token += kPairLanes) {
    const LanePair pair(side, token, kBlockTokens, bits);
    const uint8_t* pair_scales = scales + 2 * PlaceOfMeta(g, Side::kK, bits, token, 0);
    const uint8_t* pair_minima = minima + 2 * PlaceOfMeta(g, Side::kK, bits, token, 0);
    if (paper && bits == 2) {
      for (int i = 0; i < queries; ++i) {
        g.head_dim == 128 ? QuantizeScaledQuery<8>(pair_scales, pair_minima, i, w)
                          : QuantizeScaledQuery<4>(pair_scales, pair_minima, i, w);
      }
    }
    ForQueryBlocks(
        queries, [&]<int Q>(int query) __attribute__((always_inline)) {
          prefetcher.Step();
          float* scores = w.scores + query * kBlockTokens + token;
          if (paper && bits == 2) {
            ChannelScores<Q>(pair, g.head_dim, w.weights, query, scores);
          } else if (paper) {
            TokenScores<Q, 3>(pair, g.head_dim / kPaperGroup, g.head_dim, pair_scales, pair_minima, w, query,
                              scores);
          } else if (*std::max_element(w.queries.step + query, w.queries.step + query + Q) <= coarse) {
            TokenScores<Q, 2>(pair, 1, g.head_dim, pair_scales, pair_minima, w, query, scores);
          } else {
            TokenScores<Q, 3>(pair, 1, g.head_dim, pair_scales, pair_minima, w, query, scores);
          }
        });
  }
}

void CodeValues(const KvGeometry& g, int bits, const uint8_t* side, int tokens, int queries, Prefetch next,
                AttentionWorkspace& w) {
  const uint8_t* scales = side + CodeBytes(g, bits);
  const uint8_t* minima = scales + 2 * MetaGroups(g, bits);
  const int steps = (tokens + 3) / 4;
  const int group_channels = g.codec == Codec::kPaper ? kPaperGroup : g.head_dim;
  const float middle = 0.5f * static_cast<float>((1 << bits) - 1);
  Prefetcher prefetcher(next, g.head_dim / kPairLanes * QueryBlocks(queries));
  for (int first = 0; first < g.head_dim; first += group_channels) {
    const int place = 2 * PlaceOfMeta(g, Side::kV, bits, 0, first);
    __m512 scale[4], centre[4];
    for (int i = 0; i < 4; ++i) {
      scale[i] = LoadFp16(scales + place + 32 * i);
      centre[i] = _mm512_fmadd_ps(scale[i], _mm512_set1_ps(middle), LoadFp16(minima + place + 32 * i));
    }
    for (int query = 0; query < queries; ++query) QuantizeWeights(scale, centre, middle, query, w);
    for (int channel = first; channel < first + group_channels; channel += kPairLanes) {
      const LanePair pair(side, channel, g.head_dim, bits);
      ForQueryBlocks(
          queries, [&]<int Q>(int query) __attribute__((always_inline)) {
            prefetcher.Step();
            ChannelValues<Q>(pair, steps, query, w, w.out + query * kMaxHeadDim + channel);
          });
    }
  }
}

}  // namespace triaxial

#pragma GCC pop_options

#else  // other processors take the portable path

namespace triaxial {

bool CpuHasVnni() { return false; }
void QuantizeQueries(const KvGeometry&, int, AttentionWorkspace&) { CHECK(false); }
void CodeScores(const KvGeometry&, int, const uint8_t*, int, Prefetch, AttentionWorkspace&) { CHECK(false); }
void CodeValues(const KvGeometry&, int, const uint8_t*, int, int, Prefetch, AttentionWorkspace&) {
  CHECK(false);
}

}  // namespace triaxial

#endif
