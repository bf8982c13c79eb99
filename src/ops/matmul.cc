#include "ops/matmul.h"

#include <oneapi/dnnl/dnnl.h>

#include "base/check.h"

namespace triaxial {

void MatMul(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b, int64_t ldb,
            bool add, float* c, int64_t ldc) {
  CHECK(dnnl_sgemm('N', 'N', m, n, k, 1, a, lda, b, ldb, add ? 1 : 0, c, ldc) == dnnl_success);
}

void MatMulTransposed(int64_t m, int64_t n, int64_t k, const float* a, int64_t lda, const float* b,
                      int64_t ldb, float* c, int64_t ldc) {
  CHECK(dnnl_sgemm('N', 'T', m, n, k, 1, a, lda, b, ldb, 0, c, ldc) == dnnl_success);
}

}  // namespace triaxial
