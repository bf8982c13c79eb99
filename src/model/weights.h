// Loading of linear layers: reading, stacking and packing.
#ifndef TRIAXIAL_MODEL_WEIGHTS_H_
#define TRIAXIAL_MODEL_WEIGHTS_H_

#include <cstdint>
#include <string>
#include <vector>

#include "base/status.h"
#include "io/model_config.h"
#include "kv/calibration.h"
#include "model/tensor_source.h"
#include "ops/buffer.h"
#include "ops/linear.h"

namespace triaxial {

// One of the layers that are stacked into a product: NAME.weight of [out, in...] and, with bias, NAME.bias.
struct LinearPart {
  std::string name;
  int64_t out = 0;
  // Factors that its weights are multiplied by, [out] and [in], or none.
  std::vector<float> row_factors{};
  std::vector<float> column_factors{};
};

// Applies the factors of a part to its weights, [out][columns] of `type`.
void ApplyFactors(const LinearPart& part, Element type, int64_t columns, void* weights);

// What the names of the text model's tensors begin with: TextPrefix(config) + "norm.weight".
std::string TextPrefix(const ModelConfig& config);

// v_proj and o_proj of a layer, named ATTENTION.v_proj and so on, with the factors of value equalization for
// `codec`: the output of o_proj stays what it is.
struct ValueParts {
  LinearPart v, o;
};
ValueParts EqualizedValues(const TextConfig& config, Codec codec, const KvCalibration& calibration,
                           const std::string& attention, int layer);

class LinearLoader {
 public:
  // All three must outlive the loader, the cache also what it loads.
  LinearLoader(const TensorSource& source, LinearCache* cache, Element element)
      : source_(source), cache_(cache), element_(element) {}

  // `in`: dimensions of a row of the checkpoint's weights; their product is the width of the input.
  Result<Linear> Load(const std::vector<LinearPart>& parts, const std::vector<int64_t>& in, Element output,
                      Epilogue epilogue, bool bias);
  int64_t parameters() const { return parameters_; }

 private:
  const TensorSource& source_;
  LinearCache* cache_;
  Element element_;
  Buffer stacked_;
  int64_t parameters_ = 0;
};

}  // namespace triaxial

#endif  // TRIAXIAL_MODEL_WEIGHTS_H_
