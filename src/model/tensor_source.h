// Where weights come from: a checkpoint or, to measure models that nobody has on disk, a generator.
#ifndef TRIAXIAL_MODEL_TENSOR_SOURCE_H_
#define TRIAXIAL_MODEL_TENSOR_SOURCE_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "base/status.h"
#include "io/safetensors.h"
#include "ops/element.h"

namespace triaxial {

// What a generated tensor holds.
enum class Fill : uint8_t {
  kNormal,  // about normal, deviation 0.02, the same for the same name
  kZero,
  kOne,
};

// A tensor as rows: shape[0] of them. Valid while its source lives.
class Tensor {
 public:
  // Rows [first, first + count) as `type`, row-major. May be called from several threads.
  void Read(int64_t first, int64_t count, Element type, void* out) const;
  // All of it, on all compute threads.
  void ReadAll(Element type, void* out) const;

 private:
  friend class TensorSource;
  int64_t rows_ = 0;
  int64_t columns_ = 0;
  TensorView view_;  // no data: generated
  Fill fill_ = Fill::kNormal;
  uint64_t seed_ = 0;
};

class TensorSource {
 public:
  // Errors as Checkpoint::Open.
  static Result<TensorSource> Open(const std::string& directory);
  static TensorSource Generated();

  // Errors as Checkpoint::Get; none if generated.
  Result<Tensor> Get(const std::string& name, const std::vector<int64_t>& shape, Fill fill) const;
  // The same, read as F32.
  Result<std::vector<float>> GetF32(const std::string& name, const std::vector<int64_t>& shape,
                                    Fill fill) const;

 private:
  std::optional<Checkpoint> checkpoint_;
};

}  // namespace triaxial

#endif  // TRIAXIAL_MODEL_TENSOR_SOURCE_H_
