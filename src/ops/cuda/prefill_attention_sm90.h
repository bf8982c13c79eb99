// The launch of prefill attention; attention.cc plans and calls it.
#ifndef TRIAXIAL_OPS_CUDA_PREFILL_ATTENTION_SM90_H_
#define TRIAXIAL_OPS_CUDA_PREFILL_ATTENTION_SM90_H_

#include <cuda_runtime_api.h>

#include "ops/cuda/attention.h"
#include "ops/cuda/attention_plan.h"

namespace triaxial::cuda {

struct PrefillParams {
  LayerAttention layer;
  Codec codec = Codec::kRotated;
  int num_heads = 0;
  int num_kv_heads = 0;
  float scale_log2 = 0;  // layer.scale * log2(e)
  const PrefillBlock* table = nullptr;
  // Of one pass.
  const PrefillItem* units = nullptr;
  int unit_count = 0;
  const PrefillItem* items = nullptr;
  int item_count = 0;
  uint8_t* tiles = nullptr;
};

// One pass, head_dim 64 or 128: its units become tiles; then at most `blocks` thread blocks take items in
// turn.
void LaunchPrefillSm90(const PrefillParams& params, int head_dim, const PrefillPass& pass, int blocks,
                       cudaStream_t stream);

}  // namespace triaxial::cuda

#endif  // TRIAXIAL_OPS_CUDA_PREFILL_ATTENTION_SM90_H_
