// For tests: memory that is refused. Programs with failing_memory_testing.cc among their sources have the
// global operator new of it.
#ifndef TRIAXIAL_BASE_FAILING_MEMORY_TESTING_H_
#define TRIAXIAL_BASE_FAILING_MEMORY_TESTING_H_

#include <cstdint>

namespace triaxial {

// From now on the calling thread's allocation number `first` (counted from 1) and the `count` - 1 after it
// throw std::bad_alloc.
void RefuseMemory(int64_t first, int64_t count);
// No longer. How many were refused.
int64_t StopRefusing();

}  // namespace triaxial

#endif  // TRIAXIAL_BASE_FAILING_MEMORY_TESTING_H_
