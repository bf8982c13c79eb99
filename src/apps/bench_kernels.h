// Measurements of single operators of the KV cache, on any backend: what a case is, and what a backend does
// with it.
#ifndef TRIAXIAL_APPS_BENCH_KERNELS_H_
#define TRIAXIAL_APPS_BENCH_KERNELS_H_

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/status.h"
#include "kv/view.h"

namespace triaxial {

// Blocks of several formats, in parts of a hundred.
struct FormatMix {
  std::array<int, kFormats> percent{};
  std::string Name() const;                          // "k2v2", "75k2v2+25k4v4"
  std::vector<Format> Spread(int64_t blocks) const;  // evenly over the positions of a sequence
};
Result<FormatMix> ParseFormatMix(const std::string& text);

// Bytes of a sequence's blocks in one layer.
int64_t LayerBytes(const KvGeometry& g, const std::vector<Format>& blocks);

// `batch` sequences, each with `context` tokens in the cache (whole blocks) and `rows` rows in the step: 1 is
// decode. geometry.num_layers is ignored: a backend takes as many layers as keep caches from helping.
struct AttentionCase {
  KvGeometry geometry;
  int group = 8;  // query heads of a KV head
  int batch = 1;
  int64_t context = 0;
  int rows = 1;
  FormatMix mix;
};

struct CodecCase {
  enum class Op {
    kAppend,   // one row for each of `blocks` sequences, into BF16 tails
    kStore,    // 64 rows for each of `blocks` blocks of `to`
    kConvert,  // `blocks` blocks from `from` to `to`
  };
  KvGeometry geometry;
  Op op = Op::kStore;
  int64_t blocks = 0;
  Format from = Format::kBf16, to = Format::kBf16;
};
std::string_view Name(CodecCase::Op op);

// Of one layer.
struct KernelTime {
  double seconds = 0;
  int64_t bytes = 0;  // that must be moved: of the cache for attention, read and written for the codec
  double error = 0;   // attention: relative to float64; the codec is compared bit for bit
};

// What the compiler made of a kernel.
struct KernelResources {
  std::string name;
  int registers = 0;
  int64_t local_bytes = 0;   // a thread: spills and arrays in memory
  int64_t shared_bytes = 0;  // a block
};

class KernelBench {
 public:
  virtual ~KernelBench() = default;
  virtual std::string device() const = 0;  // "CPU name, 2 threads", "NVIDIA H200"
  virtual double CopyGbPerS() = 0;         // bytes read and written
  virtual double ReadGbPerS() = 0;
  // Runs the case on data made for it. Nothing is timed before the result was found right: Internal if it is
  // not.
  virtual Result<KernelTime> TimeAttention(const AttentionCase& c, double seconds) = 0;
  virtual Result<KernelTime> TimeCodec(const CodecCase& c, double seconds) = 0;
  virtual std::vector<KernelResources> Resources() const = 0;  // empty where there is nothing to say
};

// `working_set`: bytes of cache that a measurement visits at least; several times the largest last-level
// cache at hand.
std::unique_ptr<KernelBench> CpuKernelBench(int64_t working_set = int64_t{768} << 20);
#ifdef TRIAXIAL_CUDA
// Of the current GPU. Throws CudaError when it is used. Unavailable if there is none.
Result<std::unique_ptr<KernelBench>> CudaKernelBench();
#endif

// |out - reference| / |reference| of softmax(scale q K^T) V in float64; keys and values: [tokens][head_dim].
double AttentionError(const float* q, double scale, const std::vector<float>& keys,
                      const std::vector<float>& values, int head_dim, const float* out);

}  // namespace triaxial

#endif  // TRIAXIAL_APPS_BENCH_KERNELS_H_
