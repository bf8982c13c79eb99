// BF16 (1 sign, 8 exponent, 7 mantissa bits; range of float) and FP16 (1, 5, 10; largest 65504) as storage
// types. Conversions round to nearest, ties to even, and keep NaN and infinity; they are the same on every
// backend.
#ifndef TRIAXIAL_BASE_FLOAT16_H_
#define TRIAXIAL_BASE_FLOAT16_H_

#include <bit>
#include <cstdint>

namespace triaxial {

using bf16_t = uint16_t;
using fp16_t = uint16_t;

inline float Bf16ToFloat(bf16_t x) { return std::bit_cast<float>(static_cast<uint32_t>(x) << 16); }

inline bf16_t FloatToBf16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<bf16_t>((bits >> 16) | 0x40u);  // quiet NaN
  return static_cast<bf16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float Fp16ToFloat(fp16_t x) {
  const uint32_t sign = static_cast<uint32_t>(x & 0x8000u) << 16;
  const uint32_t magnitude = x & 0x7fffu;
  if (magnitude >= 0x7c00u) return std::bit_cast<float>(sign | 0x7f800000u | ((magnitude & 0x3ffu) << 13));
  // Scaling by 2^112 rebiases the exponent and makes FP16 subnormals exact.
  const float scaled = std::bit_cast<float>(magnitude << 13) * 0x1p112f;
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(scaled));
}

inline fp16_t FloatToFp16(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<fp16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<fp16_t>(sign | 0x7c00u);  // rounds past 65504
  if (magnitude < 0x38800000u) {  // subnormal or zero: adding 0.5 aligns the last bit to 2^-24
    const float aligned = std::bit_cast<float>(magnitude) + 0.5f;
    return static_cast<fp16_t>(sign | (std::bit_cast<uint32_t>(aligned) - 0x3f000000u));
  }
  return static_cast<fp16_t>(sign | ((magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13));
}

}  // namespace triaxial

#endif  // TRIAXIAL_BASE_FLOAT16_H_
