// What the vision tower needs beside products and norms, on the device; asynchronous on `stream`. BF16 values
// are uint16_t bits; matrices are row-major without gaps.
#ifndef TRIAXIAL_OPS_CUDA_VISION_H_
#define TRIAXIAL_OPS_CUDA_VISION_H_

#include <cuda_runtime_api.h>

#include <cstdint>

namespace triaxial::cuda {

// pixels[patch][channel][frame][i] = BF16 of values[channel][samples[patch][channel][i]], i < plane; values:
// [3][256].
void NormalizePixels(const uint8_t* samples, const float* values, int64_t patches, int frames, int plane,
                     uint16_t* pixels, cudaStream_t stream);

// Corners and factors by which a patch's position embedding is interpolated.
struct PatchPlace {
  int32_t row = 0;  // of the grid, for RoPE
  int32_t column = 0;
  int32_t corner[4] = {};  // rows of the table
  float factor[4] = {};
};
// x[p] = sum of table[corner] * factor; table: [positions][hidden] F32, x: [patches][hidden].
void EmbedPatchPositions(const PatchPlace* places, const float* table, int64_t patches, int64_t hidden,
                         float* x, cudaStream_t stream);

// Turns the heads of queries and keys in qkv [patches][3][heads][dim] in place: of the pairs (c, c + dim / 2)
// the first dim / 4 by the angles of the patch's row, the others by those of its column; cos, sin:
// [positions][dim / 4].
void RotateGrid(const PatchPlace* places, const float* cos, const float* sin, int64_t patches, int heads,
                int dim, uint16_t* qkv, cudaStream_t stream);

// Softmax attention of every row to every row. qkv: [rows][3][heads][dim], out: [rows][heads][dim]; dim is a
// multiple of 8, at most 128 (CudaError beyond).
void FullAttention(const uint16_t* qkv, int64_t rows, int heads, int dim, float scale, uint16_t* out,
                   cudaStream_t stream);

}  // namespace triaxial::cuda

#endif  // TRIAXIAL_OPS_CUDA_VISION_H_
