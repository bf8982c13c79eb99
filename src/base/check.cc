#include "base/check.h"

#include <cstdio>
#include <cstdlib>

namespace triaxial {

void CheckFailed(const char* file, int line, const char* expression) {
  std::fprintf(stderr, "triaxial: bug at %s:%d: CHECK(%s) failed; please report it\n", file, line,
               expression);
  std::fflush(stderr);
  std::abort();
}

}  // namespace triaxial
