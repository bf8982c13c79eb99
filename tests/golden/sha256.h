// SHA-256 (FIPS 180-4) for tests whose references name pictures by their digest.
#ifndef TRIAXIAL_TESTS_GOLDEN_SHA256_H_
#define TRIAXIAL_TESTS_GOLDEN_SHA256_H_

#include <cstddef>
#include <cstdint>
#include <string>

namespace triaxial {

// Lower-case hexadecimal digest.
std::string Sha256(const uint8_t* data, size_t size);

}  // namespace triaxial

#endif  // TRIAXIAL_TESTS_GOLDEN_SHA256_H_
