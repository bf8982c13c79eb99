#include "apps/bench_trace.h"

#include <cupti.h>
#include <cxxabi.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdlib>
#include <mutex>

namespace triaxial::cuda {
namespace {

// CUPTI is part of the toolkit, not of the driver: it is looked for when it is needed.
struct Cupti {
  decltype(&cuptiActivityRegisterCallbacks) register_callbacks = nullptr;
  decltype(&cuptiActivityEnable) enable = nullptr;
  decltype(&cuptiActivityDisable) disable = nullptr;
  decltype(&cuptiActivityFlushAll) flush = nullptr;
  decltype(&cuptiActivityGetNextRecord) next = nullptr;

  bool Load() {
    void* library = nullptr;
    for (const char* name :
         {"libcupti.so.13", "libcupti.so.12", "libcupti.so", "/usr/local/cuda/lib64/libcupti.so",
          "/usr/local/cuda/extras/CUPTI/lib64/libcupti.so"}) {
      if (library == nullptr) library = dlopen(name, RTLD_NOW | RTLD_LOCAL);
    }
    const auto find = [library](auto* function, const char* name) {
      if (library != nullptr) *reinterpret_cast<void**>(function) = dlsym(library, name);
      return *function != nullptr;
    };
    return find(&register_callbacks, "cuptiActivityRegisterCallbacks") &&
           find(&enable, "cuptiActivityEnable") && find(&disable, "cuptiActivityDisable") &&
           find(&flush, "cuptiActivityFlushAll") && find(&next, "cuptiActivityGetNextRecord");
  }
};

Cupti& Library() {
  static Cupti cupti;
  return cupti;
}

constexpr size_t kBufferBytes = size_t{1} << 20;
constexpr size_t kAlignment = 8;
std::mutex mutex;
std::vector<TracedKernel> traced;

std::string ShortName(const char* name) {
  if (name == nullptr) return "unknown";
  int status = 0;
  char* readable = abi::__cxa_demangle(name, nullptr, nullptr, &status);
  std::string text = status == 0 && readable != nullptr ? readable : name;
  std::free(readable);
  // Without the arguments, which begin at the last parenthesis of depth 0.
  int depth = 0;
  for (size_t i = text.size(); i-- > 0;) {
    if (text[i] == ')' || text[i] == '>') ++depth;
    if (text[i] == '(' || text[i] == '<') --depth;
    if (depth == 0 && text[i] == '(') {
      text.resize(i);
      break;
    }
  }
  if (text.starts_with("void ")) text.erase(0, 5);
  return text;
}

void CUPTIAPI GiveBuffer(uint8_t** buffer, size_t* size, size_t* max_records) {
  *buffer = static_cast<uint8_t*>(std::aligned_alloc(kAlignment, kBufferBytes));
  *size = kBufferBytes;
  *max_records = 0;
}

void CUPTIAPI TakeBuffer(CUcontext, uint32_t, uint8_t* buffer, size_t, size_t valid) {
  const std::lock_guard lock(mutex);
  // Later versions of a record only add to its end.
  CUpti_Activity* record = nullptr;
  while (valid > 0 && Library().next(buffer, valid, &record) == CUPTI_SUCCESS) {
    if (record->kind == CUPTI_ACTIVITY_KIND_MEMCPY) {
      const auto* copy = reinterpret_cast<const CUpti_ActivityMemcpy5*>(record);
      traced.push_back({"copy", static_cast<int64_t>(copy->start), static_cast<int64_t>(copy->end)});
      continue;
    }
    if (record->kind != CUPTI_ACTIVITY_KIND_KERNEL && record->kind != CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL)
      continue;
    const auto* kernel = reinterpret_cast<const CUpti_ActivityKernel9*>(record);
    traced.push_back({ShortName(kernel->name), static_cast<int64_t>(kernel->start),
                      static_cast<int64_t>(kernel->end), kernel->registersPerThread,
                      static_cast<int64_t>(kernel->localMemoryPerThread),
                      int64_t{kernel->staticSharedMemory} + kernel->dynamicSharedMemory});
  }
  std::free(buffer);
}

}  // namespace

Status StepTrace::Start() {
  static const bool loaded =
      Library().Load() && Library().register_callbacks(GiveBuffer, TakeBuffer) == CUPTI_SUCCESS;
  if (!loaded) return Unavailable("kernels cannot be traced: libcupti of the CUDA toolkit was not found");
  {
    const std::lock_guard lock(mutex);
    traced.clear();
  }
  if (Library().enable(CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL) != CUPTI_SUCCESS ||
      Library().enable(CUPTI_ACTIVITY_KIND_MEMCPY) != CUPTI_SUCCESS)
    return Unavailable("kernels cannot be traced: CUPTI refuses, perhaps because a profiler is running");
  running_ = true;
  return OkStatus();
}

std::vector<TracedKernel> StepTrace::Stop() {
  if (!running_) return {};
  running_ = false;
  Library().flush(CUPTI_ACTIVITY_FLAG_FLUSH_FORCED);
  Library().disable(CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL);
  Library().disable(CUPTI_ACTIVITY_KIND_MEMCPY);
  const std::lock_guard lock(mutex);
  std::vector<TracedKernel> kernels = std::move(traced);
  traced.clear();
  std::sort(kernels.begin(), kernels.end(),
            [](const TracedKernel& a, const TracedKernel& b) { return a.begin_ns < b.begin_ns; });
  return kernels;
}

StepTrace::~StepTrace() { Stop(); }

}  // namespace triaxial::cuda
