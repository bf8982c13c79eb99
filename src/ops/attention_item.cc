#include "ops/attention_item.h"

#include <algorithm>
#include <limits>

#include "base/check.h"
#include "base/float16.h"
#include "hwy/cache_control.h"
#include "ops/attention_vnni.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/attention_item.cc"
// Compiles this file once per instruction set.
#include "hwy/foreach_target.h"
// After foreach_target.h.
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace triaxial {
namespace HWY_NAMESPACE {
namespace {

namespace hn = hwy::HWY_NAMESPACE;

// Sixteen lanes are what a row of code words holds; narrower vectors take several turns.
using DF = hn::CappedTag<float, 16>;
using DI = hn::Rebind<int32_t, DF>;
using DU = hn::Rebind<uint32_t, DF>;
using VF = hn::Vec<DF>;

int Width() { return static_cast<int>(hn::Lanes(DF())); }

// ---- Matrix products: c[query][lane] = keep[query] * c + sum over depth of a[query][depth] *
// b[depth][lane]. Serves both sides: scores have lanes = tokens, depth = channels; values the reverse.

// A right side gives kDepths depths at a time, in kDepths / 2 pairs: number s is depths d + s and d + s +
// kDepths / 2. Products are in units of kUnit.

// The right side as F32 rows.
struct FloatRows {
  static constexpr int kDepths = 2;
  static constexpr float kUnit = 1;
  const float* data;
  int64_t stride;
  HWY_INLINE void Pair(int depth, int, int lane, VF& even, VF& odd) const {
    even = Single(depth, lane);
    odd = Single(depth + 1, lane);
  }
  VF Single(int depth, int lane) const { return hn::LoadU(DF(), data + depth * stride + lane); }
};

// A BF16 side of a block: pairs of depths (PlaceOfBf16), so a word's halves are F32 after a shift or a mask.
// `next`, as large, is what will be read then: it is brought into the cache meanwhile.
struct Bf16Side {
  static constexpr int kDepths = 2;
  static constexpr float kUnit = 1;
  const uint8_t* data;
  int lanes;
  const uint8_t* next;
  hn::Vec<DU> Words(int depth, int lane) const {
    const int64_t place = int64_t{depth} / 2 * lanes + lane;
    hwy::Prefetch(reinterpret_cast<const uint32_t*>(next) + place);
    return hn::LoadU(DU(), reinterpret_cast<const uint32_t*>(data) + place);
  }
  HWY_INLINE void Pair(int depth, int, int lane, VF& even, VF& odd) const {
    const auto words = Words(depth, lane);
    even = hn::BitCast(DF(), hn::ShiftLeft<16>(words));
    odd = hn::BitCast(DF(), hn::And(words, hn::Set(DU(), 0xffff0000u)));
  }
  VF Single(int depth, int lane) const { return hn::BitCast(DF(), hn::ShiftLeft<16>(Words(depth, lane))); }
};

// Two codes of the 16-bit halves of words, the lower and the upper byte, as F32 * 2^-120: the exponent's bits
// are put where F32 has its lowest.
HWY_INLINE void SplitE4m3(hn::Vec<DU> words, int upper_byte, VF& low_half, VF& high_half) {
  const DU du;
#if HWY_TARGET != HWY_SCALAR
  const hn::Repartition<int16_t, DF> d16;
  auto halves = hn::BitCast(d16, words);
  if (upper_byte == 0) halves = hn::ShiftLeft<8>(halves);
  const auto placed = hn::And(hn::BitCast(du, hn::ShiftRight<4>(halves)), hn::Set(du, 0x87f087f0u));
#else  // which has no vectors of halves
  if (upper_byte == 0) words = hn::ShiftLeft<8>(words);
  const auto placed = hn::Or(hn::And(words, hn::Set(du, 0x80008000u)),
                             hn::And(hn::ShiftRight<4>(words), hn::Set(du, 0x07f007f0u)));
#endif
  low_half = hn::BitCast(DF(), hn::ShiftLeft<16>(placed));
  high_half = hn::BitCast(DF(), hn::And(placed, hn::Set(du, 0xffff0000u)));
}

// The codes of an FP8 side: words of four depths. The left side is taken times 2^60, so that neither it nor
// the products leave the range of F32; scales belong to tokens and are applied outside.
struct Fp8Side {
  static constexpr int kDepths = 4;
  static constexpr float kUnit = 0x1p60f;
  static constexpr float kLeft = 0x1p60f;
  const uint8_t* data;
  int lanes;
  const uint8_t* next;  // as Bf16Side
  HWY_INLINE void Pair(int depth, int s, int lane, VF& first, VF& second) const {
    const int64_t place = int64_t{depth} / 4 * lanes + lane;
    if (s == 0) hwy::Prefetch(reinterpret_cast<const uint32_t*>(next) + place);
    SplitE4m3(hn::LoadU(DU(), reinterpret_cast<const uint32_t*>(data) + place), s, first, second);
  }
};

// Q queries x V vectors of lanes in registers.
template <int Q, int V, class Right>
HWY_INLINE void ProductBlock(const float* a, int a_stride, const Right& b, int depth, int lane,
                             const float* keep, float* c, int c_stride) {
  const DF df;
  const int width = Width();
  VF sum[Q][V];
  for (int q = 0; q < Q; ++q) {
    for (int v = 0; v < V; ++v) sum[q][v] = hn::Zero(df);
  }
  constexpr int kPairs = Right::kDepths / 2;
  int d = 0;
  for (; d + Right::kDepths <= depth; d += Right::kDepths) {
    for (int s = 0; s < kPairs; ++s) {
      VF first[V], second[V];
      for (int v = 0; v < V; ++v) b.Pair(d, s, lane + v * width, first[v], second[v]);
      for (int q = 0; q < Q; ++q) {
        const VF a_first = hn::Set(df, a[q * a_stride + d + s]);
        const VF a_second = hn::Set(df, a[q * a_stride + d + s + kPairs]);
        for (int v = 0; v < V; ++v) sum[q][v] = hn::MulAdd(a_first, first[v], sum[q][v]);
        for (int v = 0; v < V; ++v) sum[q][v] = hn::MulAdd(a_second, second[v], sum[q][v]);
      }
    }
  }
  if constexpr (Right::kDepths == 2) {
    if (d < depth) {  // the partner of the last token of a tail is not a number that may be touched
      for (int q = 0; q < Q; ++q) {
        const VF a_last = hn::Set(df, a[q * a_stride + d]);
        for (int v = 0; v < V; ++v) {
          sum[q][v] = hn::MulAdd(a_last, b.Single(d, lane + v * width), sum[q][v]);
        }
      }
    }
  }
  for (int q = 0; q < Q; ++q) {
    for (int v = 0; v < V; ++v) {
      float* to = c + q * c_stride + lane + v * width;
      VF total = sum[q][v];
      if constexpr (Right::kUnit != 1) total = hn::Mul(total, hn::Set(df, Right::kUnit));
      if (keep != nullptr) total = hn::MulAdd(hn::Set(df, keep[q]), hn::Load(df, to), total);
      hn::Store(total, df, to);
    }
  }
}

template <int Q, class Right>
HWY_INLINE void ProductRows(const float* a, int a_stride, const Right& b, int depth, int lanes,
                            const float* keep, float* c, int c_stride) {
  constexpr int kVectors = HWY_TARGET <= HWY_AVX3 ? 4 : 2;  // 16 or 8 sums, of 32 or 16 registers
  const int width = Width();
  int lane = 0;
  for (; lane + kVectors * width <= lanes; lane += kVectors * width) {
    ProductBlock<Q, kVectors>(a, a_stride, b, depth, lane, keep, c, c_stride);
  }
  for (; lane < lanes; lane += width) ProductBlock<Q, 1>(a, a_stride, b, depth, lane, keep, c, c_stride);
}

template <class Right>
HWY_NOINLINE void Product(const float* a, int a_stride, int queries, const Right& b, int depth, int lanes,
                          const float* keep, float* c, int c_stride) {
  for (int q = 0; q < queries; q += 4) {
    const float* rows = a + q * a_stride;
    const float* keep_rows = keep == nullptr ? nullptr : keep + q;
    float* to = c + q * c_stride;
    if (queries - q == 1) {
      ProductRows<1>(rows, a_stride, b, depth, lanes, keep_rows, to, c_stride);
    } else if (queries - q == 2) {
      ProductRows<2>(rows, a_stride, b, depth, lanes, keep_rows, to, c_stride);
    } else {  // a third of four is zero or left over: its results are not read
      ProductRows<4>(rows, a_stride, b, depth, lanes, keep_rows, to, c_stride);
    }
  }
}

template <class Right>
void DenseScores(const Right& keys, int head_dim, int tokens, int queries, AttentionWorkspace& w) {
  const int lanes = (tokens + 15) / 16 * 16;
  Product(w.q, kMaxHeadDim, queries, keys, head_dim, lanes, nullptr, w.scores, kBlockTokens);
}

template <class Right>
void DenseValues(const Right& values, int head_dim, int tokens, int queries, AttentionWorkspace& w) {
  Product(w.scores, kBlockTokens, queries, values, tokens, head_dim, w.keep, w.out, kMaxHeadDim);
}

// ---- Softmax

// 2^x for x <= 126, zero below -126; relative error 2e-7.
HWY_INLINE VF Exp2(VF x) {
  const DF df;
  const DI di;
  const VF bounded = hn::Max(x, hn::Set(df, -126.0f));
  const auto whole = hn::NearestInt(bounded);
  const VF f = hn::Sub(bounded, hn::ConvertTo(df, whole));
  // Taylor of 2^f, |f| <= 1/2: ln(2)^k / k!.
  VF p = hn::Set(df, 1.54035304e-4f);
  p = hn::MulAdd(p, f, hn::Set(df, 1.33335581e-3f));
  p = hn::MulAdd(p, f, hn::Set(df, 9.61812911e-3f));
  p = hn::MulAdd(p, f, hn::Set(df, 5.55041087e-2f));
  p = hn::MulAdd(p, f, hn::Set(df, 2.40226507e-1f));
  p = hn::MulAdd(p, f, hn::Set(df, 6.93147181e-1f));
  p = hn::MulAdd(p, f, hn::Set(df, 1.0f));
  const auto power = hn::ShiftLeft<23>(hn::Add(whole, hn::Set(di, 127)));
  return hn::IfThenElseZero(hn::Ge(x, hn::Set(df, -126.0f)), hn::Mul(p, hn::BitCast(df, power)));
}

// Scores of `limit` tokens to weights, zero for the rest of the tile; updates top and the lanes of sum, and
// leaves in keep what `out` must be multiplied by.
HWY_INLINE void SoftmaxRow(int limit, float* scores, float& top, float* sum, float& keep) {
  const DF df;
  const DI di;
  const int width = Width();
  const VF nothing = hn::Set(df, -std::numeric_limits<float>::infinity());
  if (limit % width != 0) {
    float* last = scores + limit / width * width;
    const auto valid = hn::Lt(hn::Iota(di, 0), hn::Set(di, limit % width));
    hn::Store(hn::IfThenElse(hn::RebindMask(df, valid), hn::Load(df, last), nothing), df, last);
  }
  const int end = (limit + width - 1) / width * width;
  VF high = nothing;
  for (int t = 0; t < end; t += width) high = hn::Max(high, hn::Load(df, scores + t));
  VF total = hn::Load(df, sum);
  keep = 1;
  if (!hn::AllFalse(df, hn::Gt(high, hn::Set(df, top + kSlack)))) {
    const float new_top = hn::GetLane(hn::MaxOfLanes(df, high));
    keep = hn::GetLane(Exp2(hn::Set(df, top - new_top)));
    total = hn::Mul(total, hn::Set(df, keep));
    top = new_top;
  }
  const VF base = hn::Set(df, top);
  for (int t = 0; t < end; t += width) {
    const VF weight = Exp2(hn::Sub(hn::Load(df, scores + t), base));
    total = hn::Add(total, weight);
    hn::Store(weight, df, scores + t);
  }
  for (int t = end; t < kBlockTokens; t += width) hn::Store(hn::Zero(df), df, scores + t);
  hn::Store(total, df, sum);
}

// Query i attends to the first min(tokens, first_limit + row of i) tokens of the tile.
HWY_NOINLINE void Softmax(int tokens, int first_limit, int group, int queries, AttentionWorkspace& w) {
  for (int i = 0; i < queries; ++i) {
    const int limit = std::min(tokens, first_limit + i / group);
    if (limit > 0) {
      SoftmaxRow(limit, w.scores + i * kBlockTokens, w.top[i], w.sum + i * kSumLanes, w.keep[i]);
    } else {
      std::fill_n(w.scores + i * kBlockTokens, kBlockTokens, 0.0f);
      w.keep[i] = 1.0f;
    }
  }
}

// ---- Tiles

// A compressed side to F32 [depth][lane]. Lanes have a group each (keys, but for the paper's 2-bit ones) or
// share that of their 32 neighbours.
template <int kBits, bool kGroupPerLane>
HWY_NOINLINE void ExpandSide(const KvGeometry& g, Side side, const uint8_t* in, float* tile) {
  const DF df;
  const DI di;
  const int width = Width();
  const int lanes = side == Side::kK ? kBlockTokens : g.head_dim;
  const int depths = side == Side::kK ? g.head_dim : kBlockTokens;
  const auto group_of = [&](int depth, int lane) {
    return side == Side::kK ? PlaceOfMeta(g, side, kBits, lane, depth)
                            : PlaceOfMeta(g, side, kBits, depth, lane);
  };
  const int groups = MetaGroups(g, kBits);
  HWY_ALIGN float meta[2 * kBlockTokens * kMaxChannelGroups];  // scales, then minima
  const uint8_t* stored = in + CodeBytes(g, kBits);
  for (int i = 0; i < 2 * groups; ++i) {
    meta[i] = Fp16ToFloat(static_cast<fp16_t>(stored[2 * i] | stored[2 * i + 1] << 8));
  }
  const auto mask = hn::Set(di, (1 << kBits) - 1);
  constexpr int kFields = 8 / kBits;  // of a byte: lanes 16 apart
  const auto* words = reinterpret_cast<const int32_t*>(in);
  for (int depth = 0; depth < depths; depth += 4) {
    for (int lane = 0; lane < lanes; lane += 16 * kFields) {
      const float* scales[kFields];
      for (int f = 0; f < kFields; ++f) scales[f] = meta + group_of(depth, lane + 16 * f);
      for (int part = 0; part < 16; part += width, words += width) {
        auto fields = hn::LoadU(di, words);
        for (int i = 0; i < 4; ++i) {
          for (int f = 0; f < kFields; ++f) {
            const float* scale = scales[f] + (kGroupPerLane ? part : i);
            float* to = tile + (depth + i) * lanes + lane + 16 * f + part;
            const VF codes = hn::ConvertTo(df, hn::And(fields, mask));
            if constexpr (kGroupPerLane) {
              hn::Store(hn::MulAdd(codes, hn::LoadU(df, scale), hn::LoadU(df, scale + groups)), df, to);
            } else {
              hn::Store(hn::MulAdd(codes, hn::Set(df, scale[0]), hn::Set(df, scale[groups])), df, to);
            }
            fields = hn::ShiftRight<kBits>(fields);
          }
        }
      }
    }
  }
}

// FP16 scales of the 64 tokens of an FP8 side, times `factor`.
HWY_INLINE void ReadTokenScales(const KvGeometry& g, const uint8_t* side, float factor, float* scales) {
  const uint8_t* stored = side + CodeBytes(g, 8);
  for (int t = 0; t < kBlockTokens; ++t) {
    scales[t] = factor * Fp16ToFloat(static_cast<fp16_t>(stored[2 * t] | stored[2 * t + 1] << 8));
  }
}

// An FP8 side to F32 [depth][lane].
HWY_NOINLINE void ExpandFp8Side(const KvGeometry& g, Side side, const uint8_t* in, float* tile) {
  const DF df;
  const int width = Width();
  const int lanes = side == Side::kK ? kBlockTokens : g.head_dim;
  const int depths = side == Side::kK ? g.head_dim : kBlockTokens;
  HWY_ALIGN float scales[kBlockTokens];
  ReadTokenScales(g, in, 0x1p120f, scales);
  const auto* words = reinterpret_cast<const uint32_t*>(in);
  for (int depth = 0; depth < depths; depth += 4) {
    for (int lane = 0; lane < lanes; lane += width) {
      const auto four = hn::LoadU(DU(), words + depth / 4 * lanes + lane);
      VF x[4];
      SplitE4m3(four, 0, x[0], x[2]);
      SplitE4m3(four, 1, x[1], x[3]);
      for (int i = 0; i < 4; ++i) {
        const VF scale = side == Side::kK ? hn::Load(df, scales + lane) : hn::Set(df, scales[depth + i]);
        hn::Store(hn::Mul(x[i], scale), df, tile + (depth + i) * lanes + lane);
      }
    }
  }
}

void ExpandAnySide(const KvGeometry& g, Side side, int bits, const uint8_t* in, float* tile) {
  if (bits == 8) return ExpandFp8Side(g, side, in, tile);
  const bool group_per_lane = side == Side::kK && (g.codec == Codec::kRotated || bits != 2);
  if (bits == 2) {
    group_per_lane ? ExpandSide<2, true>(g, side, in, tile) : ExpandSide<2, false>(g, side, in, tile);
  } else {
    group_per_lane ? ExpandSide<4, true>(g, side, in, tile) : ExpandSide<4, false>(g, side, in, tile);
  }
}

// Up to 64 rows of the step's keys to F32 [channel][64 tokens].
HWY_NOINLINE void TransposeKeys(const float* keys, int64_t stride, int tokens, int head_dim, float* tile) {
  int t = 0;
#if HWY_TARGET != HWY_SCALAR  // which has no vectors to interleave
  const hn::Full128<float> d4;
  for (; t + 4 <= tokens; t += 4) {
    const float* row = keys + t * stride;
    for (int c = 0; c < head_dim; c += 4) {
      const auto r0 = hn::LoadU(d4, row + c);
      const auto r1 = hn::LoadU(d4, row + stride + c);
      const auto r2 = hn::LoadU(d4, row + 2 * stride + c);
      const auto r3 = hn::LoadU(d4, row + 3 * stride + c);
      const auto even_low = hn::InterleaveLower(d4, r0, r2);
      const auto even_high = hn::InterleaveUpper(d4, r0, r2);
      const auto odd_low = hn::InterleaveLower(d4, r1, r3);
      const auto odd_high = hn::InterleaveUpper(d4, r1, r3);
      float* to = tile + c * kBlockTokens + t;
      hn::Store(hn::InterleaveLower(d4, even_low, odd_low), d4, to);
      hn::Store(hn::InterleaveUpper(d4, even_low, odd_low), d4, to + kBlockTokens);
      hn::Store(hn::InterleaveLower(d4, even_high, odd_high), d4, to + 2 * kBlockTokens);
      hn::Store(hn::InterleaveUpper(d4, even_high, odd_high), d4, to + 3 * kBlockTokens);
    }
  }
#endif
  for (; t < tokens; ++t) {
    for (int c = 0; c < head_dim; ++c) tile[c * kBlockTokens + t] = keys[t * stride + c];
  }
}

// ---- The item

class ItemRun {
 public:
  ItemRun(const AttentionArgs& args, const AttentionItem& item, bool integer, AttentionWorkspace& workspace)
      : args_(args),
        item_(item),
        g_(args.geometry),
        group_(args.num_heads / g_.num_kv_heads),
        queries_(item.rows * group_),
        integer_(integer),
        w_(workspace) {}

  void Run(float* partials) {
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
  int64_t QueryPlace(int i) const { return triaxial::QueryPlace(args_, item_, i); }
  const uint8_t* Head(int64_t block) const { return BlockHead(args_, item_, block); }

  void Begin() {
    const DF df;
    const VF scale = hn::Set(df, args_.scale * kLog2e);
    for (int i = 0; i < queries_; ++i) {
      const float* q = args_.q + QueryPlace(i);
      for (int c = 0; c < g_.head_dim; c += Width()) {
        hn::Store(hn::Mul(hn::LoadU(df, q + c), scale), df, w_.q + i * kMaxHeadDim + c);
        hn::Store(hn::Zero(df), df, w_.out + i * kMaxHeadDim + c);
      }
      w_.top[i] = -std::numeric_limits<float>::infinity();
      hn::Store(hn::Zero(df), df, w_.sum + i * kSumLanes);
    }
  }

  void AttendBlock(int64_t block) {
    const KvBlockRef& ref = item_.sequence->blocks[static_cast<size_t>(block)];
    const uint8_t* keys = Head(block);
    const int k_bits = Bits(ref.format, Side::kK);
    const int v_bits = Bits(ref.format, Side::kV);
    const uint8_t* values = keys + SideBytes(g_, k_bits, ref.capacity);
    if (ref.format == Format::kBf16) {
      CHECK(ref.tokens <= ref.capacity && ref.capacity <= kBlockTokens && ref.capacity % kTailStep == 0);
      const bool more = block + 1 < item_.block_end &&
                        item_.sequence->blocks[static_cast<size_t>(block + 1)].format == Format::kBf16;
      DenseScores(Bf16Side{keys, ref.capacity, values}, g_.head_dim, ref.tokens, queries_, w_);
      Softmax(ref.tokens, ref.tokens, group_, queries_, w_);
      DenseValues(Bf16Side{values, g_.head_dim, more ? Head(block + 1) : values}, g_.head_dim, ref.tokens,
                  queries_, w_);
    } else if (ref.format == Format::kFp8 && queries_ <= kFewQueries) {
      AttendFp8(block, ref.tokens);
    } else if (integer_ && ref.format != Format::kFp8) {
      if (!queries_quantized_) QuantizeQueries(g_, queries_, w_);
      queries_quantized_ = true;
      Prefetch next_keys, next_values;
      if (block + 1 < item_.block_end) {
        const KvBlockRef& next = item_.sequence->blocks[static_cast<size_t>(block + 1)];
        next_keys = {Head(block + 1), HeadBytes(g_, next.format, next.capacity) / 2};
        next_values = {next_keys.data + next_keys.bytes, next_keys.bytes};
      }
      CodeScores(g_, k_bits, keys, queries_, next_keys, w_);
      Softmax(ref.tokens, ref.tokens, group_, queries_, w_);
      CodeValues(g_, v_bits, values, ref.tokens, queries_, next_values, w_);
    } else {
      ExpandAnySide(g_, Side::kK, k_bits, keys, w_.tile);
      DenseScores(FloatRows{w_.tile, kBlockTokens}, g_.head_dim, ref.tokens, queries_, w_);
      Softmax(ref.tokens, ref.tokens, group_, queries_, w_);
      ExpandAnySide(g_, Side::kV, v_bits, values, w_.tile);
      DenseValues(FloatRows{w_.tile, g_.head_dim}, g_.head_dim, ref.tokens, queries_, w_);
    }
  }

  // Scales are factors of scores and of weights.
  void AttendFp8(int64_t block, int tokens) {
    const DF df;
    const int side_bytes = SideBytes(g_, 8);
    const uint8_t* keys = Head(block);
    const uint8_t* values = keys + side_bytes;
    if (!large_queries_) {
      for (int i = 0; i < queries_ * kMaxHeadDim; i += Width()) {
        hn::Store(hn::Mul(hn::Load(df, w_.q + i), hn::Set(df, Fp8Side::kLeft)), df, w_.large_q + i);
      }
      large_queries_ = true;
    }
    HWY_ALIGN float scales[kBlockTokens];
    const auto scale_scores = [&] {
      for (int i = 0; i < queries_; ++i) {
        for (int t = 0; t < kBlockTokens; t += Width()) {
          float* at = w_.scores + i * kBlockTokens + t;
          hn::Store(hn::Mul(hn::Load(df, at), hn::Load(df, scales + t)), df, at);
        }
      }
    };
    Product(w_.large_q, kMaxHeadDim, queries_, Fp8Side{keys, kBlockTokens, values}, g_.head_dim, kBlockTokens,
            nullptr, w_.scores, kBlockTokens);
    ReadTokenScales(g_, keys, 1, scales);
    scale_scores();
    Softmax(tokens, tokens, group_, queries_, w_);
    ReadTokenScales(g_, values, Fp8Side::kLeft, scales);
    scale_scores();
    const bool more = block + 1 < item_.block_end;
    Product(w_.scores, kBlockTokens, queries_, Fp8Side{values, g_.head_dim, more ? Head(block + 1) : values},
            (tokens + 3) / 4 * 4, g_.head_dim, w_.keep, w_.out, kMaxHeadDim);
  }

  // Row r of the item (item_.row + r of the sequence) sees the step's rows up to itself.
  void AttendStep() {
    const int64_t stride = int64_t{g_.num_kv_heads} * g_.head_dim;
    const int end = item_.row + item_.rows;
    for (int begin = 0; begin < end; begin += kBlockTokens) {
      const int tokens = std::min(kBlockTokens, end - begin);
      const int64_t first = KvPlace(args_, item_, begin);
      TransposeKeys(args_.k + first, stride, tokens, g_.head_dim, w_.tile);
      DenseScores(FloatRows{w_.tile, kBlockTokens}, g_.head_dim, tokens, queries_, w_);
      Softmax(tokens, item_.row + 1 - begin, group_, queries_, w_);
      // Rows lie a power of two apart, in the same few sets of the cache, so they are read once.
      for (int t = 0; t < tokens; ++t) {
        std::copy_n(args_.v + first + t * stride, g_.head_dim, w_.tile + t * g_.head_dim);
      }
      DenseValues(FloatRows{w_.tile, g_.head_dim}, g_.head_dim, tokens, queries_, w_);
    }
  }

  float Sum(int i) const {
    const DF df;
    return hn::GetLane(hn::SumOfLanes(df, hn::Load(df, w_.sum + i * kSumLanes)));
  }

  void WriteOut() {
    const DF df;
    for (int i = 0; i < queries_; ++i) {
      float* out = args_.out + QueryPlace(i);
      const VF inverse = hn::Set(df, 1.0f / Sum(i));
      for (int c = 0; c < g_.head_dim; c += Width()) {
        hn::StoreU(hn::Mul(hn::Load(df, w_.out + i * kMaxHeadDim + c), inverse), df, out + c);
      }
    }
  }

  void WritePartial(float* to) {
    for (int i = 0; i < queries_; ++i) {
      std::copy_n(w_.out + i * kMaxHeadDim, g_.head_dim, to + i * g_.head_dim);
    }
    std::copy_n(w_.top, queries_, to + queries_ * g_.head_dim);
    for (int i = 0; i < queries_; ++i) to[queries_ * (g_.head_dim + 1) + i] = Sum(i);
  }

  const AttentionArgs& args_;
  const AttentionItem& item_;
  const KvGeometry g_;
  const int group_;
  const int queries_;
  const bool integer_;
  bool queries_quantized_ = false;
  bool large_queries_ = false;
  AttentionWorkspace& w_;
};

void RunItem(const AttentionArgs& args, const AttentionItem& item, bool integer,
             AttentionWorkspace& workspace, float* partials) {
  ItemRun(args, item, integer, workspace).Run(partials);
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace triaxial
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace triaxial {

HWY_EXPORT(RunItem);
HWY_EXPORT(ExpandAnySide);

void RunAttentionItem(const AttentionArgs& args, const AttentionItem& item, bool integer,
                      AttentionWorkspace& workspace, float* partials) {
  HWY_DYNAMIC_DISPATCH(RunItem)(args, item, integer, workspace, partials);
}

void ExpandSide(const KvGeometry& g, Side side, int bits, const uint8_t* in, float* tile) {
  HWY_DYNAMIC_DISPATCH(ExpandAnySide)(g, side, bits, in, tile);
}

}  // namespace triaxial
#endif  // HWY_ONCE
