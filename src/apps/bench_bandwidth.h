// What a GPU's memory moves, measured.
#ifndef TRIAXIAL_APPS_BENCH_BANDWIDTH_H_
#define TRIAXIAL_APPS_BENCH_BANDWIDTH_H_

#include <cuda_runtime_api.h>

#include <functional>

namespace triaxial::cuda {

// Seconds of what `record` puts on the stream, as a CUDA graph that is launched until `budget` seconds have
// passed; the fastest counts. Throws CudaError.
double GraphSeconds(double budget, const std::function<void(cudaStream_t)>& record);

// GB/s of a copy of 4 GiB (bytes read and written), and of a kernel that only reads.
double DeviceCopyGbPerS();
double DeviceReadGbPerS();

}  // namespace triaxial::cuda

#endif  // TRIAXIAL_APPS_BENCH_BANDWIDTH_H_
