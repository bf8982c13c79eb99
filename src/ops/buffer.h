// Memory of operators: aligned to cache lines, grown on demand and kept, never shrunk.
#ifndef TRIAXIAL_OPS_BUFFER_H_
#define TRIAXIAL_OPS_BUFFER_H_

#include <cstddef>
#include <cstdint>
#include <utility>

namespace triaxial {

// Not copied on growth: contents are undefined after a Reserve that grew. Large ones ask for huge pages.
class Buffer {
 public:
  Buffer() = default;
  Buffer(Buffer&& other) noexcept : data_(std::exchange(other.data_, nullptr)), size_(other.size_) {}
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~Buffer();

  // At least `bytes`; throws std::bad_alloc.
  uint8_t* Reserve(size_t bytes);
  // At least `count` values of T.
  template <typename T>
  T* Reserve(int64_t count) {
    return reinterpret_cast<T*>(Reserve(static_cast<size_t>(count) * sizeof(T)));
  }
  uint8_t* data() const { return data_; }

 private:
  uint8_t* data_ = nullptr;
  size_t size_ = 0;
};

}  // namespace triaxial

#endif  // TRIAXIAL_OPS_BUFFER_H_
