// Fused attention over a cache of mixed formats: for decode (one query row a sequence) and for prefill over
// an already quantized prefix (many rows). Compressed blocks are expanded at most one 64-token tile at a
// time, in registers or L1.
#ifndef TRIAXIAL_OPS_ATTENTION_H_
#define TRIAXIAL_OPS_ATTENTION_H_

#include <cstdint>
#include <span>

#include "kv/view.h"
#include "ops/element.h"

namespace triaxial {

// Rows of the step that belong to one sequence. Row i attends to every token of `blocks`, then causally to
// rows [row_begin, row_begin + i] of the step itself (whose K and V are still in full precision).
struct AttentionSequence {
  int32_t row_begin = 0;
  int32_t rows = 0;
  std::span<const KvBlockRef> blocks;
};

struct AttentionArgs {
  KvGeometry geometry;
  int num_heads = 0;               // query heads; a multiple of geometry.num_kv_heads
  float scale = 0;                 // of q.k, head_dim^-0.5
  const uint8_t* arena = nullptr;  // KvArena::LayerData(layer)
  const float* q = nullptr;        // [rows][num_heads][head_dim], rotated if the codec is
  const float* k = nullptr;        // [rows][num_kv_heads][head_dim], likewise
  const float* v = nullptr;
  float* out = nullptr;  // [rows][num_heads][head_dim], still rotated
  std::span<const AttentionSequence> sequences;
};

// The kernels for the CPU at hand, or those that every CPU has (what tests compare).
enum class AttentionPath { kFastest, kPortable };

// Splits long contexts over the compute threads and merges by (o, lse). Results do not depend on the number
// of threads. Keeps its scratch between calls.
//
// With `products` kBf16, sequences of many rows may be multiplied in BF16 where the CPU has a matrix unit for
// it (ops/attention_amx.h): within 2e-3 of the exact result. Else all is F32 or finer.
class Attention {
 public:
  explicit Attention(Element products = Element::kF32, AttentionPath path = AttentionPath::kFastest);
  ~Attention();
  Attention(const Attention&) = delete;
  Attention& operator=(const Attention&) = delete;
  void Run(const AttentionArgs& args);

 private:
  struct Scratch;
  Scratch* scratch_;
};

}  // namespace triaxial

#endif  // TRIAXIAL_OPS_ATTENTION_H_
