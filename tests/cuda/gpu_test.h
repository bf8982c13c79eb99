// The few words that tests on a GPU need, so that they run where there is no test library: CASE defines a
// test, EXPECT reports and goes on. A program runs the cases whose name contains its argument, all without
// one. With TRIAXIAL_GPU_SMALL in the environment, cases take fewer and smaller sizes of the same kinds:
// under racecheck a kernel takes hundreds of times as long.
#ifndef TRIAXIAL_TESTS_CUDA_GPU_TEST_H_
#define TRIAXIAL_TESTS_CUDA_GPU_TEST_H_

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <string>
#include <utility>
#include <vector>

#include "ops/cuda/device.h"

namespace triaxial::cuda {

struct GpuCase {
  const char* name;
  void (*run)();
};
inline std::vector<GpuCase>& GpuCases() {
  static std::vector<GpuCase> cases;
  return cases;
}
inline bool SmallSizes() {
  static const bool small = std::getenv("TRIAXIAL_GPU_SMALL") != nullptr;
  return small;
}
// What a case goes through.
inline std::vector<int> Sizes(std::vector<int> all, std::vector<int> few) {
  return SmallSizes() ? std::move(few) : std::move(all);
}
inline int& GpuFailures() {
  static int failures = 0;
  return failures;
}
inline int RegisterGpuCase(const char* name, void (*run)()) {
  GpuCases().push_back({name, run});
  return 0;
}

#define CASE(name)                                                                                       \
  static void name();                                                                                    \
  [[maybe_unused]] static const int name##_registered_ = ::triaxial::cuda::RegisterGpuCase(#name, name); \
  static void name()

// EXPECT(condition, "printf format of what was found", ...).
#define EXPECT(condition, ...)                                             \
  do {                                                                     \
    if (!(condition)) {                                                    \
      ++::triaxial::cuda::GpuFailures();                                   \
      std::printf("%s:%d: expected %s; ", __FILE__, __LINE__, #condition); \
      std::printf(__VA_ARGS__);                                            \
      std::printf("\n");                                                   \
    }                                                                      \
  } while (0)

inline int RunGpuCases(int argc, char** argv) {
  std::string why;
  if (!FindDevice(&why)) {
    std::fprintf(stderr, "no GPU to test on: %s\n", why.c_str());
    return 1;
  }
  int failed = 0, ran = 0;
  for (const GpuCase& test : GpuCases()) {
    if (argc > 1 && std::strstr(test.name, argv[1]) == nullptr) continue;
    const int before = GpuFailures();
    const auto start = std::chrono::steady_clock::now();
    try {
      test.run();
      CUDA_OK(cudaDeviceSynchronize());
    } catch (const std::exception& error) {
      ++GpuFailures();
      std::printf("%s\n", error.what());
    }
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    const bool ok = GpuFailures() == before;
    std::printf("%s %s (%.2f s)\n", ok ? "ok    " : "FAILED", test.name, seconds);
    std::fflush(stdout);
    failed += !ok;
    ++ran;
  }
  std::printf("%d of %d cases failed\n", failed, ran);
  return failed == 0 && ran > 0 ? 0 : 1;
}

}  // namespace triaxial::cuda

#endif  // TRIAXIAL_TESTS_CUDA_GPU_TEST_H_
