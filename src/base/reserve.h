// Memory is asked for before anything changes, so that running out of it changes nothing.
#ifndef TRIAXIAL_BASE_RESERVE_H_
#define TRIAXIAL_BASE_RESERVE_H_

#include <algorithm>
#include <cstddef>
#include <vector>

namespace triaxial {

// Room for `size` elements in all. Unlike vector::reserve it at least doubles the room, so that asking for
// one more each time costs no more than push_back.
template <typename T>
void ReserveAtLeast(std::vector<T>* elements, size_t size) {
  if (elements->capacity() < size) elements->reserve(std::max(size, 2 * elements->capacity()));
}

}  // namespace triaxial

#endif  // TRIAXIAL_BASE_RESERVE_H_
