// Memory-mapped safetensors: a single model.safetensors or shards listed by model.safetensors.index.json.
#ifndef TRIAXIAL_IO_SAFETENSORS_H_
#define TRIAXIAL_IO_SAFETENSORS_H_

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "base/file.h"
#include "base/status.h"

namespace triaxial {

enum class DType : uint8_t { kF32, kBf16, kF16 };
std::string_view Name(DType dtype);  // "F32", "BF16", "F16"
inline int64_t ByteSize(DType dtype) { return dtype == DType::kF32 ? 4 : 2; }

// A row-major tensor inside a mapping; the Checkpoint owns the bytes. `data` need not be aligned to the
// element size.
struct TensorView {
  DType dtype = DType::kF32;
  std::vector<int64_t> shape;
  const uint8_t* data = nullptr;
  int64_t elements = 0;
  std::string_view file;  // path of the shard, for messages
};

// Copies all elements as F32. `out` has view.elements elements.
void CopyToF32(const TensorView& view, float* out);

class Checkpoint {
 public:
  // Maps model.safetensors or, if there is none, every shard that the index names, and validates every header
  // (bounds, overlaps, holes, sizes) before any tensor can be asked for. Tensors of dtypes other than DType's
  // are an error only when they are asked for. Errors: NotFound (no weights, missing shard), DataLoss
  // (truncated), InvalidArgument (malformed); each names the file and, where there is one, the tensor.
  static Result<Checkpoint> Open(const std::string& directory);

  // The tensor `name` with exactly `shape`; NotFound or InvalidArgument naming file, tensor, expected and
  // found shape.
  Result<TensorView> Get(std::string_view name, const std::vector<int64_t>& shape) const;
  // Whether the files hold `name`, in a dtype that can be read or not.
  bool Has(std::string_view name) const { return tensors_.contains(name) || unreadable_.contains(name); }
  // All tensors that can be read by name, sorted.
  const std::map<std::string, TensorView, std::less<>>& tensors() const { return tensors_; }

 private:
  // Adds the tensors of `file` that `wanted(name)` accepts. `file` must not move afterwards.
  template <typename Predicate>
  Status AddShard(const MappedFile& file, const Predicate& wanted);

  std::string directory_;
  std::vector<MappedFile> files_;
  std::map<std::string, TensorView, std::less<>> tensors_;
  std::map<std::string, std::string, std::less<>> unreadable_;  // name to the error that Get returns
};

}  // namespace triaxial

#endif  // TRIAXIAL_IO_SAFETENSORS_H_
