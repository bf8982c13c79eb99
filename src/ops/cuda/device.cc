#include "ops/cuda/device.h"

#include <algorithm>

namespace triaxial::cuda {

void ThrowCudaError(cudaError_t error, const char* expression, const char* file, int line) {
  const std::string message = std::string("CUDA failed at ") + file + ":" + std::to_string(line) + " (" +
                              expression + "): " + cudaGetErrorString(error);
  if (error == cudaErrorMemoryAllocation) {
    cudaGetLastError();  // not sticky: what comes after is to start clean
    throw OutOfDeviceMemory(message);
  }
  throw CudaError(message);
}

bool FindDevice(std::string* why) {
  int count = 0;
  cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess && count == 0) error = cudaErrorNoDevice;
  cudaDeviceProp properties;
  if (error == cudaSuccess) error = cudaGetDeviceProperties(&properties, 0);
  if (error != cudaSuccess) {
    *why = cudaGetErrorString(error);
    cudaGetLastError();
    return false;
  }
  if (properties.major < 9) {
    *why = std::string(properties.name) + " has compute capability " + std::to_string(properties.major) +
           "." + std::to_string(properties.minor) + ", and 9.0 is the least that the kernels are written for";
    return false;
  }
  return true;
}

DeviceInfo CurrentDevice() {
  DeviceInfo info;
  int device = 0;
  CUDA_OK(cudaGetDevice(&device));
  cudaDeviceProp properties;
  CUDA_OK(cudaGetDeviceProperties(&properties, device));
  size_t free = 0, total = 0;
  CUDA_OK(cudaMemGetInfo(&free, &total));
  info.name = properties.name;
  info.multiprocessors = properties.multiProcessorCount;
  info.memory = static_cast<int64_t>(total);
  info.free = static_cast<int64_t>(free);
  return info;
}

DeviceBuffer::~DeviceBuffer() { cudaFree(data_); }

uint8_t* DeviceBuffer::Reserve(size_t bytes) {
  if (bytes > size_) {
    if (data_ != nullptr) CUDA_OK(cudaDeviceSynchronize());
    CUDA_OK(cudaFree(std::exchange(data_, nullptr)));
    size_ = 0;
    CUDA_OK(cudaMalloc(&data_, bytes));
    size_ = bytes;
  }
  return static_cast<uint8_t*>(data_);
}

PinnedBuffer::~PinnedBuffer() { cudaFreeHost(data_); }

uint8_t* PinnedBuffer::Reserve(size_t bytes) {
  if (bytes > size_) {
    if (data_ != nullptr) CUDA_OK(cudaDeviceSynchronize());
    CUDA_OK(cudaFreeHost(std::exchange(data_, nullptr)));
    size_ = 0;
    CUDA_OK(cudaMallocHost(&data_, bytes));
    size_ = bytes;
  }
  return static_cast<uint8_t*>(data_);
}

}  // namespace triaxial::cuda
