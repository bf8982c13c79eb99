// The launch of decode attention; attention.cc plans and calls it.
#ifndef TRIAXIAL_OPS_CUDA_DECODE_ATTENTION_SM90_H_
#define TRIAXIAL_OPS_CUDA_DECODE_ATTENTION_SM90_H_

#include <cuda_runtime_api.h>

#include "ops/cuda/attention.h"
#include "ops/cuda/attention_plan.h"

namespace triaxial::cuda {

inline constexpr int kDecodeWarps = 8;
inline constexpr int kDecodeBlocksPerSm = 2;

struct DecodeParams {
  LayerAttention layer;
  int num_heads = 0;
  int num_kv_heads = 0;
  float scale_log2 = 0;  // layer.scale * log2(e)
  const KvBlockRef* table = nullptr;
  const DecodeItem* items = nullptr;  // ends with as many empty ones as thread blocks
  int* counters = nullptr;          // zero before the first launch, and left zero; [0] counts the items taken
  uint32_t* partial_out = nullptr;  // [slots][8][head_dim / 2] pairs of FP16, divided by the sum
  float2* partial_sums = nullptr;   // [slots][8]: maximum of the logits (base 2), sum of 2^(logit - maximum)
};

// Codec kRotated; head_dim 64 or 128; `blocks` thread blocks.
void LaunchDecodeSm90(const DecodeParams& params, int head_dim, int blocks, cudaStream_t stream);

}  // namespace triaxial::cuda

#endif  // TRIAXIAL_OPS_CUDA_DECODE_ATTENTION_SM90_H_
