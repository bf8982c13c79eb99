// The KV cache's bytes in device memory, in layout "cuda-1": num_layers regions of unit rows, as KvArena's.
#ifndef TRIAXIAL_OPS_CUDA_KV_MEMORY_H_
#define TRIAXIAL_OPS_CUDA_KV_MEMORY_H_

#include <memory>

#include "kv/arena.h"
#include "ops/cuda/device.h"
#include "ops/cuda/kv_store.h"

namespace triaxial::cuda {

class CudaKvMemory final : public KvMemory {
 public:
  // Errors as KvArena::Create. Copies run on `stream`, which must outlive it, after what was asked for there
  // before.
  static Result<std::unique_ptr<KvMemory>> Create(const KvGeometry& geometry, int64_t bytes,
                                                  cudaStream_t stream);

  const KvGeometry& geometry() const override { return geometry_; }
  int64_t total_rows() const override { return rows_; }
  std::string_view layout() const override;
  void Move(uint32_t from_row, uint32_t to_row, int rows) override;
  Status Read(uint32_t row, int rows, uint8_t* out) const override;
  Status Write(uint32_t row, int rows, const uint8_t* in) override;

  CacheRegion region() const { return {bytes_.data(), layer_bytes_, geometry_.num_layers}; }

 private:
  CudaKvMemory(const KvGeometry& geometry, int64_t rows, cudaStream_t stream)
      : geometry_(geometry), rows_(rows), layer_bytes_(rows * UnitRowBytes(geometry)), stream_(stream) {}

  KvGeometry geometry_;
  int64_t rows_;
  int64_t layer_bytes_;
  cudaStream_t stream_;
  DeviceBuffer bytes_;
  DeviceBuffer moved_;  // between the places of a move, which may overlap
};

}  // namespace triaxial::cuda

#endif  // TRIAXIAL_OPS_CUDA_KV_MEMORY_H_
