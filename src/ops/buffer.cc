#include "ops/buffer.h"

#include <sys/mman.h>

#include <cstdlib>
#include <new>

namespace triaxial {
namespace {

constexpr size_t kCacheLine = 64;
constexpr size_t kHugePage = size_t{2} << 20;

}  // namespace

Buffer::~Buffer() { std::free(data_); }

uint8_t* Buffer::Reserve(size_t bytes) {
  if (bytes <= size_) return data_;
  const size_t alignment = bytes >= kHugePage ? kHugePage : kCacheLine;
  const size_t rounded = (bytes + alignment - 1) / alignment * alignment;
  std::free(data_);
  size_ = 0;
  data_ = static_cast<uint8_t*>(std::aligned_alloc(alignment, rounded));
  if (data_ == nullptr) throw std::bad_alloc();
  // Weights are streamed once a step; without huge pages that is bound by page walks. Advice may be refused.
  if (alignment == kHugePage) (void)madvise(data_, rounded, MADV_HUGEPAGE);
  size_ = rounded;
  return data_;
}

}  // namespace triaxial
