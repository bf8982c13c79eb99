// Blocks between the layouts "cpu-1" (kv/format.h) and "cuda-1" (ops/cuda/layout.h). Codes and metadata stay
// the same, only their order changes. Plain host code: for blocks that one backend stored and another reads,
// and for tests.
#ifndef TRIAXIAL_OPS_CUDA_LAYOUT_CONVERT_H_
#define TRIAXIAL_OPS_CUDA_LAYOUT_CONVERT_H_

#include <cstdint>

#include "kv/format.h"

namespace triaxial::cuda {

// One layer of a block: all heads, num_kv_heads * HeadBytes; `capacity` counts for BF16 only, 64 if it is
// complete. `in` and `out` may not overlap.
void CudaFromCpu(const KvGeometry& g, Format f, int capacity, const uint8_t* in, uint8_t* out);
void CpuFromCuda(const KvGeometry& g, Format f, int capacity, const uint8_t* in, uint8_t* out);

}  // namespace triaxial::cuda

#endif  // TRIAXIAL_OPS_CUDA_LAYOUT_CONVERT_H_
