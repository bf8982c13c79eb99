#include "model/model.h"

#include <unistd.h>

#include <exception>
#include <new>

#include "base/check.h"
#include "base/log.h"
#include "model/decoder.h"
#include "model/tensor_source.h"
#include "model/vision_tower.h"
#include "model/weights.h"
#ifdef TRIAXIAL_CUDA
#include "model/cuda/cuda_model.h"
#include "ops/cuda/device.h"
#endif

namespace triaxial {
namespace {

class QwenModel : public Model {
 public:
  QwenModel(const ModelConfig& config, KvCalibration calibration, TensorSource source, bool dummy)
      : config_(config), calibration_(std::move(calibration)), source_(std::move(source)), dummy_(dummy) {}

  Status LoadWeights(Element element, const ModelOptions& options) {
    LinearLoader loader(source_, &cache_, element);
    {
      ASSIGN_OR_RETURN(decoder_,
                       Decoder::Load(config_, element, options.codec, calibration_, source_, &loader));
    }
    parameters_ = decoder_->small_parameters();
    decoder_->set_observer(options.observer);
    decoder_->set_output_observer(options.output_observer);
    if (config_.vision) {
      ASSIGN_OR_RETURN(vision_, VisionTower::Load(*config_.vision, element, source_, &loader));
      parameters_ += vision_->small_parameters();
    }
    parameters_ += loader.parameters();
    return OkStatus();
  }

  const ModelConfig& config() const override { return config_; }
  KvGeometry geometry() const override { return decoder_->geometry(); }
  const KvCalibration& calibration() const override { return calibration_; }
  bool dummy_weights() const override { return dummy_; }
  int64_t parameters() const override { return parameters_; }
  int64_t decode_weight_bytes() const override { return decoder_->weight_bytes(); }

  void Forward(const Batch& batch, KvMemory* memory, float* logits) override {
    decoder_->Forward(batch, static_cast<KvArena*>(memory), logits);
  }
  VisualFeatures Encode(const ImagePatches& patches, const PreprocessorConfig& preprocessor) override {
    CHECK(vision_ != nullptr);
    return vision_->Encode(patches, preprocessor);
  }

 private:
  ModelConfig config_;
  KvCalibration calibration_;
  TensorSource source_;
  bool dummy_;
  LinearCache cache_;
  std::unique_ptr<Decoder> decoder_;
  std::unique_ptr<VisionTower> vision_;
  int64_t parameters_ = 0;
};

Element ElementFor(Precision precision) {
  if (precision == Precision::kF32) return Element::kF32;
  if (HasBf16Products()) return Element::kBf16;
  spdlog::info("this CPU has no BF16 products; weights are widened to F32");
  return Element::kF32;
}

// What kAuto means for these options on this machine.
Result<Device> ChooseDevice(const ModelOptions& options) {
  const bool fp8 = options.precision == Precision::kFp8;
  if (options.device == Device::kCpu) {
    if (fp8) return InvalidArgument("--dtype fp8 needs a GPU; use --dtype bf16 on the CPU");
    return Device::kCpu;
  }
  const bool wanted = options.device == Device::kCuda || fp8;
#ifdef TRIAXIAL_CUDA
  std::string why;
  if (options.precision == Precision::kF32) {
    why = "it computes in BF16 only";
  } else if (options.observer || options.output_observer) {
    why = "it has no observer of attention";
  } else if (cuda::FindDevice(&why)) {
    return Device::kCuda;
  }
  if (!wanted) {
    spdlog::info("the GPU is not used: {}", why);
    return Device::kCpu;
  }
  return InvalidArgument("the GPU cannot be used: " + why + "; use --device cpu" +
                         (fp8 ? " and --dtype bf16" : ""));
#else
  if (!wanted) return Device::kCpu;
  return InvalidArgument("this binary was built without CUDA; build the preset 'cuda', or use --device cpu" +
                         std::string(fp8 ? " and --dtype bf16" : ""));
#endif
}

}  // namespace

int64_t Model::FreeMemory() const {
  return static_cast<int64_t>(sysconf(_SC_PHYS_PAGES)) * sysconf(_SC_PAGESIZE) / 4;
}

void Model::ForwardAndSample(const Batch&, KvMemory*, std::span<const TokenDraw>, int32_t*, float*,
                             const std::function<void()>&) {
  CHECK(samples());
}

Result<std::unique_ptr<KvMemory>> Model::AllocateKv(int64_t bytes) {
  ASSIGN_OR_RETURN(KvArena arena, KvArena::Create(geometry(), bytes));
  return std::unique_ptr<KvMemory>(std::make_unique<KvArena>(std::move(arena)));
}

Result<std::unique_ptr<Model>> Model::Load(const std::string& directory, const ModelOptions& options) {
  ASSIGN_OR_RETURN(const ModelConfig config, LoadModelConfig(directory));
  KvCalibration calibration;
  TensorSource source = TensorSource::Generated();
  if (!options.dummy_weights) {
    ASSIGN_OR_RETURN(calibration, LoadKvCalibration(directory, config.text.num_layers,
                                                    config.text.num_kv_heads, config.text.head_dim));
    ASSIGN_OR_RETURN(source, TensorSource::Open(directory));
  }
  if (options.calibration) calibration = *options.calibration;
  ASSIGN_OR_RETURN(const Device device, ChooseDevice(options));
#ifdef TRIAXIAL_CUDA
  if (device == Device::kCuda) {
    return cuda::LoadCudaModel(directory, config, std::move(calibration), std::move(source), options);
  }
#endif
  CHECK(device == Device::kCpu);
  try {
    auto model =
        std::make_unique<QwenModel>(config, std::move(calibration), std::move(source), options.dummy_weights);
    RETURN_IF_ERROR(model->LoadWeights(ElementFor(options.precision), options));
    return std::unique_ptr<Model>(std::move(model));
  } catch (const std::bad_alloc&) {
    return ResourceExhausted("the weights of '" + directory +
                             "' do not fit in memory; use a smaller model or a machine with more memory");
  } catch (const std::exception& e) {
    return Internal("oneDNN could not prepare the weights of '" + directory + "': " + e.what());
  }
}

}  // namespace triaxial
