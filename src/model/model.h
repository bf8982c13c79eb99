// Qwen3 and Qwen3-VL: a decoder and, for VL, a vision tower, as straight-line calls of ops.
#ifndef TRIAXIAL_MODEL_MODEL_H_
#define TRIAXIAL_MODEL_MODEL_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>

#include "base/status.h"
#include "io/image_processor.h"
#include "io/model_config.h"
#include "kv/arena.h"
#include "kv/calibration.h"
#include "model/batch.h"
#include "ops/token_draw.h"

namespace triaxial {

enum class Precision {
  kBf16,  // weights and matrix-product inputs in BF16, sums in F32 (AVX-512-BF16 or AMX where the machine has
          // them)
  kF32,   // everything in F32: the reference mode
  kFp8,   // as kBf16, but weights and inputs of the decoder's layers in e4m3 with a scale for each output
          // channel and each token; on a GPU only
};

// Sees what attention reads and the cache stores in each layer of each step, rotated if the codec is: q
// [rows][num_heads][head_dim], k and v [rows][num_kv_heads][head_dim]. What it writes to k and v is what the
// step attends to and stores.
using AttentionObserver = std::function<void(int layer, int64_t rows, const float* q, float* k, float* v)>;

// Sees what attention gave in each layer of each step, as the checkpoint's own o_proj would read it: out
// [rows][num_heads][head_dim], neither rotated nor equalized.
using OutputObserver = std::function<void(int layer, int64_t rows, const float* out)>;

enum class Device {
  kAuto,  // a GPU if there is one and the options are for it, else the CPU
  kCpu,
  kCuda,  // an error if there is none
};

struct ModelOptions {
  Device device = Device::kCpu;
  Precision precision = Precision::kBf16;
  bool dummy_weights = false;  // random weights of config.json's shapes, nothing else is read
  Codec codec = Codec::kRotated;
  // Instead of the directory's kv_calibration.json.
  std::optional<KvCalibration> calibration = std::nullopt;
  AttentionObserver observer = nullptr;  // for calibration; on the CPU only, both
  OutputObserver output_observer = nullptr;
};

// Not thread-safe: the engine thread owns it. Uses the compute threads of base/parallel.h.
class Model {
 public:
  // Errors name file, tensor, expected and found; see io/safetensors.h and io/model_config.h.
  static Result<std::unique_ptr<Model>> Load(const std::string& directory, const ModelOptions& options);
  virtual ~Model() = default;

  virtual const ModelConfig& config() const = 0;
  virtual KvGeometry geometry() const = 0;
  virtual const KvCalibration& calibration() const = 0;
  // True if the weights are random (ModelOptions::dummy_weights): fidelity means nothing, sizes and speed do.
  virtual bool dummy_weights() const { return false; }
  // Parameters of decoder and vision tower, and bytes of weights read by one decode step.
  virtual int64_t parameters() const = 0;
  virtual int64_t decode_weight_bytes() const = 0;

  // Bytes that a cache may take where the model computes.
  virtual int64_t FreeMemory() const;
  // Memory for a cache of this model, where the model computes. Errors as KvArena::Create. The memory must
  // not outlive the model.
  virtual Result<std::unique_ptr<KvMemory>> AllocateKv(int64_t bytes);
  // Runs one step: reads and writes the cache in `memory` (of AllocateKv) as the batch says, and leaves
  // logits [batch.logits_rows.size()][vocab_size] F32 in `logits`. Token ids must be in range (CHECK).
  virtual void Forward(const Batch& batch, KvMemory* memory, float* logits) = 0;
  virtual bool on_gpu() const { return false; }
  // Whether the model chooses tokens itself (where logits would have far to go); then the next may be called.
  bool samples() const { return on_gpu(); }
  // Forward, and tokens[i] by draws[i] from the logits of batch.logits_rows[i] (ops/token_draw.h); -1 if they
  // have none above minus infinity. Leaves the logits of row i in logits + i * vocab_size if draws[i].logits.
  // `meanwhile` is called once, when all work has been given to the device and before it is waited for; it
  // must not throw, nor touch what the step reads. Where ForwardAndSample throws, it may not have been
  // called.
  virtual void ForwardAndSample(const Batch& batch, KvMemory* memory, std::span<const TokenDraw> draws,
                                int32_t* tokens, float* logits, const std::function<void()>& meanwhile);
  // The vision tower on one image; only for models with vision (CHECK).
  virtual VisualFeatures Encode(const ImagePatches& patches, const PreprocessorConfig& preprocessor) = 0;
};

}  // namespace triaxial

#endif  // TRIAXIAL_MODEL_MODEL_H_
