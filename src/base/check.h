// CHECK guards our own invariants. Input from outside must never reach one: use Status for that.
#ifndef TRIAXIAL_BASE_CHECK_H_
#define TRIAXIAL_BASE_CHECK_H_

namespace triaxial {
[[noreturn]] void CheckFailed(const char* file, int line, const char* expression);
}  // namespace triaxial

#define CHECK(expression) \
  (static_cast<bool>(expression) ? void(0) : ::triaxial::CheckFailed(__FILE__, __LINE__, #expression))

#endif  // TRIAXIAL_BASE_CHECK_H_
