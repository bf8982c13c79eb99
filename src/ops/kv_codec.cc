#include "ops/kv_codec.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "base/check.h"
#include "base/checked_math.h"
#include "base/float8.h"
#include "base/parallel.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/kv_codec.cc"
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
using VF = hn::Vec<DF>;
using VI = hn::Vec<DI>;

constexpr int kMaxHeadDim = 128;
constexpr int kMaxGroups = kBlockTokens * kMaxHeadDim / kPaperGroup;

int Width() { return static_cast<int>(hn::Lanes(DF())); }

// ---- Rounding, as in base/float16.h

HWY_INLINE VI RoundToBf16Bits(VF x) {
  const DI di;
  const VI bits = hn::BitCast(di, x);
  const VI high = hn::ShiftRight<16>(bits);  // the sign is dropped by whoever keeps 16 bits
  const VI odd = hn::And(high, hn::Set(di, 1));
  const VI rounded = hn::ShiftRight<16>(hn::Add(hn::Add(bits, hn::Set(di, 0x7fff)), odd));
  const VI quiet = hn::Or(high, hn::Set(di, 0x40));
  return hn::IfThenElse(hn::RebindMask(di, hn::IsNaN(x)), quiet, rounded);
}

// For |x| <= 65504. The FP16 bits in the low half of each lane.
HWY_INLINE VI RoundToFp16Bits(VF x) {
  const DF df;
  const DI di;
  const VI bits = hn::BitCast(di, x);
  const VI magnitude = hn::And(bits, hn::Set(di, 0x7fffffff));
  const VI sign = hn::And(hn::ShiftRight<16>(bits), hn::Set(di, 0x8000));
  const VF aligned = hn::Add(hn::BitCast(df, magnitude), hn::Set(df, 0.5f));
  const VI subnormal = hn::Sub(hn::BitCast(di, aligned), hn::Set(di, 0x3f000000));
  const VI odd = hn::And(hn::ShiftRight<13>(magnitude), hn::Set(di, 1));
  const VI normal = hn::ShiftRight<13>(hn::Add(hn::Sub(magnitude, hn::Set(di, 0x38000000 - 0xfff)), odd));
  return hn::Or(sign, hn::IfThenElse(hn::Lt(magnitude, hn::Set(di, 0x38800000)), subnormal, normal));
}

// For finite FP16 bits in the low half of each lane.
HWY_INLINE VF FloatOfFp16Bits(VI h) {
  const DF df;
  const DI di;
  const VI sign = hn::ShiftLeft<16>(hn::And(h, hn::Set(di, 0x8000)));
  const VI magnitude = hn::ShiftLeft<13>(hn::And(h, hn::Set(di, 0x7fff)));
  const VF scaled = hn::Mul(hn::BitCast(df, magnitude), hn::Set(df, 0x1p112f));
  return hn::BitCast(df, hn::Or(sign, hn::BitCast(di, scaled)));
}

// For numbers: E4M3 as base/float8.h, in the low byte of each lane.
HWY_INLINE VI RoundToE4m3Bits(VF x) {
  const DF df;
  const DI di;
  const VI sign = hn::And(hn::ShiftRight<24>(hn::BitCast(di, x)), hn::Set(di, 0x80));
  const VF bounded = hn::Min(hn::Abs(x), hn::Set(df, kLargestE4m3));
  const VI magnitude = hn::BitCast(di, bounded);
  const VI aligned = hn::BitCast(di, hn::Add(bounded, hn::Set(df, 0x1p14f)));
  const VI subnormal = hn::Sub(aligned, hn::Set(di, 0x46800000));
  const VI odd = hn::And(hn::ShiftRight<20>(magnitude), hn::Set(di, 1));
  const VI normal = hn::ShiftRight<20>(hn::Add(hn::Sub(magnitude, hn::Set(di, 0x3c000000 - 0x7ffff)), odd));
  return hn::Or(sign, hn::IfThenElse(hn::Lt(magnitude, hn::Set(di, 0x3c800000)), subnormal, normal));
}

// Of the low byte of each lane; exact.
HWY_INLINE VF FloatOfE4m3Bits(VI x) {
  const DF df;
  const DI di;
  const VI sign = hn::ShiftLeft<24>(hn::And(x, hn::Set(di, 0x80)));
  const VI magnitude = hn::ShiftLeft<20>(hn::And(x, hn::Set(di, 0x7f)));
  const VF scaled = hn::Mul(hn::BitCast(df, magnitude), hn::Set(df, 0x1p120f));
  return hn::BitCast(df, hn::Or(sign, hn::BitCast(di, scaled)));
}

HWY_INLINE VF Sanitize(VF x) {
  const DF df;
  x = hn::IfThenElseZero(hn::Eq(x, x), x);  // NaN
  x = hn::Min(hn::Max(x, hn::Set(df, -65504.0f)), hn::Set(df, 65504.0f));
  return hn::Add(x, hn::Zero(df));
}

// ---- Groups

struct Groups {
  // Of the sanitized values, by PlaceOfMeta; those of groups without tokens are zero.
  HWY_ALIGN_MAX float lo[kMaxGroups];
  HWY_ALIGN_MAX float hi[kMaxGroups];
  // From the FP16 metadata.
  HWY_ALIGN_MAX float minimum[kMaxGroups];
  HWY_ALIGN_MAX float factor[kMaxGroups];  // to encode: 1 / scale, or 0; to decode: scale
};

// How a side's groups lie: along the channels of a token (2^channel_shift of them), or along 32 tokens.
struct Grouping {
  bool along_tokens = false;
  int channel_shift = 0;
};

Grouping GroupingOf(const KvGeometry& g, Side side, int bits) {
  if (g.codec == Codec::kRotated || bits == 8) return {false, g.head_dim == 128 ? 7 : 6};
  return {side == Side::kK && bits == 2, 5};
}

// Values of a per-group array for the channels [c, c + Width()) of token t.
HWY_INLINE VF OfGroup(const Grouping& grouping, const float* HWY_RESTRICT values, int head_dim, int t,
                      int c) {
  const DF df;
  if (grouping.along_tokens) return hn::LoadU(df, values + t / kPaperGroup * head_dim + c);
  return hn::Set(df, values[(c >> grouping.channel_shift) * kBlockTokens + t]);
}

void FindRanges(const Grouping& grouping, int head_dim, const float* HWY_RESTRICT x, int64_t row_stride,
                int tokens, int num_groups, Groups* HWY_RESTRICT groups) {
  const DF df;
  const int n = Width();
  if (tokens < kBlockTokens) {
    std::fill_n(groups->lo, num_groups, 0.0f);
    std::fill_n(groups->hi, num_groups, 0.0f);
  }
  if (grouping.along_tokens) {
    for (int begin = 0; begin < tokens; begin += kPaperGroup) {
      const int end = std::min(begin + kPaperGroup, tokens);
      for (int c = 0; c < head_dim; c += n) {
        VF lo = Sanitize(hn::LoadU(df, x + begin * row_stride + c)), hi = lo;
        for (int t = begin + 1; t < end; ++t) {
          const VF value = Sanitize(hn::LoadU(df, x + t * row_stride + c));
          lo = hn::Min(lo, value);
          hi = hn::Max(hi, value);
        }
        hn::StoreU(lo, df, groups->lo + begin / kPaperGroup * head_dim + c);
        hn::StoreU(hi, df, groups->hi + begin / kPaperGroup * head_dim + c);
      }
    }
    return;
  }
  const int width = 1 << grouping.channel_shift;
  for (int t = 0; t < tokens; ++t) {
    const float* HWY_RESTRICT row = x + t * row_stride;
    for (int begin = 0; begin < head_dim; begin += width) {
      VF lo = Sanitize(hn::LoadU(df, row + begin)), hi = lo;
      for (int c = begin + n; c < begin + width; c += n) {
        const VF value = Sanitize(hn::LoadU(df, row + c));
        lo = hn::Min(lo, value);
        hi = hn::Max(hi, value);
      }
      const int group = (begin >> grouping.channel_shift) * kBlockTokens + t;
      groups->lo[group] = hn::GetLane(hn::MinOfLanes(df, lo));
      groups->hi[group] = hn::GetLane(hn::MaxOfLanes(df, hi));
    }
  }
}

// Fits scale and minimum to each range; writes them as metadata and keeps what encoding needs.
void FitGroups(int num_groups, int bits, const SideClip& clip, Groups* HWY_RESTRICT groups, uint8_t* meta) {
  const DF df;
  const hn::Rebind<uint16_t, DF> d16;
  uint16_t* scales = reinterpret_cast<uint16_t*>(meta);
  const VF margin = hn::Set(df, (1.0f - clip.ratio) * 0.5f);
  const VF levels = hn::Set(df, static_cast<float>((1 << bits) - 1));
  const VF gain = hn::Set(df, clip.gain);
  const VF offset = hn::Set(df, static_cast<float>((1 << bits) - 1) * 0.5f * (1.0f - 1.0f / clip.gain));
  for (int i = 0; i < num_groups; i += Width()) {
    VF lo = hn::Load(df, groups->lo + i), hi = hn::Load(df, groups->hi + i);
    const VF trim = hn::Mul(hn::Sub(hi, lo), margin);
    lo = hn::Add(lo, trim);
    hi = hn::Sub(hi, trim);
    VI scale_bits = hn::Zero(DI()), minimum_bits = hn::Zero(DI());
    if (bits == 8) {
      scale_bits = RoundToFp16Bits(hn::Div(hn::Max(hn::Abs(lo), hn::Abs(hi)), hn::Set(df, kLargestE4m3)));
    } else {
      scale_bits = RoundToFp16Bits(hn::Div(hn::Sub(hi, lo), levels));
      minimum_bits = RoundToFp16Bits(lo);
    }
    hn::StoreU(hn::DemoteTo(d16, scale_bits), d16, scales + i);
    hn::StoreU(hn::DemoteTo(d16, minimum_bits), d16, scales + num_groups + i);
    const VF scale = FloatOfFp16Bits(scale_bits);
    const VF inverse = hn::Div(hn::Set(df, 1.0f), scale);
    hn::Store(hn::Add(FloatOfFp16Bits(minimum_bits), hn::Mul(scale, offset)), df, groups->minimum + i);
    hn::Store(hn::Mul(hn::IfThenZeroElse(hn::Eq(scale, hn::Zero(df)), inverse), gain), df,
              groups->factor + i);
  }
}

void ReadGroups(int num_groups, const uint8_t* meta, Groups* HWY_RESTRICT groups) {
  const DF df;
  const DI di;
  const hn::Rebind<uint16_t, DF> d16;
  const uint16_t* scales = reinterpret_cast<const uint16_t*>(meta);
  for (int i = 0; i < num_groups; i += Width()) {
    hn::Store(FloatOfFp16Bits(hn::PromoteTo(di, hn::LoadU(d16, scales + i))), df, groups->factor + i);
    hn::Store(FloatOfFp16Bits(hn::PromoteTo(di, hn::LoadU(d16, scales + num_groups + i))), df,
              groups->minimum + i);
  }
}

// ---- Codes

template <int kBits>
HWY_INLINE VI CodesOf(VF x, VF minimum, VF inverse) {
  const DF df;
  if constexpr (kBits == 8) return RoundToE4m3Bits(hn::Mul(Sanitize(x), inverse));
  const VF steps = hn::Mul(hn::Sub(Sanitize(x), minimum), inverse);
  const VF levels = hn::Set(df, static_cast<float>((1 << kBits) - 1));
  return hn::NearestInt(hn::Min(hn::Max(steps, hn::Zero(df)), levels));
}

template <int kBits>
HWY_INLINE VF ValuesOf(VI codes, VF minimum, VF scale) {
  if constexpr (kBits == 8) return hn::Mul(FloatOfE4m3Bits(codes), scale);
  return hn::Add(hn::Mul(hn::ConvertTo(DF(), codes), scale), minimum);
}

// K: a word holds four channels of one token, its bytes the tokens 16 apart.
template <int kBits>
void EncodeKeys(const Grouping& grouping, int head_dim, const float* HWY_RESTRICT x, int64_t row_stride,
                int tokens, const Groups& groups, uint8_t* HWY_RESTRICT out) {
  constexpr int kPerByte = 8 / kBits;
  constexpr int kRowTokens = 16 * kPerByte;
  constexpr int kRows = kBlockTokens / kRowTokens;
  const DF df;
  const DI di;
  const hn::Rebind<uint8_t, DF> d8;
  HWY_ALIGN_MAX uint8_t bytes[kMaxHeadDim];
  for (int row = 0; row < kRows; ++row) {
    for (int lane = 0; lane < 16; ++lane) {
      for (int c = 0; c < head_dim; c += Width()) {
        VI packed = hn::Zero(di);
        for (int j = 0; j < kPerByte; ++j) {
          const int t = row * kRowTokens + 16 * j + lane;
          if (t >= tokens) break;
          const VI codes = CodesOf<kBits>(hn::LoadU(df, x + t * row_stride + c),
                                          OfGroup(grouping, groups.minimum, head_dim, t, c),
                                          OfGroup(grouping, groups.factor, head_dim, t, c));
          packed = hn::Or(packed, hn::ShiftLeftSame(codes, kBits * j));
        }
        hn::StoreU(hn::DemoteTo(d8, packed), d8, bytes + c);
      }
      for (int word = 0; word < head_dim / 4; ++word) {
        std::memcpy(out + ((word * kRows + row) * 16 + lane) * 4, bytes + word * 4, 4);
      }
    }
  }
}

// V: a word holds four tokens of one channel, its bytes the channels 16 apart.
template <int kBits>
void EncodeValues(const Grouping& grouping, int head_dim, const float* HWY_RESTRICT x, int64_t row_stride,
                  int tokens, const Groups& groups, uint8_t* HWY_RESTRICT out) {
  constexpr int kPerByte = 8 / kBits;
  const int rows = head_dim / (16 * kPerByte);
  const DF df;
  const DI di;
  int32_t* HWY_RESTRICT words = reinterpret_cast<int32_t*>(out);
  for (int quad = 0; quad < kBlockTokens / 4; ++quad) {
    for (int row = 0; row < rows; ++row) {
      for (int lane = 0; lane < 16; lane += Width()) {
        VI packed = hn::Zero(di);
        for (int i = 0; i < 4; ++i) {
          const int t = quad * 4 + i;
          if (t >= tokens) break;
          for (int j = 0; j < kPerByte; ++j) {
            const int c = (row * kPerByte + j) * 16 + lane;
            const VI codes = CodesOf<kBits>(hn::LoadU(df, x + t * row_stride + c),
                                            OfGroup(grouping, groups.minimum, head_dim, t, c),
                                            OfGroup(grouping, groups.factor, head_dim, t, c));
            packed = hn::Or(packed, hn::ShiftLeftSame(codes, 8 * i + kBits * j));
          }
        }
        hn::StoreU(packed, di, words + (quad * rows + row) * 16 + lane);
      }
    }
  }
}

template <int kBits>
void DecodeKeys(const Grouping& grouping, int head_dim, const uint8_t* HWY_RESTRICT in, int tokens,
                const Groups& groups, float* HWY_RESTRICT out) {
  constexpr int kPerByte = 8 / kBits;
  constexpr int kRowTokens = 16 * kPerByte;
  constexpr int kRows = kBlockTokens / kRowTokens;
  const DF df;
  const DI di;
  const hn::Rebind<uint8_t, DF> d8;
  const VI mask = hn::Set(di, (1 << kBits) - 1);
  HWY_ALIGN_MAX uint8_t bytes[kMaxHeadDim];
  for (int row = 0; row < kRows; ++row) {
    for (int lane = 0; lane < 16 && row * kRowTokens + lane < tokens; ++lane) {
      for (int word = 0; word < head_dim / 4; ++word) {
        std::memcpy(bytes + word * 4, in + ((word * kRows + row) * 16 + lane) * 4, 4);
      }
      for (int c = 0; c < head_dim; c += Width()) {
        const VI packed = hn::PromoteTo(di, hn::LoadU(d8, bytes + c));
        for (int j = 0; j < kPerByte; ++j) {
          const int t = row * kRowTokens + 16 * j + lane;
          if (t >= tokens) break;
          const VF value = ValuesOf<kBits>(hn::And(hn::ShiftRightSame(packed, kBits * j), mask),
                                           OfGroup(grouping, groups.minimum, head_dim, t, c),
                                           OfGroup(grouping, groups.factor, head_dim, t, c));
          hn::StoreU(value, df, out + t * head_dim + c);
        }
      }
    }
  }
}

template <int kBits>
void DecodeValues(const Grouping& grouping, int head_dim, const uint8_t* HWY_RESTRICT in, int tokens,
                  const Groups& groups, float* HWY_RESTRICT out) {
  constexpr int kPerByte = 8 / kBits;
  const int rows = head_dim / (16 * kPerByte);
  const DF df;
  const DI di;
  const VI mask = hn::Set(di, (1 << kBits) - 1);
  const int32_t* HWY_RESTRICT words = reinterpret_cast<const int32_t*>(in);
  for (int quad = 0; quad * 4 < tokens; ++quad) {
    for (int row = 0; row < rows; ++row) {
      for (int lane = 0; lane < 16; lane += Width()) {
        const VI packed = hn::LoadU(di, words + (quad * rows + row) * 16 + lane);
        for (int i = 0; i < 4; ++i) {
          const int t = quad * 4 + i;
          if (t >= tokens) break;
          for (int j = 0; j < kPerByte; ++j) {
            const int c = (row * kPerByte + j) * 16 + lane;
            const VF value = ValuesOf<kBits>(hn::And(hn::ShiftRightSame(packed, 8 * i + kBits * j), mask),
                                             OfGroup(grouping, groups.minimum, head_dim, t, c),
                                             OfGroup(grouping, groups.factor, head_dim, t, c));
            hn::StoreU(value, df, out + t * head_dim + c);
          }
        }
      }
    }
  }
}

// ---- BF16 sides

// K: words of two channels of one token; V: words of two tokens of one channel.
void EncodeBf16(Side side, int head_dim, int capacity, const float* HWY_RESTRICT x, int64_t row_stride,
                int tokens, uint8_t* HWY_RESTRICT out) {
  const DF df;
  const DI di;
  const VI low_half = hn::Set(di, 0xffff);
  if (side == Side::kV) {
    for (int pair = 0; pair < capacity / 2; ++pair) {
      for (int c = 0; c < head_dim; c += Width()) {
        const float* HWY_RESTRICT even = x + 2 * pair * row_stride + c;
        VI packed = hn::Zero(di);
        if (2 * pair < tokens) packed = hn::And(RoundToBf16Bits(hn::LoadU(df, even)), low_half);
        if (2 * pair + 1 < tokens) {
          packed = hn::Or(packed, hn::ShiftLeft<16>(RoundToBf16Bits(hn::LoadU(df, even + row_stride))));
        }
        hn::StoreU(packed, di, reinterpret_cast<int32_t*>(out) + pair * head_dim + c);
      }
    }
    return;
  }
  const hn::Rebind<uint16_t, DF> d16;
  HWY_ALIGN_MAX uint16_t row[kMaxHeadDim];
  for (int t = 0; t < capacity; ++t) {
    if (t < tokens) {
      for (int c = 0; c < head_dim; c += Width()) {
        const VI bits = RoundToBf16Bits(hn::LoadU(df, x + t * row_stride + c));
        hn::StoreU(hn::DemoteTo(d16, hn::And(bits, low_half)), d16, row + c);
      }
    } else {
      std::fill_n(row, head_dim, uint16_t{0});
    }
    for (int pair = 0; pair < head_dim / 2; ++pair) {
      std::memcpy(out + (pair * capacity + t) * 4, row + 2 * pair, 4);
    }
  }
}

void DecodeBf16(Side side, int head_dim, int capacity, const uint8_t* HWY_RESTRICT in, int tokens,
                float* HWY_RESTRICT out) {
  const DF df;
  const DI di;
  const int32_t* HWY_RESTRICT words = reinterpret_cast<const int32_t*>(in);
  const VI high_half = hn::Set(di, static_cast<int32_t>(0xffff0000u));
  if (side == Side::kV) {
    for (int t = 0; t < tokens; ++t) {
      for (int c = 0; c < head_dim; c += Width()) {
        const VI packed = hn::LoadU(di, words + t / 2 * head_dim + c);
        const VI bits = t % 2 == 0 ? hn::ShiftLeft<16>(packed) : hn::And(packed, high_half);
        hn::StoreU(hn::BitCast(df, bits), df, out + t * head_dim + c);
      }
    }
    return;
  }
  // Reads a word row of all tokens at a time; the transposition happens on the way out.
  for (int pair = 0; pair < head_dim / 2; ++pair) {
    for (int t = 0; t < tokens; ++t) {
      uint32_t packed;
      std::memcpy(&packed, in + (pair * capacity + t) * 4, sizeof(packed));
      const uint32_t values[2] = {packed << 16, packed & 0xffff0000u};
      std::memcpy(out + t * head_dim + 2 * pair, values, sizeof(values));
    }
  }
}

// ---- Entry points

void EncodeSide(const KvGeometry& g, Side side, int bits, int capacity, const SideClip& clip, const float* x,
                int64_t row_stride, int tokens, uint8_t* out) {
  if (bits == 16) return EncodeBf16(side, g.head_dim, capacity, x, row_stride, tokens, out);
  Groups groups;
  const Grouping grouping = GroupingOf(g, side, bits);
  const int num_groups = MetaGroups(g, bits);
  FindRanges(grouping, g.head_dim, x, row_stride, tokens, num_groups, &groups);
  FitGroups(num_groups, bits, clip, &groups, out + CodeBytes(g, bits));
  const bool keys = side == Side::kK;
  const auto encode = bits == 2   ? (keys ? &EncodeKeys<2> : &EncodeValues<2>)
                      : bits == 4 ? (keys ? &EncodeKeys<4> : &EncodeValues<4>)
                                  : (keys ? &EncodeKeys<8> : &EncodeValues<8>);
  encode(grouping, g.head_dim, x, row_stride, tokens, groups, out);
}

void DecodeSide(const KvGeometry& g, Side side, int bits, int capacity, const uint8_t* in, int tokens,
                float* out) {
  if (bits == 16) return DecodeBf16(side, g.head_dim, capacity, in, tokens, out);
  Groups groups;
  ReadGroups(MetaGroups(g, bits), in + CodeBytes(g, bits), &groups);
  const bool keys = side == Side::kK;
  const auto decode = bits == 2   ? (keys ? &DecodeKeys<2> : &DecodeValues<2>)
                      : bits == 4 ? (keys ? &DecodeKeys<4> : &DecodeValues<4>)
                                  : (keys ? &DecodeKeys<8> : &DecodeValues<8>);
  decode(GroupingOf(g, side, bits), g.head_dim, in, tokens, groups, out);
}

void RoundToBf16(const float* x, int64_t n, float* out) {
  const DF df;
  for (int64_t i = 0; i < n; i += Width()) {
    const VI bits = hn::ShiftLeft<16>(RoundToBf16Bits(hn::LoadU(df, x + i)));
    hn::StoreU(hn::BitCast(df, bits), df, out + i);
  }
}

// A butterfly within a vector: lanes at a distance are exchanged and the upper of each pair is negated, so
// the sums are those of HadamardScalar.
class LaneButterfly {
 public:
  explicit LaneButterfly(int distance) {
    for (int i = 0; i < 16; ++i) {
      partner_[i] = i ^ distance;
      sign_[i] = (i & distance) != 0 ? INT32_MIN : 0;
    }
  }
  HWY_INLINE VF operator()(VF v) const {
    const DF df;
    const VF signed_v = hn::Xor(v, hn::BitCast(df, hn::Load(DI(), sign_)));
    return hn::Add(hn::TableLookupLanes(v, hn::SetTableIndices(df, partner_)), signed_v);
  }

 private:
  HWY_ALIGN_MAX int32_t partner_[16];
  HWY_ALIGN_MAX int32_t sign_[16];
};

void Hadamard(float* x, int64_t count, int head_dim) {
  const DF df;
  const int n = Width();
  const LaneButterfly by1(1), by2(2), by4(4), by8(8);
  const VF norm = hn::Set(df, static_cast<float>(1.0 / std::sqrt(static_cast<double>(head_dim))));
  for (float* HWY_RESTRICT head = x; head < x + count * head_dim; head += head_dim) {
    for (int i = 0; i < head_dim; i += n) {
      VF v = hn::LoadU(df, head + i);
      if (n > 1) v = by1(v);
      if (n > 2) v = by2(v);
      if (n > 4) v = by4(v);
      if (n > 8) v = by8(v);
      hn::StoreU(v, df, head + i);
    }
    for (int distance = n; distance < head_dim; distance *= 2) {
      for (int i = 0; i < head_dim; i += n) {
        if (i & distance) continue;
        const VF a = hn::LoadU(df, head + i), b = hn::LoadU(df, head + i + distance);
        hn::StoreU(hn::Add(a, b), df, head + i);
        hn::StoreU(hn::Sub(a, b), df, head + i + distance);
      }
    }
    for (int i = 0; i < head_dim; i += n) hn::StoreU(hn::Mul(hn::LoadU(df, head + i), norm), df, head + i);
  }
}

}  // namespace
}  // namespace HWY_NAMESPACE
}  // namespace triaxial
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace triaxial {
namespace {

HWY_EXPORT(EncodeSide);
HWY_EXPORT(DecodeSide);
HWY_EXPORT(RoundToBf16);
HWY_EXPORT(Hadamard);

}  // namespace

void EncodeSide(const KvGeometry& g, Format f, Side side, const ClipRatios& clip, const float* x,
                int64_t row_stride, int tokens, uint8_t* block_head, int capacity) {
  capacity = RoomOf(f, capacity);
  CHECK(g.head_dim == 64 || g.head_dim == 128);
  CHECK(tokens >= 1 && tokens <= capacity && capacity <= kBlockTokens && capacity % kTailStep == 0);
  CHECK(IsValid(clip));
  const int bits = Bits(f, side);
  HWY_DYNAMIC_DISPATCH(EncodeSide)
  (g, side, bits, capacity, ClipOf(g, clip, side, bits), x, row_stride, tokens,
   block_head + SideOffset(g, f, side, capacity));
}

void EncodeBlock(const KvGeometry& g, Format f, const ClipRatios& clip, const float* k, const float* v,
                 int64_t row_stride, int tokens, uint8_t* out, int capacity) {
  EncodeSide(g, f, Side::kK, clip, k, row_stride, tokens, out, capacity);
  EncodeSide(g, f, Side::kV, clip, v, row_stride, tokens, out, capacity);
}

void DecodeSide(const KvGeometry& g, Format f, Side side, const uint8_t* block_head, int tokens, float* out,
                int capacity) {
  capacity = RoomOf(f, capacity);
  CHECK(g.head_dim == 64 || g.head_dim == 128);
  CHECK(tokens >= 1 && tokens <= capacity && capacity <= kBlockTokens && capacity % kTailStep == 0);
  HWY_DYNAMIC_DISPATCH(DecodeSide)
  (g, side, Bits(f, side), capacity, block_head + SideOffset(g, f, side, capacity), tokens, out);
}

void RoundToBf16(const float* x, int64_t n, float* out) {
  CHECK(n % 16 == 0);
  HWY_DYNAMIC_DISPATCH(RoundToBf16)(x, n, out);
}

void Hadamard(float* x, int64_t count, int head_dim) {
  CHECK(head_dim == 64 || head_dim == 128);
  constexpr int64_t kChunk = 128;  // vectors; fewer are not worth a second thread
  ParallelFor(CeilDiv(count, kChunk), [&](int64_t i) {
    HWY_DYNAMIC_DISPATCH(Hadamard)(x + i * kChunk * head_dim, std::min(kChunk, count - i * kChunk), head_dim);
  });
}

}  // namespace triaxial
#endif  // HWY_ONCE
