// E4M3 (1 sign, 4 exponent, 3 mantissa bits; largest 448, no infinity, 0x7f and 0xff are NaN) as a storage
// type. The same on every backend.
#ifndef TRIAXIAL_BASE_FLOAT8_H_
#define TRIAXIAL_BASE_FLOAT8_H_

#include <bit>
#include <cstdint>

namespace triaxial {

inline constexpr float kLargestE4m3 = 448.0f;

// Exact; NaN comes back as +-480.
inline float E4m3ToFloat(uint8_t x) {
  const uint32_t sign = static_cast<uint32_t>(x & 0x80u) << 24;
  // Scaling by 2^120 rebiases the exponent and makes subnormals exact.
  const float magnitude = std::bit_cast<float>(static_cast<uint32_t>(x & 0x7fu) << 20) * 0x1p120f;
  return std::bit_cast<float>(sign | std::bit_cast<uint32_t>(magnitude));
}

// Rounds to nearest, ties to even; what is too large becomes the largest, zero keeps its sign. `x` is a
// number.
inline uint8_t FloatToE4m3(float x) {
  const uint32_t bits = std::bit_cast<uint32_t>(x);
  const uint32_t sign = (bits >> 24) & 0x80u;
  const float absolute = std::bit_cast<float>(bits & 0x7fffffffu);
  const float bounded = absolute < kLargestE4m3 ? absolute : kLargestE4m3;
  const uint32_t magnitude = std::bit_cast<uint32_t>(bounded);
  if (bounded < 0x1p-6f) {  // subnormal or zero: adding 2^14 aligns the last bit to 2^-9
    return static_cast<uint8_t>(sign | (std::bit_cast<uint32_t>(bounded + 0x1p14f) - 0x46800000u));
  }
  return static_cast<uint8_t>(sign | ((magnitude - 0x3c000000u + 0x7ffffu + ((magnitude >> 20) & 1u)) >> 20));
}

}  // namespace triaxial

#endif  // TRIAXIAL_BASE_FLOAT8_H_
