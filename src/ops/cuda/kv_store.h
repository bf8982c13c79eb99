// The write path of the cache on the device: the same bytes as ops/kv_store.h, in layout "cuda-1". Pointers
// are of the device, K and V of a step BF16. Every function is one launch, whatever the number of sequences
// and blocks, and reads its lists on the device, so that a CUDA graph can be replayed with other lists.
#ifndef TRIAXIAL_OPS_CUDA_KV_STORE_H_
#define TRIAXIAL_OPS_CUDA_KV_STORE_H_

#include <cuda_runtime_api.h>

#include <cstdint>
#include <span>
#include <vector>

#include "kv/codec.h"
#include "kv/view.h"

namespace triaxial::cuda {

// All layers of a cache: layer l begins at data + l * layer_bytes.
struct CacheRegion {
  uint8_t* data = nullptr;
  int64_t layer_bytes = 0;
  int layers = 1;
};

// Where a row's K and V are put in a tail, at once.
struct RowPlace {
  static constexpr uint32_t kNone = UINT32_MAX;
  uint32_t unit_row = kNone;  // of a BF16 block; kNone: they are not stored yet
  uint8_t capacity = 0;       // of that block
  uint8_t token = 0;          // 0 zeroes the block's other places
};

// From the fused product of queries, keys and values to what attention reads, for all rows of a step: RMSNorm
// of each head of Q and K, RoPE of pairs (c, c + head_dim / 2), Hadamard of all heads if the codec is
// rotated, BF16, and the rows that `places` names into their tails.
struct FinishQkvArgs {
  KvGeometry geometry;
  int num_heads = 0;
  int64_t rows = 0;
  const float* qkv = nullptr;     // [rows][num_heads + 2 num_kv_heads][head_dim]: queries, keys, values
  const float* q_norm = nullptr;  // [head_dim], likewise k_norm
  const float* k_norm = nullptr;
  float eps = 0;
  const float* cos = nullptr;  // [rows][head_dim / 2]
  const float* sin = nullptr;
  uint16_t* out = nullptr;           // as qkv
  uint8_t* arena_layer = nullptr;    // with places
  const RowPlace* places = nullptr;  // [rows], or null
};
void FinishQkv(const FinishQkvArgs& args, cudaStream_t stream);

// A step's stores as the device takes them: those of one tail one after the other, in their order.
struct StoreList {
  std::vector<KvStore> stores;
  std::vector<int32_t> groups;  // number of groups, then where each begins, then where the last ends
};
// KvStore::row_begin of stores whose rows were put into their places of unit_row by FinishQkv.
inline constexpr int32_t kRowsInPlace = -1;

// Stores of steps of any kind, to be run for each layer after its attention.
void ListStores(std::span<const KvStore> stores, StoreList* list);
// Stores of a step that appends one row to each of its sequences: where FinishQkv puts that row
// (places[row_begin], others are left alone), and what is left to do for all layers at once at the end of the
// step, as nothing of it is read by that step.
void SplitStores(std::span<const KvStore> stores, std::span<RowPlace> places, StoreList* at_the_end);

// Runs the groups [0, groups[0]) of a list, of which there are at most `max_groups`. k, v:
// [rows][num_kv_heads] [head_dim] with rows kv_stride apart, of the one layer of `cache`; they are not read
// by stores that read no rows.
void StoreKv(const KvGeometry& g, const ClipRatios& clip, const CacheRegion& cache, const uint16_t* k,
             const uint16_t* v, int64_t kv_stride, const KvStore* stores, const int32_t* groups,
             int max_groups, cudaStream_t stream);

// Runs conversions [0, *count) for all layers, of which there are at most `max_converts`. A conversion is to
// another place, or, to fewer bytes, in place (to_row == from_row); different conversions may not overlap.
void ConvertKv(const KvGeometry& g, const ClipRatios& clip, const CacheRegion& cache,
               const KvConvert* converts, const int32_t* count, int max_converts, cudaStream_t stream);

}  // namespace triaxial::cuda

#endif  // TRIAXIAL_OPS_CUDA_KV_STORE_H_
