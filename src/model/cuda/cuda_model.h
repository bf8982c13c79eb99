// The model on a GPU.
#ifndef TRIAXIAL_MODEL_CUDA_CUDA_MODEL_H_
#define TRIAXIAL_MODEL_CUDA_CUDA_MODEL_H_

#include <memory>
#include <string>

#include "model/model.h"
#include "model/tensor_source.h"

namespace triaxial::cuda {

// `directory` is for messages. Errors as Model::Load; ResourceExhausted if the weights do not fit.
Result<std::unique_ptr<Model>> LoadCudaModel(const std::string& directory, const ModelConfig& config,
                                             KvCalibration calibration, TensorSource source,
                                             const ModelOptions& options);

}  // namespace triaxial::cuda

#endif  // TRIAXIAL_MODEL_CUDA_CUDA_MODEL_H_
