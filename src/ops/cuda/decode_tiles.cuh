// The inner products of decode attention: one warp, one piece of a block, up to eight query heads. Scores are
// computed transposed, S^T = K Q^T (rows = tokens, columns = heads), and so is the output, O^T += V^T P^T
// (rows = channels), so that a piece of the cache is the A operand of the tensor cores, in the order in which
// it lies in memory (layout.h), and the heads of a group are the N = 8 of m16n8k16: nothing is padded.
//
// Codes of 2 and 4 bits become FP16 without conversion: a 16-bit pattern below 2048 is the FP16 number
// pattern * 2^-24 (subnormals and the first binade), exactly. A mask keeps a field and those below it in its
// byte: A_i = sum over j <= i of Weight(j) code_j. One logical operation makes two elements; what it keeps
// too much cancels, because q is differenced in advance (q_i / W_i - q_{i+1} / W_{i+1}) and the output
// afterwards.
//
// Scales and minima never touch an element: q.k = scale (q.code) + minimum sum(q), and a scale of V folds
// into P.
#ifndef TRIAXIAL_OPS_CUDA_DECODE_TILES_CUH_
#define TRIAXIAL_OPS_CUDA_DECODE_TILES_CUH_

#include "ops/cuda/layout.h"
#include "ops/cuda/ptx.cuh"

namespace triaxial::cuda {

// A piece of a side that a warp works on at once: all 64 tokens at 2 and 4 bits, 32 at 8, 16 at 16.
template <int kDim_, int kBits_>
struct Piece {
  static constexpr int kDim = kDim_, kBits = kBits_;
  static constexpr int kTiles = kBits == 16 ? 1 : kBits == 8 ? 2 : 4;  // of 16 tokens
  static constexpr int kTokens = 16 * kTiles;
  static constexpr int kSteps = kDim / 16;    // tiles of 16 channels
  static constexpr int kFields = 16 / kBits;  // tiles that a 16-byte load of a lane has a part of
  static constexpr int kChain = kBits < 8 ? 8 / kBits : 1;  // fields of a byte
  static constexpr bool kCodes = kBits < 8;
  // Beside BF16 values, P is the sum of two BF16 numbers: one alone would cost more than the rounding of the
  // output.
  static constexpr int kScores = kBits == 16 ? 2 : kTiles;
  static constexpr int kCodeBytes = kTokens * kDim * kBits / 8;
  static constexpr int kBytes = kCodeBytes + (kBits == 16 ? 0 : kTokens * 4);
  // Tensor cores cut off what a sum cannot hold instead of rounding, and sums of codes are far larger than
  // the output that is left when minima are added. So both are added up after so many pieces.
  static constexpr int kSettle = kBits == 2 ? 32 : 16;
  // What a code of field i counts in its 16-bit pattern; the upper byte is shifted down first.
  __host__ __device__ static constexpr int Weight(int i) { return kCodes ? 1 << (kBits * (i % kChain)) : 1; }
};

inline constexpr float kCodeUnit = 0x1p24f;  // of the pattern-to-FP16 identity
inline constexpr float kQueryScale = 16.0f;  // queries beside codes are FP16, times this: |q| < 2047
inline constexpr float kFp8ValueScale =
    16.0f;  // FP8 scales of V are small; keeps P * scale out of FP16's subnormals
inline constexpr float kMaxBias = 2.0f;         // P = 2^(x - m + kMaxBias)
inline constexpr uint32_t kMaxSumF16 = 0x5c00;  // 256: a lane's sum of P at which m is raised

// Accumulators of one warp. Lane 4g + t has rows g, g + 8 and heads 2t, 2t + 1.
template <int kDim>
struct Accumulator {
  float out[kDim / 16][4];
  float even[4];  // row 0: sum of P * minimum over even tiles, row 4: sum of P
  float odd[4];   // rows 8 and 12: the same over odd tiles
  float max[2];   // of the logits, base 2
};

// Queries as B operand, and the constants that turn a scale and a minimum into what they add to the logits.
template <int kDim>
struct Queries {
  uint32_t b[kDim / 16][2];
  uint32_t scale;
  uint32_t sum;
};

// Queries in shared memory: BF16, [kDim / 32][32 lanes][4 words], in the order of B fragments of two steps.
template <class K>
__device__ __forceinline__ void LoadQueries(uint32_t shared, float scale_log2, Queries<K::kDim>& q) {
  const int lane = threadIdx.x & 31, t = lane & 3;
  constexpr int kSteps = K::kSteps;
  uint32_t raw[kSteps][2];
#pragma unroll
  for (int j = 0; j < kSteps / 2; ++j) {
    const uint4 x = LoadShared16(shared + j * 512 + lane * 16);
    raw[2 * j][0] = x.x, raw[2 * j][1] = x.y, raw[2 * j + 1][0] = x.z, raw[2 * j + 1][1] = x.w;
  }
  if constexpr (K::kBits == 16) {
#pragma unroll
    for (int i = 0; i < kSteps; ++i) q.b[i][0] = raw[i][0], q.b[i][1] = raw[i][1];
    return;
  }
  float sum = 0;
#pragma unroll
  for (int i = 0; i < kSteps; ++i) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float2 v = UnpackBf16(raw[i][h]);
      sum += v.x + v.y;
      v.x *= kQueryScale / K::Weight(i), v.y *= kQueryScale / K::Weight(i);
      if ((i + 1) % K::kChain != 0) {
        const float2 next = UnpackBf16(raw[(i + 1) % kSteps][h]);
        v.x -= next.x * (kQueryScale / K::Weight(i + 1)), v.y -= next.y * (kQueryScale / K::Weight(i + 1));
      }
      q.b[i][h] = PackF16(v.x, v.y);
    }
  }
  // The factor of all scales, as a sum of FP16 numbers; metadata lie beside each other (scale, minimum), so
  // the odd rows of B belong to minima.
  float rest = scale_log2 * ((K::kCodes ? kCodeUnit : 1.0f) / kQueryScale), mine = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float part = __half2float(__float2half_rn(fminf(rest, 65504.0f)));
    if (i == t) mine = part;
    rest -= part;
  }
  q.scale = PackF16(mine, 0.0f);
  sum += __shfl_xor_sync(~0u, sum, 1);
  sum += __shfl_xor_sync(~0u, sum, 2);
  sum *= scale_log2;
  const float high = __half2float(__float2half_rn(sum));
  q.sum = PackF16(0.0f, t == 0 ? high : t == 1 ? sum - high : 0.0f);
}

// Fragments (four words) of field I of a load; `upper` is the load shifted down by eight bits in each half.
template <class S, int I>
__device__ __forceinline__ uint32_t Field(uint32_t word, uint32_t upper) {
  if constexpr (S::kBits == 16) {
    return word;
  } else if constexpr (S::kBits == 8) {
    return F16FromE4m3(static_cast<uint16_t>(I == 0 ? word & 0xffff : word >> 16));
  } else {
    constexpr int kInByte = I % S::kChain;
    constexpr uint32_t kLow = (1u << (S::kBits * (kInByte + 1))) - 1, kMask = kLow | kLow << 16;
    if constexpr (I == S::kFields - 1) return upper;
    if constexpr (I >= S::kChain) return upper & kMask;
    return word & kMask;
  }
}
__device__ __forceinline__ uint4 UpperBytes(const uint4& w) {
  return {__byte_perm(w.x, 0, 0x4341), __byte_perm(w.y, 0, 0x4341), __byte_perm(w.z, 0, 0x4341),
          __byte_perm(w.w, 0, 0x4341)};
}

// One 16-byte load of a lane and the tiles in it. Calls use(field, a0, a1, a2, a3) with field as a constant.
template <class S, int I = 0, class Use>
__device__ __forceinline__ void ForEachField(const uint4& w, const uint4& upper, const Use& use) {
  if constexpr (I < S::kFields) {
    use.template operator()<I>(Field<S, I>(w.x, upper.x), Field<S, I>(w.y, upper.y),
                               Field<S, I>(w.z, upper.z), Field<S, I>(w.w, upper.w));
    ForEachField<S, I + 1>(w, upper, use);
  }
}

// P^T of one piece, rows = tokens, packed by heads. `count` tokens are valid; the others get 0. Raises the
// maximum (and rescales what is accumulated) only when P would pass 2^8.
template <class K>
__device__ __forceinline__ void Scores(uint32_t piece, const Queries<K::kDim>& q, int count, float scale_log2,
                                       int lane, Accumulator<K::kDim>& acc, uint32_t (&p)[K::kScores][2]) {
  const int g = lane >> 2;
  constexpr int kTiles = K::kTiles;
  float s[kTiles][4];
#pragma unroll
  for (int j = 0; j < kTiles * K::kSteps / K::kFields; ++j) {
    const uint4 w = LoadShared16(piece + j * 512 + lane * 16);
    const uint4 upper = K::kCodes ? UpperBytes(w) : w;
    ForEachField<K>(w, upper, [&]<int I>(uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3) {
      const int tile = (j * K::kFields + I) / K::kSteps, step = (j * K::kFields + I) % K::kSteps;
      if constexpr (K::kBits == 16) {
        if (step == 0) s[tile][0] = s[tile][1] = s[tile][2] = s[tile][3] = 0;
        MmaBf16(s[tile], a0, a1, a2, a3, q.b[step][0], q.b[step][1]);
      } else if (step == 0) {
        MmaF16Zero(s[tile], a0, a1, a2, a3, q.b[step][0], q.b[step][1]);
      } else {
        MmaF16(s[tile], a0, a1, a2, a3, q.b[step][0], q.b[step][1]);
      }
    });
  }
  const uint32_t meta = piece + K::kCodeBytes + g * 16;
  uint4 m = {};
  // x = logits of tile k plus a constant of the head; m has the metadata of tiles 2j and 2j + 1.
  const auto logits = [&](int k, float c0, float c1, float(&x)[4]) {
    if constexpr (K::kBits == 16) {
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = fmaf(s[k][i], scale_log2, i & 1 ? c1 : c0);
    } else {
      if (!(k & 1)) m = LoadShared16(meta + k / 2 * 128);
      const uint32_t a0 = k & 1 ? m.z : m.x, a1 = k & 1 ? m.w : m.y;
      float c[4];
      MmaF16K8(c, a0, a1, q.scale, 0.0f, 0.0f);
      if constexpr (K::kCodes) {
        MmaF16K8(x, a0, a1, q.sum, c0, c1);
      } else {
        x[0] = x[2] = c0, x[1] = x[3] = c1;
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = fmaf(s[k][i], c[i], x[i]);
    }
  };
  const auto exponentials = [&] {
    const float c0 = kMaxBias - acc.max[0], c1 = kMaxBias - acc.max[1];
    if constexpr (K::kBits == 16) {
      float x[4];
      logits(0, c0, c1, x);
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = g + i / 2 * 8 < count ? Exp2(x[i]) : 0.0f;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        p[0][i] = PackBf16(x[2 * i], x[2 * i + 1]);
        const float2 high = UnpackBf16(p[0][i]);
        p[1][i] = PackBf16(x[2 * i] - high.x, x[2 * i + 1] - high.y);
      }
      return !(fmaxf(x[0] + x[2], x[1] + x[3]) <= 256.0f);
    } else {
#pragma unroll
      for (int k = 0; k < kTiles; ++k) {
        float x[4];
        logits(k, c0, c1, x);
        p[k][0] = PackF16(Exp2(x[0]), Exp2(x[1])), p[k][1] = PackF16(Exp2(x[2]), Exp2(x[3]));
      }
      if (count < K::kTokens) {
#pragma unroll
        for (int k = 0; k < kTiles; ++k) {
          if (k * 16 + g >= count) p[k][0] = 0;
          if (k * 16 + g + 8 >= count) p[k][1] = 0;
        }
      }
      uint32_t sum = AddF16(p[0][0], p[0][1]);
#pragma unroll
      for (int k = 1; k < kTiles; ++k) sum = AddF16(sum, AddF16(p[k][0], p[k][1]));
      return (sum & 0xffff) > kMaxSumF16 || (sum >> 16) > kMaxSumF16;
    }
  };
  if (!__any_sync(~0u, exponentials())) return;
  float x0 = -INFINITY, x1 = -INFINITY;
#pragma unroll
  for (int k = 0; k < kTiles; ++k) {
    float x[4];
    logits(k, 0.0f, 0.0f, x);
    if (k * 16 + g < count) x0 = fmaxf(x0, x[0]), x1 = fmaxf(x1, x[1]);
    if (k * 16 + g + 8 < count) x0 = fmaxf(x0, x[2]), x1 = fmaxf(x1, x[3]);
  }
#pragma unroll
  for (int d = 4; d < 32; d *= 2) {
    x0 = fmaxf(x0, __shfl_xor_sync(~0u, x0, d));
    x1 = fmaxf(x1, __shfl_xor_sync(~0u, x1, d));
  }
  x0 = fmaxf(acc.max[0], x0), x1 = fmaxf(acc.max[1], x1);
  const float f0 = Exp2(acc.max[0] - x0), f1 = Exp2(acc.max[1] - x1);
  acc.max[0] = x0, acc.max[1] = x1;
#pragma unroll
  for (int i = 0; i < K::kSteps; ++i)
    acc.out[i][0] *= f0, acc.out[i][1] *= f1, acc.out[i][2] *= f0, acc.out[i][3] *= f1;
  acc.even[0] *= f0, acc.even[1] *= f1, acc.odd[2] *= f0, acc.odd[3] *= f1;
  exponentials();
}

// O^T += V^T P^T of one piece. `constants`: this lane's 16 bytes of a row of A: FP16 ones for row 4, zeros
// for others.
template <class V>
__device__ __forceinline__ void Values(uint32_t piece, uint32_t constants, int lane,
                                       const uint32_t (&p)[V::kScores][2], Accumulator<V::kDim>& acc) {
  const int g = lane >> 2, t = lane & 3;
  const uint32_t scales = piece + V::kCodeBytes + t * 16;
  const uint32_t minima = V::kCodes && g == 0 ? scales + 64 : constants;
  const uint32_t minima_step = V::kCodes && g == 0 ? 128 : 0;
  uint4 w = {}, upper = {}, z = {}, s = {};
  if constexpr (V::kBits == 16) {
    const uint32_t one = g == 4 ? 0x3f803f80u : 0u;
    const uint32_t high0 = Transpose8x8(p[0][0]), high1 = Transpose8x8(p[0][1]);
    const uint32_t low0 = Transpose8x8(p[1][0]), low1 = Transpose8x8(p[1][1]);
    MmaBf16(acc.even, one, 0, one, 0, high0, high1);
    MmaBf16(acc.even, one, 0, one, 0, low0, low1);
#pragma unroll
    for (int i = 0; i < V::kSteps; ++i) {
      w = LoadShared16(piece + i * 512 + lane * 16);
      MmaBf16(acc.out[i], w.x, w.y, w.z, w.w, high0, high1);
      MmaBf16(acc.out[i], w.x, w.y, w.z, w.w, low0, low1);
    }
  } else {
#pragma unroll
    for (int k = 0; k < V::kTiles; ++k) {
      uint32_t b0 = Transpose8x8(p[k][0]), b1 = Transpose8x8(p[k][1]);
      if (!(k & 1)) z = LoadShared16(minima + k / 2 * minima_step), s = LoadShared16(scales + k / 2 * 128);
      MmaF16(k & 1 ? acc.odd : acc.even, z.x, z.y, z.z, z.w, b0, b1);
      b0 = MulF16(b0, k & 1 ? s.z : s.x), b1 = MulF16(b1, k & 1 ? s.w : s.y);
      if constexpr (!V::kCodes) {
        const uint32_t unit = PackF16(kFp8ValueScale, kFp8ValueScale);
        b0 = MulF16(b0, unit), b1 = MulF16(b1, unit);
      }
#pragma unroll
      for (int first = k * V::kSteps / V::kFields * V::kFields; first < (k + 1) * V::kSteps;
           first += V::kFields) {
        if (first >= k * V::kSteps) {
          w = LoadShared16(piece + first / V::kFields * 512 + lane * 16);
          if constexpr (V::kCodes) upper = UpperBytes(w);
        }
        ForEachField<V>(w, upper, [&]<int I>(uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3) {
          const int step = first + I - k * V::kSteps;
          if (step >= 0 && step < V::kSteps) MmaF16(acc.out[step], a0, a1, a2, a3, b0, b1);
        });
      }
    }
  }
}

// From true units to those of V's accumulators and back. Finish also adds what minima contribute.
template <class V>
__device__ __forceinline__ void BeginValues(Accumulator<V::kDim>& acc) {
  if constexpr (V::kBits == 16) return;
#pragma unroll
  for (int i = 0; i < V::kSteps; ++i) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      acc.out[i][c] *= V::kCodes ? V::Weight(i) / kCodeUnit : kFp8ValueScale;
      if (i % V::kChain != 0) acc.out[i][c] += acc.out[i - 1][c];
    }
  }
}
template <class V>
__device__ __forceinline__ void FinishValues(Accumulator<V::kDim>& acc) {
  const int lane = threadIdx.x & 31, t = lane & 3;
  acc.even[0] += acc.odd[2], acc.even[1] += acc.odd[3];
  acc.odd[2] = acc.odd[3] = 0;
  if constexpr (V::kBits == 16) return;
  const float z0 = __shfl_sync(~0u, acc.even[0], t), z1 = __shfl_sync(~0u, acc.even[1], t);
#pragma unroll
  for (int i = V::kSteps - 1; i >= 0; --i) {
    const float factor = V::kCodes ? kCodeUnit / V::Weight(i) : 1.0f / kFp8ValueScale;
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      if (i % V::kChain != 0) acc.out[i][c] -= acc.out[i - 1][c];
      acc.out[i][c] = fmaf(acc.out[i][c], factor, c & 1 ? z1 : z0);
    }
  }
  if (lane < 16) acc.even[0] = acc.even[1] = 0;
}

// After piece number `k` of a warp.
template <class V>
__device__ __forceinline__ void SettleValues(int k, Accumulator<V::kDim>& acc) {
  if (k % V::kSettle != V::kSettle - 1) return;
  FinishValues<V>(acc);
  BeginValues<V>(acc);
}

}  // namespace triaxial::cuda

#endif  // TRIAXIAL_OPS_CUDA_DECODE_TILES_CUH_
