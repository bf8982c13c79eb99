// Matrix products by cuBLASLt: y = x W^T (+ bias) with a fused epilogue; BF16 or FP8 in, F32 sums.
#ifndef TRIAXIAL_OPS_CUDA_LINEAR_H_
#define TRIAXIAL_OPS_CUDA_LINEAR_H_

#include <cstdint>
#include <memory>
#include <span>

#include "ops/cuda/device.h"
#include "ops/linear.h"

namespace triaxial::cuda {

// Weights on the device: [shape.out][shape.in] BF16, or with `scales` ([shape.out]) e4m3 times the scale of
// the output channel (fp8_rows.h); bias [shape.out] of shape.output, or null. shape.input is kBf16 (what x
// is).
struct LinearWeights {
  LinearShape shape;
  const void* weights = nullptr;
  const void* bias = nullptr;
  const float* scales = nullptr;

  int64_t bytes() const { return shape.in * shape.out * (scales == nullptr ? 2 : 1); }  // of the matrix
};

// Handle, workspace and the algorithms chosen so far, by shape and number of rows. One stream at a time uses
// it.
class LinearRunner {
 public:
  LinearRunner();
  ~LinearRunner();
  LinearRunner(const LinearRunner&) = delete;
  LinearRunner& operator=(const LinearRunner&) = delete;

  // Room for the inputs of FP8 products of so many rows and columns; CUDA graphs of smaller ones are void
  // after it.
  void ReserveFp8(int64_t rows, int64_t columns);
  // x: [rows][in] BF16, y: [rows][out] of shape.output, on the device. The first call of a shape and number
  // of rows asks cuBLASLt for an algorithm (some tens of microseconds). kGeluErf is not a cuBLASLt epilogue:
  // CHECK. With FP8 weights x is quantized row by row first, into what ReserveFp8 made (CHECK).
  void Run(const LinearWeights& linear, const void* x, int64_t rows, void* y, cudaStream_t stream);

  // Times what cuBLASLt proposes for this number of rows and keeps the fastest. `layers` are weights of one
  // shape; they take turns, so that none is found in the L2 cache. Overwrites x and y; not to be captured in
  // a graph.
  void Tune(std::span<const LinearWeights> layers, void* x, int64_t rows, void* y, cudaStream_t stream);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace triaxial::cuda

#endif  // TRIAXIAL_OPS_CUDA_LINEAR_H_
