#ifndef TRIAXIAL_OPS_ELEMENT_H_
#define TRIAXIAL_OPS_ELEMENT_H_

#include <cstdint>

namespace triaxial {

// Element type of weights and of the matrices that products read. Sums are always F32.
enum class Element : uint8_t { kF32, kBf16 };

constexpr int64_t ByteSize(Element element) { return element == Element::kF32 ? 4 : 2; }

}  // namespace triaxial

#endif  // TRIAXIAL_OPS_ELEMENT_H_
