#include "base/failing_memory_testing.h"

#include <cstddef>
#include <cstdlib>
#include <new>

namespace triaxial {
namespace {

thread_local bool refusing = false;
thread_local int64_t until_first = 0;
thread_local int64_t left = 0;
thread_local int64_t refused = 0;

bool Refuses() {
  if (!refusing || --until_first > 0 || left == 0) return false;
  --left;
  ++refused;
  return true;
}

void* Allocate(std::size_t size, std::size_t alignment) {
  if (Refuses()) return nullptr;
  if (size == 0) size = 1;
  if (alignment <= alignof(std::max_align_t)) return std::malloc(size);
  return std::aligned_alloc(alignment, (size + alignment - 1) / alignment * alignment);
}

void* AllocateOrThrow(std::size_t size, std::size_t alignment) {
  void* memory = Allocate(size, alignment);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

}  // namespace

void RefuseMemory(int64_t first, int64_t count) {
  until_first = first;
  left = count;
  refused = 0;
  refusing = true;
}

int64_t StopRefusing() {
  refusing = false;
  return refused;
}

}  // namespace triaxial

// The others of the standard library call these.
void* operator new(std::size_t size) { return triaxial::AllocateOrThrow(size, 1); }
void* operator new[](std::size_t size) { return triaxial::AllocateOrThrow(size, 1); }
void* operator new(std::size_t size, const std::nothrow_t&) noexcept { return triaxial::Allocate(size, 1); }
void* operator new[](std::size_t size, const std::nothrow_t&) noexcept { return triaxial::Allocate(size, 1); }
void* operator new(std::size_t size, std::align_val_t alignment) {
  return triaxial::AllocateOrThrow(size, static_cast<std::size_t>(alignment));
}
void* operator new[](std::size_t size, std::align_val_t alignment) {
  return triaxial::AllocateOrThrow(size, static_cast<std::size_t>(alignment));
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete[](void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete[](void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete[](void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t, std::align_val_t) noexcept { std::free(memory); }
void operator delete[](void* memory, std::size_t, std::align_val_t) noexcept { std::free(memory); }
