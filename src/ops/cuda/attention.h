// Attention over the cache on the device: for decode (sequences with one row in the step) and for prefill
// (more rows), over blocks of any mix of formats. Same meaning as ops/attention.h: row i of a sequence
// attends to every token of its blocks, then causally to rows [row_begin, row_begin + i] of the step, whose K
// and V are BF16.
//
// The work is planned on the host, once a step: Plan() sorts the blocks of each sequence by format, cuts the
// work into items and copies index arrays into device memory that was allocated at construction. RunDecode
// and RunPrefill read them and allocate nothing, so both run once for each layer. RunDecode launches one
// kernel whose arguments and grid depend on nothing in the plan: it can be captured in a CUDA graph, and the
// graph replayed after other plans (rows that no planned sequence owns are not written). RunPrefill launches
// what the plan asks for. Codec kPaper, which is there to compare with, has no decode: sequences with one row
// are prefill.
#ifndef TRIAXIAL_OPS_CUDA_ATTENTION_H_
#define TRIAXIAL_OPS_CUDA_ATTENTION_H_

#include <cuda_runtime_api.h>

#include <cstdint>
#include <memory>
#include <span>

#include "ops/attention.h"

namespace triaxial::cuda {

// What a step may hold at most; a plan beyond is a CHECK.
struct AttentionLimits {
  int sequences = 0;   // of a step
  int64_t blocks = 0;  // of all sequences of a step together
  int rows = 0;        // of a step
};

// One layer's arguments; pointers are of the device, values BF16 bits. Strides are elements between rows, so
// that q, k and v may be columns of one matrix; multiples of 8, pointers aligned to 16 bytes.
struct LayerAttention {
  const uint8_t* arena = nullptr;  // the layer's region
  const uint16_t* q = nullptr;  // [rows][num_heads][head_dim]: after norm and RoPE, rotated if the codec is
  const uint16_t* k = nullptr;  // [rows][num_kv_heads][head_dim], likewise
  const uint16_t* v = nullptr;
  int64_t q_stride = 0;
  int64_t kv_stride = 0;
  uint16_t* out = nullptr;  // [rows][num_heads][head_dim] without gaps, rotated back if the codec is kRotated
  float scale = 0;          // of q.k, head_dim^-0.5
  // The kernel may begin to read the arena before the kernel launched ahead of it on the stream has ended
  // (programmatic dependent launch). For a caller whose kernels that write blocks of the plan end before that
  // one begins.
  bool overlap = false;
};

class Attention {
 public:
  // num_heads: a multiple of geometry.num_kv_heads, at most 16 times as many. Throws CudaError.
  Attention(const KvGeometry& geometry, int num_heads, const AttentionLimits& limits);
  ~Attention();
  Attention(const Attention&) = delete;
  Attention& operator=(const Attention&) = delete;

  // For what runs on `stream` from here on. The spans need not outlive the call; it waits for nothing unless
  // two earlier plans are still being copied, or that memory grows. Sequences with no rows are ignored.
  void Plan(std::span<const AttentionSequence> sequences, cudaStream_t stream);
  // Whether the last plan has anything to do for RunDecode, for RunPrefill.
  bool has_decode() const;
  bool has_prefill() const;
  // The planned sequences with one row; writes nothing if there are none.
  void RunDecode(const LayerAttention& layer, cudaStream_t stream);
  // The planned sequences with more rows.
  void RunPrefill(const LayerAttention& layer, cudaStream_t stream);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace triaxial::cuda

#endif  // TRIAXIAL_OPS_CUDA_ATTENTION_H_
