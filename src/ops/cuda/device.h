// What all CUDA code shares: errors, memory of the device, pinned memory of the host. Errors of the CUDA
// runtime are thrown as CudaError, as oneDNN throws its own; loading turns them into a Status, the engine
// fails the step.
#ifndef TRIAXIAL_OPS_CUDA_DEVICE_H_
#define TRIAXIAL_OPS_CUDA_DEVICE_H_

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <utility>

namespace triaxial::cuda {

class CudaError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};
// The memory that was asked for does not exist.
class OutOfDeviceMemory : public CudaError {
 public:
  using CudaError::CudaError;
};

[[noreturn]] void ThrowCudaError(cudaError_t error, const char* expression, const char* file, int line);
#define CUDA_OK(expression)                                                      \
  do {                                                                           \
    if (const cudaError_t _error = (expression); _error != cudaSuccess)          \
      ::triaxial::cuda::ThrowCudaError(_error, #expression, __FILE__, __LINE__); \
  } while (0)

// Whether there is a GPU that this build has code for; if not, `why` says what is missing.
bool FindDevice(std::string* why);
struct DeviceInfo {
  std::string name;
  int multiprocessors = 0;
  int64_t memory = 0;  // bytes
  int64_t free = 0;
};
DeviceInfo CurrentDevice();

// Device memory that grows on demand and is never shrunk. Not copied on growth. Growth waits for the device,
// so that no kernel loses what it works on.
class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  explicit DeviceBuffer(size_t bytes) { Reserve(bytes); }
  DeviceBuffer(DeviceBuffer&& other) noexcept
      : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  DeviceBuffer& operator=(DeviceBuffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(size_, other.size_);
    return *this;
  }
  ~DeviceBuffer();
  // At least `bytes`, aligned to 256.
  uint8_t* Reserve(size_t bytes);
  template <typename T>
  T* Reserve(int64_t count) {
    return reinterpret_cast<T*>(Reserve(static_cast<size_t>(count) * sizeof(T)));
  }
  template <typename T = uint8_t>
  T* data() const {
    return reinterpret_cast<T*>(data_);
  }
  size_t size() const { return size_; }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

// The same for pinned host memory, from which copies overlap with kernels.
class PinnedBuffer {
 public:
  PinnedBuffer() = default;
  PinnedBuffer(const PinnedBuffer&) = delete;
  PinnedBuffer& operator=(const PinnedBuffer&) = delete;
  ~PinnedBuffer();
  uint8_t* Reserve(size_t bytes);
  uint8_t* data() const { return static_cast<uint8_t*>(data_); }

 private:
  void* data_ = nullptr;
  size_t size_ = 0;
};

// A stream that does not wait for the default one.
class Stream {
 public:
  Stream() { CUDA_OK(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking)); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;
  ~Stream() { cudaStreamDestroy(stream_); }
  operator cudaStream_t() const { return stream_; }  // NOLINT: implicit by design
  void Synchronize() const { CUDA_OK(cudaStreamSynchronize(stream_)); }

 private:
  cudaStream_t stream_ = nullptr;
};

}  // namespace triaxial::cuda

#endif  // TRIAXIAL_OPS_CUDA_DEVICE_H_
