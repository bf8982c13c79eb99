// The inverse of layout.h: which elements a 32-bit word of a side holds, for kernels that read and write
// whole words.
#ifndef TRIAXIAL_OPS_CUDA_ELEMENT_AT_H_
#define TRIAXIAL_OPS_CUDA_ELEMENT_AT_H_

#include "ops/cuda/layout.h"

namespace triaxial::cuda {

struct ElementPlace {
  int token;
  int channel;
};

// Codes come in 16-byte chunks of four words. Number of chunks of a side, and where a chunk lies in it.
TRIAXIAL_HOST_DEVICE constexpr int ChunksOf(int head_dim, int bits, int capacity) {
  return (bits == 16 ? capacity : kBlockTokens) * head_dim * bits / 128;
}
TRIAXIAL_HOST_DEVICE constexpr int ChunkOffset(int head_dim, int bits, int chunk) {
  if (bits != 8) return chunk * 16;
  const int half = kFp8HalfTokens * head_dim / 16;  // an FP8 side has metadata in its middle
  return chunk * 16 + chunk / half * (kFp8HalfTokens * 4);
}

// Element number `item` of a word, at bit item * bits of it: 32 / bits of them.
TRIAXIAL_HOST_DEVICE constexpr ElementPlace ElementAt(int head_dim, int bits, Side side, int chunk, int word,
                                                      int item) {
  const int fields = 16 / bits;
  const int lane = chunk % 32;
  // At 8 bits the halves of a word are tiles and their bytes columns; else the halves are columns.
  const int field = bits == 8 ? item / 2 : item % fields;
  const int column_bit = bits == 8 ? item % 2 : item / fields;
  const int tile = chunk / 32 * fields + field;
  const int row = lane / 4 + word % 2 * 8;
  const int column = lane % 4 * 2 + word / 2 * 8 + column_bit;
  const int token = tile / (head_dim / 16) * kTileTokens, channel = tile % (head_dim / 16) * 16;
  return side == Side::kK ? ElementPlace{token + row, channel + column}
                          : ElementPlace{token + column, channel + row};
}

}  // namespace triaxial::cuda

#endif  // TRIAXIAL_OPS_CUDA_ELEMENT_AT_H_
