// Softmax attention of every row to every row, as the vision tower needs it within an image.
#ifndef TRIAXIAL_OPS_FULL_ATTENTION_H_
#define TRIAXIAL_OPS_FULL_ATTENTION_H_

#include <cstdint>
#include <memory>

#include "ops/element.h"

namespace triaxial {

// Works on tiles of query rows against all keys, so that scores take some megabytes however large the image.
// Keeps its scratch and its primitives (for the last few numbers of rows). Not thread-safe.
class FullAttention {
 public:
  FullAttention();
  ~FullAttention();
  // q, k, v: [heads][rows][head_dim] of `type`, q scaled already. out: [rows][heads * head_dim] of `type`.
  // Uses all compute threads.
  void Run(int64_t rows, int heads, int head_dim, Element type, const void* q, const void* k, const void* v,
           void* out);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace triaxial

#endif  // TRIAXIAL_OPS_FULL_ATTENTION_H_
