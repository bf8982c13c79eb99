// The choice of the next token on the device, by the rules of engine/sampler.h: temperature, top-k, top-p
// over what top-k left, min-p relative to the most probable token; ties go to the smaller token id; NaN
// counts as minus infinity.
#ifndef TRIAXIAL_OPS_CUDA_SAMPLE_H_
#define TRIAXIAL_OPS_CUDA_SAMPLE_H_

#include <cuda_runtime_api.h>

#include <cstdint>

#include "ops/token_draw.h"

namespace triaxial::cuda {

// tokens[r] = the token of logits[r], or -1 if no logit is above minus infinity. The tokens that the rules
// keep are walked best first if they are few, else in the order of their ids; the draw takes the first at
// which the sum of weights passes draws[r].uniform of the whole. The same logits and draw give the same
// token. All pointers are of the device; logits: [rows][vocab] F32.
void SampleTokens(const float* logits, int64_t rows, int vocab, const TokenDraw* draws, int32_t* tokens,
                  cudaStream_t stream);

}  // namespace triaxial::cuda

#endif  // TRIAXIAL_OPS_CUDA_SAMPLE_H_
