// What a backend that samples needs to know of one row of logits (engine/sampler.h has the rules).
#ifndef TRIAXIAL_OPS_TOKEN_DRAW_H_
#define TRIAXIAL_OPS_TOKEN_DRAW_H_

#include <cstdint>

namespace triaxial {

struct TokenDraw {
  double uniform = 0;     // in [0, 1): where in the distribution the token is taken
  float temperature = 0;  // below kGreedyBelow: the largest logit
  float top_p = 1;
  float min_p = 0;
  int32_t top_k = 0;    // 0: off
  bool logits = false;  // the row's logits are wanted too
};
inline constexpr float kGreedyBelow = 1e-5f;

}  // namespace triaxial

#endif  // TRIAXIAL_OPS_TOKEN_DRAW_H_
