// Matrix products by oneDNN: y = x W^T (+ bias) with a fused epilogue.
#ifndef TRIAXIAL_OPS_LINEAR_H_
#define TRIAXIAL_OPS_LINEAR_H_

#include <cstdint>
#include <memory>

#include "ops/element.h"

namespace triaxial {

// Whether the CPU multiplies BF16 natively (AVX-512-BF16 or AMX). Without it, products are to be made in F32.
bool HasBf16Products();

enum class Epilogue : uint8_t {
  kNone,
  kAdd,       // y += product; output must be F32
  kGeluTanh,  // y = gelu(product), tanh approximation
  kGeluErf,   // y = gelu(product), exact
};

struct LinearShape {
  int64_t in = 0;
  int64_t out = 0;
  Element input = Element::kF32;   // of x and W
  Element output = Element::kF32;  // of y
  Epilogue epilogue = Epilogue::kNone;
  bool bias = false;
  auto operator<=>(const LinearShape&) const = default;
};

// oneDNN primitives by shape and number of rows, shared by the layers of a model: made at first use, then
// kept. Not thread-safe. Throws dnnl::error where oneDNN refuses (only for lack of memory).
class LinearCache {
 public:
  LinearCache();
  ~LinearCache();

 private:
  friend class Linear;
  struct State;
  std::unique_ptr<State> state_;
};

// Weights in the one layout that oneDNN prefers for every number of rows. The cache must outlive it.
class Linear {
 public:
  Linear();
  Linear(Linear&&) noexcept;
  Linear& operator=(Linear&&) noexcept;
  ~Linear();
  // weights: [out][in] of shape.input, bias: [out] or null; both are copied. Throws std::bad_alloc.
  Linear(LinearCache* cache, const LinearShape& shape, const void* weights, const float* bias);

  // x: [rows][in] of shape.input, y: [rows][out] of shape.output; rows >= 0. Uses all compute threads.
  void Run(const void* x, int64_t rows, void* y) const;

  const LinearShape& shape() const { return shape_; }
  int64_t bytes() const { return bytes_; }  // of packed weights and bias

 private:
  struct Packed;
  LinearCache* cache_ = nullptr;
  LinearShape shape_;
  std::unique_ptr<Packed> packed_;
  int64_t bytes_ = 0;
};

}  // namespace triaxial

#endif  // TRIAXIAL_OPS_LINEAR_H_
