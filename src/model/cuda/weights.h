// Weights on the device: read from a checkpoint or made there, and kept as long as the loader lives.
#ifndef TRIAXIAL_MODEL_CUDA_WEIGHTS_H_
#define TRIAXIAL_MODEL_CUDA_WEIGHTS_H_

#include <cstdint>
#include <string>
#include <vector>

#include "base/status.h"
#include "model/tensor_source.h"
#include "model/weights.h"
#include "ops/cuda/device.h"
#include "ops/cuda/linear.h"

namespace triaxial::cuda {

// Throws CudaError, OutOfDeviceMemory above all; errors of the checkpoint are those of TensorSource::Get.
class DeviceWeights {
 public:
  // `source` must outlive it. With `dummy`, matrices are made on the device, from their names.
  DeviceWeights(const TensorSource& source, bool dummy) : source_(source), dummy_(dummy) {}

  // See LinearLoader::Load.
  Result<LinearWeights> Load(const std::vector<LinearPart>& parts, const std::vector<int64_t>& in,
                             Element output, Epilogue epilogue, bool bias);
  // Rounds a matrix that Load made to e4m3, a scale for each output channel, and frees the BF16 matrix.
  // `name` is for the message of InvalidArgument: sizes must be multiples of 16, rows no longer than
  // kMaxFp8Width.
  Status ToFp8(const std::string& name, LinearWeights* linear);
  // [rows][columns] BF16.
  Result<const uint16_t*> LoadMatrix(const std::string& name, int64_t rows, int64_t columns);
  // [rows][columns] F32.
  Result<const float*> LoadTable(const std::string& name, int64_t rows, int64_t columns);
  // [n] F32.
  Result<const float*> LoadVector(const std::string& name, int64_t n, Fill fill);
  // The same; value i times factors[i % factors.size()], or divided by it.
  Result<const float*> LoadScaled(const std::string& name, int64_t n, const std::vector<float>& factors,
                                  bool divide);
  // A copy of host values that no checkpoint has.
  const void* Keep(const void* values, size_t bytes);

  int64_t parameters() const { return parameters_; }

 private:
  // `part`, if not null: factors for the weights.
  Status Read(const std::string& name, const std::vector<int64_t>& shape, const LinearPart* part,
              uint16_t* to);

  const TensorSource& source_;
  bool dummy_;
  std::vector<DeviceBuffer> buffers_;
  std::vector<uint16_t> staging_;
  int64_t parameters_ = 0;
};

}  // namespace triaxial::cuda

#endif  // TRIAXIAL_MODEL_CUDA_WEIGHTS_H_
