// Integers as files and hashes hold them: least significant byte first, at any address.
#ifndef TRIAXIAL_BASE_LITTLE_ENDIAN_H_
#define TRIAXIAL_BASE_LITTLE_ENDIAN_H_

#include <concepts>
#include <cstddef>
#include <cstdint>

namespace triaxial {

// Writes sizeof(T) bytes.
template <std::unsigned_integral T>
void StoreLittle(T value, uint8_t* to) {
  for (size_t i = 0; i < sizeof(T); ++i) to[i] = static_cast<uint8_t>(value >> (8 * i));
}

// Reads sizeof(T) bytes.
template <std::unsigned_integral T>
T LoadLittle(const uint8_t* from) {
  T value = 0;
  for (size_t i = 0; i < sizeof(T); ++i) value = static_cast<T>(value | static_cast<T>(from[i]) << (8 * i));
  return value;
}

}  // namespace triaxial

#endif  // TRIAXIAL_BASE_LITTLE_ENDIAN_H_
