// Arithmetic on sizes that come from files or clients.
#ifndef TRIAXIAL_BASE_CHECKED_MATH_H_
#define TRIAXIAL_BASE_CHECKED_MATH_H_

#include <cstdint>

namespace triaxial {

// Each returns false, leaving *out unspecified, when the exact result does not fit.
inline bool CheckedAdd(uint64_t a, uint64_t b, uint64_t* out) { return !__builtin_add_overflow(a, b, out); }
inline bool CheckedMul(uint64_t a, uint64_t b, uint64_t* out) { return !__builtin_mul_overflow(a, b, out); }

constexpr int64_t CeilDiv(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace triaxial

#endif  // TRIAXIAL_BASE_CHECKED_MATH_H_
