// What kernels see of the cache: plain page views and plain lists of stores. No tags, no policies, no
// sequences.
#ifndef TRIAXIAL_KV_VIEW_H_
#define TRIAXIAL_KV_VIEW_H_

#include <cstdint>

#include "kv/format.h"

namespace triaxial {

// One block as attention reads it. A tail is a kBf16 block with room for `capacity` tokens (a multiple of
// 16).
struct KvBlockRef {
  uint32_t unit_row = 0;
  uint8_t tokens = 0;  // 1..capacity (valid tokens, from the block's start)
  Format format = Format::kBf16;
  uint8_t capacity = kBlockTokens;
};

// Stores of one step, executed per layer in order, after that layer's attention has read the old state.
// Completes or extends a block: its first `from_tail` tokens come from the BF16 block at `tail_row`, the next
// `rows` from rows [row_begin, row_begin + rows) of the step's K and V.
//  - unit_row == tail_row (a BF16 block of one capacity): append in place at token `from_tail`.
//  - format kBf16 and unit_row != tail_row: the tail grows into a larger place, its tokens move along. The
//    places do not overlap.
//  - otherwise from_tail + rows == 64: encode all into unit_row.
// tail_row == unit_row where nothing is read from a tail, so stores of different tail_row are independent.
struct KvStore {
  uint32_t unit_row = 0;
  uint32_t tail_row = 0;
  int32_t row_begin = 0;
  uint8_t from_tail = 0;
  uint8_t rows = 0;
  Format format = Format::kBf16;
  uint8_t tail_capacity = kBlockTokens;  // of the block at tail_row
  uint8_t capacity = kBlockTokens;       // of the block at unit_row
};

// Re-quantizes a complete block (64 tokens) into another place, before the step's attention.
struct KvConvert {
  uint32_t from_row = 0;
  uint32_t to_row = 0;
  Format from = Format::kBf16;
  Format to = Format::kK2V2;
};

}  // namespace triaxial

#endif  // TRIAXIAL_KV_VIEW_H_
