#include "ops/cuda/kv_memory.h"

#include <memory>
#include <string>

#include "base/check.h"
#include "ops/cuda/layout.h"

namespace triaxial::cuda {

Result<std::unique_ptr<KvMemory>> CudaKvMemory::Create(const KvGeometry& geometry, int64_t bytes,
                                                       cudaStream_t stream) {
  ASSIGN_OR_RETURN(const int64_t rows, RowsOfMemory(geometry, bytes));
  std::unique_ptr<CudaKvMemory> memory(new CudaKvMemory(geometry, rows, stream));
  const auto size = static_cast<size_t>(memory->layer_bytes_ * geometry.num_layers);
  try {
    memory->bytes_.Reserve(size);
    // A move that found no memory would leave a compaction half done.
    memory->moved_.Reserve(
        static_cast<size_t>(UnitsOf(geometry, Format::kBf16) * UnitRowBytes(geometry) * geometry.num_layers));
    CUDA_OK(cudaMemsetAsync(memory->bytes_.data(), 0, size, stream));
  } catch (const OutOfDeviceMemory&) {
    return ResourceExhausted("the GPU has no " + std::to_string(size) +
                             " bytes left for the KV cache; lower --kv-memory");
  } catch (const CudaError& error) {
    return Internal(error.what());
  }
  return std::unique_ptr<KvMemory>(std::move(memory));
}

std::string_view CudaKvMemory::layout() const { return kLayoutName; }

void CudaKvMemory::Move(uint32_t from_row, uint32_t to_row, int rows) {
  CHECK(rows >= 0 && from_row + int64_t{rows} <= rows_ && to_row + int64_t{rows} <= rows_);
  if (rows == 0 || from_row == to_row) return;
  const auto row_bytes = static_cast<size_t>(UnitRowBytes(geometry_));
  const size_t width = static_cast<size_t>(rows) * row_bytes;
  const auto layers = static_cast<size_t>(geometry_.num_layers);
  const auto pitch = static_cast<size_t>(layer_bytes_);
  uint8_t* between = moved_.Reserve(width * layers);
  CUDA_OK(cudaMemcpy2DAsync(between, width, bytes_.data() + from_row * row_bytes, pitch, width, layers,
                            cudaMemcpyDeviceToDevice, stream_));
  CUDA_OK(cudaMemcpy2DAsync(bytes_.data() + to_row * row_bytes, pitch, between, width, width, layers,
                            cudaMemcpyDeviceToDevice, stream_));
}

Status CudaKvMemory::Read(uint32_t row, int rows, uint8_t* out) const {
  CHECK(rows >= 0 && row + int64_t{rows} <= rows_);
  const auto row_bytes = static_cast<size_t>(UnitRowBytes(geometry_));
  const size_t width = static_cast<size_t>(rows) * row_bytes;
  try {
    CUDA_OK(cudaMemcpy2DAsync(out, width, bytes_.data() + row * row_bytes, static_cast<size_t>(layer_bytes_),
                              width, static_cast<size_t>(geometry_.num_layers), cudaMemcpyDeviceToHost,
                              stream_));
    CUDA_OK(cudaStreamSynchronize(stream_));
  } catch (const CudaError& error) {
    return Internal(error.what());
  }
  return OkStatus();
}

Status CudaKvMemory::Write(uint32_t row, int rows, const uint8_t* in) {
  CHECK(rows >= 0 && row + int64_t{rows} <= rows_);
  const auto row_bytes = static_cast<size_t>(UnitRowBytes(geometry_));
  const size_t width = static_cast<size_t>(rows) * row_bytes;
  try {
    CUDA_OK(cudaMemcpy2DAsync(bytes_.data() + row * row_bytes, static_cast<size_t>(layer_bytes_), in, width,
                              width, static_cast<size_t>(geometry_.num_layers), cudaMemcpyHostToDevice,
                              stream_));
    CUDA_OK(cudaStreamSynchronize(stream_));
  } catch (const CudaError& error) {
    return Internal(error.what());
  }
  return OkStatus();
}

}  // namespace triaxial::cuda
