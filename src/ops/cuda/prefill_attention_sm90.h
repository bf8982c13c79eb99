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
  int row_table = 0;  // where the tiles of rows begin in it
  int row_tile_count = 0;
  uint8_t* row_tiles = nullptr;  // PrefillTileBytes(head_dim) for each of them and KV head
  const PrefillItem* items = nullptr;
  int item_count = 0;
};

// head_dim 64 or 128; at most `blocks` thread blocks, two for an item, take items in turn.
void LaunchPrefillSm90(const PrefillParams& params, int head_dim, int blocks, cudaStream_t stream);

}  // namespace triaxial::cuda

#endif  // TRIAXIAL_OPS_CUDA_PREFILL_ATTENTION_SM90_H_
