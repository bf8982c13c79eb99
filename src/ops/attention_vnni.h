// Integer kernels of fused attention for CPUs with AVX-512 VNNI: codes are never expanded. Queries and
// weights are in fixed point, 16 bits (24 where scores are so large that it matters), so a dot product with
// codes is exact in 32 bits; scales and minima are applied outside of it:
//   q.k = scale * (q.code) + minimum * sum(q)
//   sum p v = sum (p scale) (code - z) + sum p (minimum + z scale), z amid the codes, so that p's rounding
// errs by little more than the same part of v.
#ifndef TRIAXIAL_OPS_ATTENTION_VNNI_H_
#define TRIAXIAL_OPS_ATTENTION_VNNI_H_

#include "ops/attention_item.h"

namespace triaxial {

bool CpuHasVnni();

// Memory that will be read next and is brought into the cache meanwhile.
struct Prefetch {
  const uint8_t* data = nullptr;
  int bytes = 0;
};

// workspace.q to fixed point: once an item, before its first CodeScores.
void QuantizeQueries(const KvGeometry& g, int queries, AttentionWorkspace& workspace);

// workspace.scores of the 64 tokens of a K side.
void CodeScores(const KvGeometry& g, int bits, const uint8_t* side, int queries, Prefetch next,
                AttentionWorkspace& workspace);

// out = keep * out + scores (as weights; zero past `tokens`) times a V side.
void CodeValues(const KvGeometry& g, int bits, const uint8_t* side, int tokens, int queries, Prefetch next,
                AttentionWorkspace& workspace);

}  // namespace triaxial

#endif  // TRIAXIAL_OPS_ATTENTION_VNNI_H_
