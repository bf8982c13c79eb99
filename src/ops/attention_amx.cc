#include "ops/attention_amx.h"

#include "base/check.h"

#if defined(__x86_64__) && defined(__linux__)

#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <span>

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,fma,amx-tile,amx-bf16")

namespace triaxial {
namespace {

constexpr int kTile = AmxWorkspace::kTile;
constexpr int kTileBytes = kTile * int{sizeof(uint32_t)};  // of a row

// The compiler does not know that tile instructions read and write memory.
inline __attribute__((always_inline)) void MemoryFence() { asm volatile("" ::: "memory"); }

// All eight tiles as 16 rows of 64 bytes, until it goes out of scope.
class Tiles {
 public:
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1;
      uint8_t zeros[15] = {};
      uint16_t row_bytes[16] = {};
      uint8_t rows[16] = {};
    } config;
    std::fill_n(config.row_bytes, 8, uint16_t{kTileBytes});
    std::fill_n(config.rows, 8, uint8_t{kTile});
    MemoryFence();
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// a in the lower lanes, b in the upper ones, rounded to nearest.
inline __attribute__((always_inline)) __m512i RoundToBf16(__m512 a, __m512 b) {
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a));
}

// F32 rows of `lanes` to the right side of a product, [row / 2][lane] with the even row's value in the lower
// half; rows past `rows` are zero. `to` has room for `room` of them, as has `rest`, if given: for what is
// lost by rounding.
void PackRowPairs(const float* from, int64_t stride, int rows, int room, int lanes, uint32_t* to,
                  uint32_t* rest = nullptr) {
  const __m512i interleave = _mm512_set_epi16(  // lane i of a, then of b
      31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2,
      17, 1, 16, 0);
  const __m512i upper_half = _mm512_set1_epi32(static_cast<int>(0xffff0000u));
  for (int r = 0; r < room; r += 2) {
    for (int lane = 0; lane < lanes; lane += 16) {
      const float* at = from + r * stride + lane;
      const int64_t place = int64_t{r} / 2 * lanes + lane;
      const __m512 even = r < rows ? _mm512_loadu_ps(at) : _mm512_setzero_ps();
      const __m512 odd = r + 1 < rows ? _mm512_loadu_ps(at + stride) : _mm512_setzero_ps();
      const __m512i words = _mm512_permutexvar_epi16(interleave, RoundToBf16(even, odd));
      _mm512_store_si512(to + place, words);
      if (rest == nullptr) continue;
      const __m512 even_rest = _mm512_sub_ps(even, _mm512_castsi512_ps(_mm512_slli_epi32(words, 16)));
      const __m512 odd_rest = _mm512_sub_ps(odd, _mm512_castsi512_ps(_mm512_and_si512(words, upper_half)));
      _mm512_store_si512(rest + place,
                         _mm512_permutexvar_epi16(interleave, RoundToBf16(even_rest, odd_rest)));
    }
  }
}

// Transposes 16 rows of 16 words.
inline __attribute__((always_inline)) void Transpose(__m512i (&r)[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {  // quarters of 128 bits: column 4 q + i of four rows each
    t[i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_i32x4(r[i], r[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_i32x4(r[8 + i], r[12 + i], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0x88);
    r[8 + i] = _mm512_shuffle_i32x4(t[i], t[8 + i], 0xdd);
    r[4 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0x88);
    r[12 + i] = _mm512_shuffle_i32x4(t[4 + i], t[12 + i], 0xdd);
  }
}

// F32 rows of channels, a token each, to [channel / 2][64 tokens]; tokens past `tokens` are zero.
void PackKeys(const float* from, int64_t stride, int tokens, int head_dim, uint32_t* to) {
  const __m512i zero = _mm512_setzero_si512();
  for (int token = 0; token < kBlockTokens; token += 16) {
    for (int channel = 0; channel < head_dim; channel += 32) {
      __m512i rows[16];
      for (int i = 0; i < 16; ++i) {
        const float* at = from + (token + i) * stride + channel;
        rows[i] = token + i < tokens ? RoundToBf16(_mm512_loadu_ps(at), _mm512_loadu_ps(at + 16)) : zero;
      }
      Transpose(rows);
      for (int i = 0; i < 16; ++i) {
        _mm512_store_si512(to + (channel / 2 + i) * kBlockTokens + token, rows[i]);
      }
    }
  }
}

// A side of a BF16 block with room for fewer lanes or depths than a whole one, or with fewer tokens than room
// (what lies there may be anything): copied, the rest zero.
void CopyKeys(const uint32_t* from, int capacity, int tokens, int head_dim, uint32_t* to) {
  for (int pair = 0; pair < head_dim / 2; ++pair, from += capacity, to += kBlockTokens) {
    std::copy_n(from, tokens, to);
    std::fill(to + tokens, to + kBlockTokens, 0u);
  }
}
void CopyValues(const uint32_t* from, int tokens, int head_dim, uint32_t* to) {
  uint32_t* const end = to + kBlockTokens / 2 * head_dim;
  to = std::copy_n(from, tokens / 2 * head_dim, to);
  from += tokens / 2 * head_dim;
  if (tokens % 2 != 0) to = std::transform(from, from + head_dim, to, [](uint32_t w) { return w & 0xffffu; });
  std::fill(to, end, 0u);
}

// The first `count` (at most 32) of first, first + step, ..., exact in BF16, to be looked up by
// permutexvar_epi16.
struct alignas(64) Bf16Table {
  uint16_t values[32] = {};
  constexpr Bf16Table(int count, float step, float first) {
    for (int i = 0; i < std::min(count, 32); ++i) {
      values[i] = static_cast<uint16_t>(std::bit_cast<uint32_t>(first + static_cast<float>(i) * step) >> 16);
    }
  }
};

// FP8 bytes (E4M3), one in each 16-bit lane, to BF16, exact.
inline __attribute__((always_inline)) __m512i Fp8ToBf16(__m512i bytes) {
  const __m512i magnitude = _mm512_and_si512(bytes, _mm512_set1_epi16(0x7f));
  const __m512i sign = _mm512_slli_epi16(_mm512_xor_si512(bytes, magnitude), 8);
  // Exponents are apart by 120; the first eight, multiples of 2^-9, have none.
  const __m512i normal = _mm512_add_epi16(_mm512_slli_epi16(magnitude, 4), _mm512_set1_epi16(120 << 7));
  static constexpr Bf16Table kSmall(8, 0x1p-9f, 0);
  const __mmask32 small = _mm512_cmplt_epu16_mask(magnitude, _mm512_set1_epi16(8));
  return _mm512_or_si512(
      sign, _mm512_mask_permutexvar_epi16(normal, small, magnitude, _mm512_load_si512(kSmall.values)));
}

// What the codes of a side are taken to be: less than themselves, so that they lie about zero.
constexpr float Centre(int bits) { return bits == 2 ? 1.5f : bits == 4 ? 7.5f : 0.0f; }

// The codes of a side to the right side of a product, as PackRowPairs has it, exact: code - Centre, or an FP8
// value before its scale.
template <int kBits>
void UnpackCodes(const uint8_t* codes, int depths, int lanes, uint32_t* to) {
  constexpr int kFields = 8 / kBits;  // of a byte: lanes 16 apart
  static constexpr Bf16Table kTable(1 << kBits, 1, -Centre(kBits));
  const __m512i table = _mm512_load_si512(kTable.values);
  const __m512i mask = _mm512_set1_epi8(static_cast<char>((1 << kBits) - 1));
  // The bytes of two of a word's four depths, apart.
  const __m512i first =
      _mm512_broadcast_i32x4(_mm_setr_epi8(0, -1, 1, -1, 4, -1, 5, -1, 8, -1, 9, -1, 12, -1, 13, -1));
  const __m512i second =
      _mm512_broadcast_i32x4(_mm_setr_epi8(2, -1, 3, -1, 6, -1, 7, -1, 10, -1, 11, -1, 14, -1, 15, -1));
  const auto bf16 = [&](__m512i indices) {
    if constexpr (kBits == 8) return Fp8ToBf16(indices);
    return _mm512_permutexvar_epi16(indices, table);
  };
  for (int depth = 0; depth < depths; depth += 4, to += 2 * lanes) {
    for (int lane = 0; lane < lanes; lane += 16 * kFields, codes += 64) {
      __m512i words = _mm512_loadu_si512(codes);
      for (int f = 0; f < kFields; ++f) {
        const __m512i bytes = kBits == 8 ? words : _mm512_and_si512(words, mask);
        uint32_t* at = to + lane + 16 * f;
        _mm512_store_si512(at, bf16(_mm512_shuffle_epi8(bytes, first)));
        _mm512_store_si512(at + lanes, bf16(_mm512_shuffle_epi8(bytes, second)));
        words = _mm512_srli_epi16(words, kBits % 8);
      }
    }
  }
}
void UnpackCodes(int bits, const uint8_t* codes, int depths, int lanes, uint32_t* to) {
  if (bits == 2) {
    UnpackCodes<2>(codes, depths, lanes, to);
  } else if (bits == 4) {
    UnpackCodes<4>(codes, depths, lanes, to);
  } else {
    UnpackCodes<8>(codes, depths, lanes, to);
  }
}

// The scale of each of 64 tokens, and its value at the centre of its codes, both times `unit`; zero past
// `tokens`.
void ReadFactors(const KvGeometry& g, int bits, const uint8_t* side, int tokens, float unit,
                 TokenFactors& factors) {
  const uint8_t* scales = side + CodeBytes(g, bits);
  const __m512 centre = _mm512_set1_ps(Centre(bits));
  for (int t = 0; t < kBlockTokens; t += 16) {
    const auto load = [&](int place) {
      const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales + 2 * (place + t)));
      return _mm512_mul_ps(_mm512_cvtph_ps(halves), _mm512_set1_ps(unit));
    };
    const auto valid = static_cast<__mmask16>(tokens >= t + 16 ? 0xffff : (1 << std::max(tokens - t, 0)) - 1);
    const __m512 scale = _mm512_maskz_mov_ps(valid, load(0));
    const __m512 minimum = bits == 8 ? _mm512_setzero_ps() : _mm512_maskz_mov_ps(valid, load(kBlockTokens));
    _mm512_store_ps(factors.scale + t, scale);
    _mm512_store_ps(factors.offset + t, _mm512_fmadd_ps(centre, scale, minimum));
  }
}

// For weights that are multiplied by the scales of values before they are rounded: what a rounded one counts
// in the sum of weights, and in that of offsets.
void CountRounded(const TokenFactors& values, RoundedFactors& rounded) {
  for (int t = 0; t < kBlockTokens; t += 16) {
    // Of a token that is the same in all channels the codes do not count; below any other scale, far above
    // what is flushed to zero.
    const __m512 scale = _mm512_max_ps(_mm512_load_ps(values.scale + t), _mm512_set1_ps(0x1p-90f));
    const __m512 inverse = _mm512_div_ps(_mm512_set1_ps(1.0f), scale);
    _mm512_store_ps(rounded.scale + t, scale);
    _mm512_store_ps(rounded.weight + t, inverse);
    _mm512_store_ps(rounded.offset + t, _mm512_mul_ps(_mm512_load_ps(values.offset + t), inverse));
  }
}

// Tiles 0 to 3 += a tile of the left side times the four tiles side by side of a right side whose rows lie
// `stride` bytes apart.
inline __attribute__((always_inline)) void MultiplyAdd(const uint16_t (*left)[32], const uint32_t* right,
                                                       int64_t stride) {
  _tile_loadd(4, left, kTileBytes);
  _tile_loadd(5, right, stride);
  _tile_dpbf16ps(0, 4, 5);
  _tile_loadd(6, right + 16, stride);
  _tile_dpbf16ps(1, 4, 6);
  _tile_loadd(7, right + 32, stride);
  _tile_dpbf16ps(2, 4, 7);
  _tile_loadd(5, right + 48, stride);
  _tile_dpbf16ps(3, 4, 5);
}

// scores = q k of a query tile and 64 tokens; `key_parts` add up to k.
void Scores(const uint16_t (*q)[kTile][32], std::span<const uint32_t* const> key_parts, int head_dim,
            float (*scores)[kBlockTokens]) {
  constexpr int kStride = kBlockTokens * int{sizeof(uint32_t)};
  MemoryFence();
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (const uint32_t* keys : key_parts) {
    for (int c = 0; c < head_dim / 32; ++c) MultiplyAdd(q[c], keys + c * kTile * kBlockTokens, kStride);
  }
  _tile_stored(0, scores[0], kStride);
  _tile_stored(1, scores[0] + 16, kStride);
  _tile_stored(2, scores[0] + 32, kStride);
  _tile_stored(3, scores[0] + 48, kStride);
  MemoryFence();
}

// out += weights v of a query tile and 64 tokens; `value_parts` add up to v.
void AddValues(const uint16_t (*weights)[kTile][32], std::span<const uint32_t* const> value_parts,
               int head_dim, float (*out)[kTile][kTile]) {
  const int64_t stride = head_dim * int64_t{sizeof(uint32_t)};
  MemoryFence();
  for (int n = 0; n < head_dim / 16; n += 4) {
    _tile_loadd(0, out[n], kTileBytes);
    _tile_loadd(1, out[n + 1], kTileBytes);
    _tile_loadd(2, out[n + 2], kTileBytes);
    _tile_loadd(3, out[n + 3], kTileBytes);
    for (const uint32_t* values : value_parts) {
      for (int half = 0; half < 2; ++half) {
        MultiplyAdd(weights[half], values + half * kTile * head_dim + n * 16, stride);
      }
    }
    _tile_stored(0, out[n], kTileBytes);
    _tile_stored(1, out[n + 1], kTileBytes);
    _tile_stored(2, out[n + 2], kTileBytes);
    _tile_stored(3, out[n + 3], kTileBytes);
  }
  MemoryFence();
}

// 2^x, zero for minus infinity; relative error 8e-5, a twentieth of what rounding to BF16 errs by.
inline __attribute__((always_inline)) __m512 Exp2(__m512 x) {
  const __m512 f = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);  // x - floor(x)
  __m512 p = _mm512_set1_ps(0.0780245227f);
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.2260671554f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.6958335405f));
  p = _mm512_fmadd_ps(p, f, _mm512_set1_ps(0.9999252186f));
  return _mm512_scalef_ps(p, x);  // p 2^floor(x)
}

// What is kept of a query row: weights are 2^(score - top); their sum, and that of weight times offset, lane
// by lane.
struct RowSums {
  float& top;
  float* sum;
  float* offset;
};

// x: scores (base 2), of which the first `limit` count. Raises the row's top if it must, and multiplies the
// sums (that of weights goes to `total`) by what is returned, for `out`. Leaves x - top in x, -infinity for
// the rest.
inline __attribute__((always_inline)) float RaiseTop(int limit, RowSums row, __m512 (&x)[4], __m512& total) {
  if (limit < kBlockTokens) {
    const uint64_t valid = (uint64_t{1} << limit) - 1;
    const __m512 nothing = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
    for (int i = 0; i < 4; ++i) {
      x[i] = _mm512_mask_mov_ps(nothing, static_cast<__mmask16>(valid >> (16 * i)), x[i]);
    }
  }
  const __m512 largest = _mm512_max_ps(_mm512_max_ps(x[0], x[1]), _mm512_max_ps(x[2], x[3]));
  total = _mm512_load_ps(row.sum);
  float keep = 1;
  if (_mm512_cmp_ps_mask(largest, _mm512_set1_ps(row.top + kSlack), _CMP_GT_OQ) != 0) {
    const float new_top = _mm512_reduce_max_ps(largest);
    keep = std::exp2(row.top - new_top);
    total = _mm512_mul_ps(total, _mm512_set1_ps(keep));
    _mm512_store_ps(row.offset, _mm512_mul_ps(_mm512_load_ps(row.offset), _mm512_set1_ps(keep)));
    row.top = new_top;
  }
  const __m512 base = _mm512_set1_ps(row.top);
  for (int i = 0; i < 4; ++i) x[i] = _mm512_sub_ps(x[i], base);
  return keep;
}

// Products of a query and the first `limit` tokens, times `scale`, to BF16 weights, zero for the rest; sum
// counts weights as rounded. Returns what `out` must be multiplied by.
inline __attribute__((always_inline)) float SoftmaxRow(int limit, float scale, const float* products,
                                                       RowSums row, uint16_t* low, uint16_t* high) {
  __m512 x[4], total;
  for (int i = 0; i < 4; ++i) x[i] = _mm512_mul_ps(_mm512_load_ps(products + 16 * i), _mm512_set1_ps(scale));
  const float keep = RaiseTop(limit, row, x, total);
  for (int i = 0; i < 4; ++i) x[i] = Exp2(x[i]);
  const __m512i first = RoundToBf16(x[0], x[1]), second = RoundToBf16(x[2], x[3]);
  _mm512_store_si512(low, first);
  _mm512_store_si512(high, second);
  const __m512bh ones = reinterpret_cast<__m512bh>(_mm512_set1_epi16(0x3f80));
  total = _mm512_dpbf16_ps(total, reinterpret_cast<__m512bh>(first), ones);
  total = _mm512_dpbf16_ps(total, reinterpret_cast<__m512bh>(second), ones);
  _mm512_store_ps(row.sum, total);
  return keep;
}

// The same where products are with codes: what they stand for comes in here, by way of the scores and of the
// weights. `query_sum` is that of the query's channels.
inline __attribute__((always_inline)) float SoftmaxRowOfCodes(int limit, float query_sum,
                                                              const float* products, const TokenFactors& keys,
                                                              const RoundedFactors& values, RowSums row,
                                                              uint16_t* low, uint16_t* high) {
  __m512 x[4], total;
  for (int i = 0; i < 4; ++i) {
    const __m512 added = _mm512_mul_ps(_mm512_load_ps(keys.offset + 16 * i), _mm512_set1_ps(query_sum));
    x[i] = _mm512_fmadd_ps(_mm512_load_ps(products + 16 * i), _mm512_load_ps(keys.scale + 16 * i), added);
  }
  const float keep = RaiseTop(limit, row, x, total);
  for (int i = 0; i < 4; ++i) {
    x[i] = _mm512_mul_ps(Exp2(x[i]), _mm512_load_ps(values.scale + 16 * i));
  }
  const __m512i rounded[2] = {RoundToBf16(x[0], x[1]), RoundToBf16(x[2], x[3])};
  _mm512_store_si512(low, rounded[0]);
  _mm512_store_si512(high, rounded[1]);
  __m512 offset = _mm512_load_ps(row.offset);
  for (int i = 0; i < 4; ++i) {
    const __m256i half =
        i % 2 == 0 ? _mm512_castsi512_si256(rounded[i / 2]) : _mm512_extracti64x4_epi64(rounded[i / 2], 1);
    const __m512 weight = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16));
    total = _mm512_fmadd_ps(weight, _mm512_load_ps(values.weight + 16 * i), total);
    offset = _mm512_fmadd_ps(weight, _mm512_load_ps(values.offset + 16 * i), offset);
  }
  _mm512_store_ps(row.sum, total);
  _mm512_store_ps(row.offset, offset);
  return keep;
}

class AmxItem {
 public:
  AmxItem(const AttentionArgs& args, const AttentionItem& item, AmxWorkspace& workspace)
      : args_(args),
        item_(item),
        g_(args.geometry),
        group_(args.num_heads / g_.num_kv_heads),
        queries_(item.rows * group_),
        tiles_((queries_ + kTile - 1) / kTile),
        scale_(args.scale * kLog2e),
        w_(workspace) {
    CHECK(queries_ <= kAmxQueries);
  }

  void Run(float* partials) {
    const Tiles tiles;
    Begin();
    for (int64_t b = item_.block_begin; b < item_.block_end; ++b) AttendBlock(b);
    if (item_.step) AttendStep();
    if (item_.partial_place >= 0) {
      WritePartial(partials + item_.partial_place);
    } else {
      WriteOut();
    }
  }

 private:
  // Query vectors past the last are zero: their results are finite and are not read.
  void Begin() {
    const __m512bh ones = reinterpret_cast<__m512bh>(_mm512_set1_epi16(0x3f80));
    for (int i = 0; i < tiles_ * kTile; ++i) {
      const int tile = i / kTile, row = i % kTile;
      __m512 sum = _mm512_setzero_ps();
      for (int c = 0; c < g_.head_dim; c += 32) {
        __m512 a = _mm512_setzero_ps(), b = a;
        if (i < queries_) {
          const float* q = args_.q + QueryPlace(args_, item_, i) + c;
          a = _mm512_loadu_ps(q);
          b = _mm512_loadu_ps(q + 16);
        }
        const __m512i rounded = RoundToBf16(a, b);
        _mm512_store_si512(w_.q[tile][c / 32][row], rounded);
        sum = _mm512_dpbf16_ps(sum, reinterpret_cast<__m512bh>(rounded), ones);
      }
      w_.query_sum[tile][row] = _mm512_reduce_add_ps(sum);
      for (int n = 0; n < g_.head_dim / kTile; ++n) std::fill_n(w_.out[tile][n][row], kTile, 0.0f);
      std::fill_n(w_.sum[tile][row], kTile, 0.0f);
      std::fill_n(w_.offset[tile][row], kTile, 0.0f);
      w_.top[tile][row] = -std::numeric_limits<float>::infinity();
    }
  }

  void AttendBlock(int64_t block) {
    const KvBlockRef& ref = item_.sequence->blocks[static_cast<size_t>(block)];
    const uint8_t* keys = BlockHead(args_, item_, block);
    const int k_bits = Bits(ref.format, Side::kK), v_bits = Bits(ref.format, Side::kV);
    const uint8_t* values = keys + SideBytes(g_, k_bits, ref.capacity);
    if (ref.format == Format::kBf16) {
      CHECK(ref.tokens <= ref.capacity && ref.capacity <= kBlockTokens && ref.capacity % kTailStep == 0);
      const auto* key_words = reinterpret_cast<const uint32_t*>(keys);
      const auto* value_words = reinterpret_cast<const uint32_t*>(values);
      if (ref.tokens == kBlockTokens) {
        return Attend({&key_words, 1}, {&value_words, 1}, kBlockTokens, kBlockTokens);
      }
      CopyKeys(key_words, ref.capacity, ref.tokens, g_.head_dim, w_.keys[0]);
      CopyValues(value_words, ref.tokens, g_.head_dim, w_.values[0]);
      return Attend({keys_, 1}, {values_, 1}, ref.tokens, ref.tokens);
    }
    if (g_.codec == Codec::kRotated || v_bits == 8) {
      // A scale and a minimum for each token: the codes are multiplied, exact as they are.
      UnpackCodes(k_bits, keys, g_.head_dim, kBlockTokens, w_.keys[0]);
      UnpackCodes(v_bits, values, kBlockTokens, g_.head_dim, w_.values[0]);
      ReadFactors(g_, k_bits, keys, ref.tokens, scale_, w_.key_factors);
      TokenFactors value_factors;
      ReadFactors(g_, v_bits, values, ref.tokens, 1, value_factors);
      CountRounded(value_factors, w_.value_factors);
      return Attend<true>({keys_, 1}, {values_, 1}, ref.tokens, ref.tokens);
    }
    // Few codes on a wide range lie far from zero, where BF16 is coarse, and all err in the same direction.
    // What they stand for takes two BF16 numbers.
    ExpandSide(g_, Side::kK, k_bits, keys, w_.side);
    PackRowPairs(w_.side, kBlockTokens, g_.head_dim, g_.head_dim, kBlockTokens, w_.keys[0], w_.keys[1]);
    ExpandSide(g_, Side::kV, v_bits, values, w_.side);
    PackRowPairs(w_.side, g_.head_dim, ref.tokens, kBlockTokens, g_.head_dim, w_.values[0], w_.values[1]);
    Attend(keys_, values_, ref.tokens, ref.tokens);
  }

  // Row r of the item (item_.row + r of the sequence) sees the step's rows up to itself.
  void AttendStep() {
    const int64_t stride = int64_t{g_.num_kv_heads} * g_.head_dim;
    const int end = item_.row + item_.rows;
    for (int begin = 0; begin < end; begin += kBlockTokens) {
      const int tokens = std::min(kBlockTokens, end - begin);
      const int64_t first = KvPlace(args_, item_, begin);
      PackKeys(args_.k + first, stride, tokens, g_.head_dim, w_.keys[0]);
      PackRowPairs(args_.v + first, stride, tokens, kBlockTokens, g_.head_dim, w_.values[0]);
      Attend({keys_, 1}, {values_, 1}, tokens, item_.row + 1 - begin);
    }
  }

  // Query i attends to the first min(tokens, first_limit + row of i) of 64 tokens; `kCodes`: of unpacked
  // ones, by the factors in the workspace.
  template <bool kCodes = false>
  void Attend(std::span<const uint32_t* const> key_parts, std::span<const uint32_t* const> value_parts,
              int tokens, int first_limit) {
    for (int tile = 0; tile < tiles_; ++tile) {
      const auto limit = [&](int row) {
        return std::min(tokens, first_limit + (tile * kTile + row) / group_);
      };
      if (limit(kTile - 1) <= 0) continue;
      Scores(w_.q[tile], key_parts, g_.head_dim, w_.scores);
      bool moved = false;
      float keep[kTile];
      for (int row = 0; row < kTile; ++row) {
        uint16_t *low = w_.weights[0][row], *high = w_.weights[1][row];
        keep[row] = 1;
        if (limit(row) > 0) {
          const RowSums sums = {w_.top[tile][row], w_.sum[tile][row], w_.offset[tile][row]};
          if constexpr (kCodes) {
            keep[row] = SoftmaxRowOfCodes(limit(row), w_.query_sum[tile][row], w_.scores[row], w_.key_factors,
                                          w_.value_factors, sums, low, high);
          } else {
            keep[row] = SoftmaxRow(limit(row), scale_, w_.scores[row], sums, low, high);
          }
          moved |= keep[row] != 1;
        } else {
          std::fill_n(low, 32, uint16_t{0});
          std::fill_n(high, 32, uint16_t{0});
        }
      }
      if (moved) Rescale(keep, w_.out[tile]);
      AddValues(w_.weights, value_parts, g_.head_dim, w_.out[tile]);
    }
  }

  void Rescale(const float* keep, float (*out)[kTile][kTile]) const {
    for (int n = 0; n < g_.head_dim / kTile; ++n) {
      for (int row = 0; row < kTile; ++row) {
        const __m512 x = _mm512_load_ps(out[n][row]);
        _mm512_store_ps(out[n][row], _mm512_mul_ps(x, _mm512_set1_ps(keep[row])));
      }
    }
  }

  float Sum(int i) const { return _mm512_reduce_add_ps(_mm512_load_ps(w_.sum[i / kTile][i % kTile])); }

  // The vector of query i times a factor.
  void WriteQuery(int i, float factor, float* to) const {
    const __m512 offset =
        _mm512_set1_ps(_mm512_reduce_add_ps(_mm512_load_ps(w_.offset[i / kTile][i % kTile])));
    for (int c = 0; c < g_.head_dim; c += kTile) {
      const __m512 x = _mm512_load_ps(w_.out[i / kTile][c / kTile][i % kTile]);
      _mm512_storeu_ps(to + c, _mm512_mul_ps(_mm512_add_ps(x, offset), _mm512_set1_ps(factor)));
    }
  }

  void WriteOut() const {
    for (int i = 0; i < queries_; ++i) WriteQuery(i, 1.0f / Sum(i), args_.out + QueryPlace(args_, item_, i));
  }

  void WritePartial(float* to) const {
    for (int i = 0; i < queries_; ++i) {
      WriteQuery(i, 1, to + i * g_.head_dim);
      to[queries_ * g_.head_dim + i] = w_.top[i / kTile][i % kTile];
      to[queries_ * (g_.head_dim + 1) + i] = Sum(i);
    }
  }

  const AttentionArgs& args_;
  const AttentionItem& item_;
  const KvGeometry g_;
  const int group_;
  const int queries_;
  const int tiles_;
  const float scale_;  // of q.k, times log2(e)
  AmxWorkspace& w_;
  const uint32_t* const keys_[2] = {w_.keys[0], w_.keys[1]};
  const uint32_t* const values_[2] = {w_.values[0], w_.values[1]};
};

// Not all compilers know the names of these features.
bool CpuidHasAmx() {
  constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24;
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d & kBf16) != 0 && (d & kTiles) != 0;
}

}  // namespace

bool CpuHasAmx() {
  static const bool has = [] {
    constexpr int kRequestPermission = 0x1023;  // ARCH_REQ_XCOMP_PERM
    constexpr int kTileData = 18;
    __builtin_cpu_init();
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512bf16") && CpuidHasAmx() &&
           syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return has;
}

void RunAmxItem(const AttentionArgs& args, const AttentionItem& item, AmxWorkspace& workspace,
                float* partials) {
  AmxItem(args, item, workspace).Run(partials);
}

}  // namespace triaxial

#pragma GCC pop_options

#else  // other processors take the portable path

namespace triaxial {

bool CpuHasAmx() { return false; }
void RunAmxItem(const AttentionArgs&, const AttentionItem&, AmxWorkspace&, float*) { CHECK(false); }

}  // namespace triaxial

#endif
