#include "kv/codec.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "base/check.h"
#include "base/float16.h"
#include "base/float8.h"

namespace triaxial {
namespace {

constexpr float kLargestFp16 = 65504.0f;

// K sums over channels and has one lane per token; V the reverse.
int Depth(Side side, int token, int channel) { return side == Side::kK ? channel : token; }
int Lane(Side side, int token, int channel) { return side == Side::kK ? token : channel; }
int Lanes(const KvGeometry& g, Side side, int capacity) { return side == Side::kK ? capacity : g.head_dim; }

fp16_t LoadFp16(const uint8_t* p) {
  fp16_t x;
  std::memcpy(&x, p, sizeof(x));
  return x;
}
void StoreFp16(uint8_t* p, fp16_t x) { std::memcpy(p, &x, sizeof(x)); }

// NaN counts as 0 and infinities as the largest FP16, so that all that follows is finite; adding +0 drops the
// sign of -0, so that the minimum of a group does not depend on the order of comparisons.
float Sanitize(float x) {
  if (std::isnan(x)) return 0.0f;
  return std::clamp(x, -kLargestFp16, kLargestFp16) + 0.0f;
}

struct Group {
  fp16_t scale = 0;
  fp16_t minimum = 0;
};

Group FitGroup(float lo, float hi, int bits, float clip) {
  if (bits == 8) return {FloatToFp16(std::max(std::abs(lo), std::abs(hi)) / kLargestE4m3), 0};
  const float trim = (hi - lo) * ((1.0f - clip) * 0.5f);
  lo = lo + trim;
  hi = hi - trim;
  const float levels = static_cast<float>((1 << bits) - 1);
  return {FloatToFp16((hi - lo) / levels), FloatToFp16(lo)};
}

uint8_t CodeOf(float x, const Group& group, int bits, float gain) {
  const float scale = Fp16ToFloat(group.scale);
  const float inverse = scale == 0.0f ? 0.0f : 1.0f / scale;
  if (bits == 8) return FloatToE4m3(x * inverse);
  const float levels = static_cast<float>((1 << bits) - 1);
  const float offset = levels * 0.5f * (1.0f - 1.0f / gain);
  const float moved = scale * offset;
  const float origin = Fp16ToFloat(group.minimum) + moved;
  const float amplified = inverse * gain;
  const float steps = (x - origin) * amplified;
  return static_cast<uint8_t>(std::nearbyint(std::min(std::max(steps, 0.0f), levels)));
}

void EncodeSide(const KvGeometry& g, Side side, int bits, int capacity, const SideClip& clip, const float* x,
                int64_t row_stride, int tokens, uint8_t* out) {
  std::memset(out, 0, static_cast<size_t>(SideBytes(g, bits, capacity)));
  const int lanes = Lanes(g, side, capacity);
  if (bits == 16) {
    for (int t = 0; t < tokens; ++t) {
      for (int c = 0; c < g.head_dim; ++c) {
        const int place = PlaceOfBf16(Depth(side, t, c), Lane(side, t, c), lanes);
        const bf16_t value = FloatToBf16(x[t * row_stride + c]);
        std::memcpy(out + 2 * place, &value, sizeof(value));
      }
    }
    return;
  }

  struct Range {
    float lo = 0;
    float hi = 0;
    bool empty = true;
  };
  std::vector<Range> ranges(static_cast<size_t>(MetaGroups(g, bits)));
  for (int t = 0; t < tokens; ++t) {
    for (int c = 0; c < g.head_dim; ++c) {
      Range& range = ranges[static_cast<size_t>(PlaceOfMeta(g, side, bits, t, c))];
      const float value = Sanitize(x[t * row_stride + c]);
      range.lo = range.empty ? value : std::min(range.lo, value);
      range.hi = range.empty ? value : std::max(range.hi, value);
      range.empty = false;
    }
  }
  uint8_t* scales = out + CodeBytes(g, bits);
  uint8_t* minima = scales + 2 * MetaGroups(g, bits);
  for (size_t i = 0; i < ranges.size(); ++i) {
    if (ranges[i].empty) continue;
    const Group fitted = FitGroup(ranges[i].lo, ranges[i].hi, bits, clip.ratio);
    StoreFp16(scales + 2 * i, fitted.scale);
    StoreFp16(minima + 2 * i, fitted.minimum);
  }
  for (int t = 0; t < tokens; ++t) {
    for (int c = 0; c < g.head_dim; ++c) {
      const int group = PlaceOfMeta(g, side, bits, t, c);
      const Group fitted{LoadFp16(scales + 2 * group), LoadFp16(minima + 2 * group)};
      const CodePlace place = PlaceOfCode(Depth(side, t, c), Lane(side, t, c), lanes, bits);
      const int code = CodeOf(Sanitize(x[t * row_stride + c]), fitted, bits, clip.gain);
      out[place.byte] = static_cast<uint8_t>(out[place.byte] | code << place.shift);
    }
  }
}

}  // namespace

void EncodeBlockScalar(const KvGeometry& g, Format f, const ClipRatios& clip, const float* k, const float* v,
                       int64_t row_stride, int tokens, uint8_t* out, int capacity) {
  capacity = RoomOf(f, capacity);
  CHECK(tokens >= 1 && tokens <= capacity);
  CHECK(IsValid(clip));
  for (const Side side : {Side::kK, Side::kV}) {
    const int bits = Bits(f, side);
    EncodeSide(g, side, bits, capacity, ClipOf(g, clip, side, bits), side == Side::kK ? k : v, row_stride,
               tokens, out + SideOffset(g, f, side, capacity));
  }
}

void DecodeSideScalar(const KvGeometry& g, Format f, Side side, const uint8_t* block_head, int tokens,
                      float* out, int capacity) {
  capacity = RoomOf(f, capacity);
  CHECK(tokens >= 1 && tokens <= capacity);
  const int bits = Bits(f, side);
  const uint8_t* in = block_head + SideOffset(g, f, side, capacity);
  const uint8_t* scales = in + CodeBytes(g, bits);
  const uint8_t* minima = scales + 2 * MetaGroups(g, bits);
  for (int t = 0; t < tokens; ++t) {
    for (int c = 0; c < g.head_dim; ++c) {
      const int depth = Depth(side, t, c), lane = Lane(side, t, c), lanes = Lanes(g, side, capacity);
      float& value = out[t * g.head_dim + c];
      if (bits == 16) {
        value = Bf16ToFloat(LoadFp16(in + 2 * PlaceOfBf16(depth, lane, lanes)));
        continue;
      }
      const CodePlace place = PlaceOfCode(depth, lane, lanes, bits);
      const int code = in[place.byte] >> place.shift & ((1 << bits) - 1);
      const int group = PlaceOfMeta(g, side, bits, t, c);
      const float scale = Fp16ToFloat(LoadFp16(scales + 2 * group));
      if (bits == 8) {
        value = scale * E4m3ToFloat(static_cast<uint8_t>(code));
        continue;
      }
      const float scaled = scale * static_cast<float>(code);
      value = Fp16ToFloat(LoadFp16(minima + 2 * group)) + scaled;
    }
  }
}

void HadamardScalar(float* x, int head_dim) {
  for (int distance = 1; distance < head_dim; distance *= 2) {
    for (int i = 0; i < head_dim; ++i) {
      if (i & distance) continue;
      const float a = x[i], b = x[i + distance];
      x[i] = a + b;
      x[i + distance] = a - b;
    }
  }
  const float norm = static_cast<float>(1.0 / std::sqrt(static_cast<double>(head_dim)));
  for (int i = 0; i < head_dim; ++i) x[i] *= norm;
}

}  // namespace triaxial
