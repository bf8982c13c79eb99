// Products of F32 matrices that are used once, by oneDNN; for weights see ops/linear.h.
#ifndef TRIAXIAL_OPS_MATMUL_H_
#define TRIAXIAL_OPS_MATMUL_H_

#include <cstdint>

namespace triaxial {

// c [m][n] = a [m][k] b [k][n], or c += that; rows lie lda, ldb and ldc floats apart. Runs on the compute
// threads, or on the caller's alone within a ParallelFor.
void MatMul(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb,
            bool add, float* c, int64_t ldc);
// c [m][n] = a [m][k] b^T, with b [n][k].
void MatMulTransposed(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b,
                      int64_t ldb, float* c, int64_t ldc);

}  // namespace triaxial

#endif  // TRIAXIAL_OPS_MATMUL_H_
