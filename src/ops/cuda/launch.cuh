// Programmatic dependent launch: a kernel is made ready, and may read what no kernel writes, while the one
// ahead of it on the stream still runs. Such a kernel calls WaitForEarlier() in every thread before it
// touches anything else.
#ifndef TRIAXIAL_OPS_CUDA_LAUNCH_CUH_
#define TRIAXIAL_OPS_CUDA_LAUNCH_CUH_

#include <utility>

#include "ops/cuda/device.h"

namespace triaxial::cuda {

// All that earlier kernels wrote is visible behind it.
__device__ inline void WaitForEarlier() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
// The next kernel may be made ready once all blocks have called it or ended.
__device__ inline void LetNextBegin() { asm volatile("griddepcontrol.launch_dependents;"); }

template <typename... Parameters, typename... Arguments>
void LaunchEarly(void (*kernel)(Parameters...), unsigned blocks, unsigned threads, cudaStream_t stream,
                 Arguments&&... arguments) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(threads);
  config.stream = stream;
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = 1;
  CUDA_OK(cudaLaunchKernelEx(&config, kernel, Parameters(std::forward<Arguments>(arguments))...));
}

}  // namespace triaxial::cuda

#endif  // TRIAXIAL_OPS_CUDA_LAUNCH_CUH_
