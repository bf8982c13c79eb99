#include "base/parallel.h"

namespace triaxial {

int ComputeThreads() { return omp_get_max_threads(); }

void SetComputeThreads(int threads) { omp_set_num_threads(threads > 0 ? threads : omp_get_num_procs()); }

}  // namespace triaxial
