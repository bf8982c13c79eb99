#include "model/cuda/cuda_model.h"

#include <algorithm>
#include <utility>

#include "base/check.h"
#include "base/log.h"
#include "model/cuda/decoder.h"
#include "model/cuda/vision_tower.h"
#include "model/cuda/weights.h"

namespace triaxial::cuda {
namespace {

// Of device memory, besides the KV cache: workspaces of a step of some thousand rows and of a large image,
// graphs.
constexpr int64_t kReservedBytes = int64_t{6} << 30;

class CudaModel : public Model {
 public:
  CudaModel(const ModelConfig& config, KvCalibration calibration, TensorSource source, bool dummy)
      : config_(config),
        calibration_(std::move(calibration)),
        source_(std::move(source)),
        dummy_(dummy),
        weights_(source_, dummy) {
    // Features of images come and go; what they leave behind is kept for the next.
    cudaMemPool_t pool = nullptr;
    uint64_t threshold = UINT64_MAX;
    CUDA_OK(cudaDeviceGetDefaultMemPool(&pool, 0));
    CUDA_OK(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &threshold));
  }

  Status LoadWeights(Codec codec, bool fp8) {
    ASSIGN_OR_RETURN(decoder_,
                     Decoder::Load(config_, codec, calibration_, fp8, &weights_, &linears_, stream_));
    if (config_.vision) {
      ASSIGN_OR_RETURN(vision_, VisionTower::Load(*config_.vision, &weights_, &linears_, stream_));
    }
    CUDA_OK(cudaDeviceSynchronize());
    return OkStatus();
  }

  const ModelConfig& config() const override { return config_; }
  KvGeometry geometry() const override { return decoder_->geometry(); }
  const KvCalibration& calibration() const override { return calibration_; }
  bool dummy_weights() const override { return dummy_; }
  int64_t parameters() const override { return weights_.parameters(); }
  int64_t decode_weight_bytes() const override { return decoder_->weight_bytes(); }
  int64_t FreeMemory() const override { return std::max<int64_t>(0, CurrentDevice().free - kReservedBytes); }

  Result<std::unique_ptr<KvMemory>> AllocateKv(int64_t bytes) override {
    return CudaKvMemory::Create(geometry(), bytes, stream_);
  }
  void Forward(const Batch& batch, KvMemory* memory, float* logits) override {
    decoder_->Forward(batch, static_cast<const CudaKvMemory&>(*memory), {}, nullptr, logits, [] {});
  }
  bool on_gpu() const override { return true; }
  void ForwardAndSample(const Batch& batch, KvMemory* memory, std::span<const TokenDraw> draws,
                        int32_t* tokens, float* logits, const std::function<void()>& meanwhile) override {
    CHECK(draws.size() == batch.logits_rows.size());
    decoder_->Forward(batch, static_cast<const CudaKvMemory&>(*memory), draws, tokens, logits, meanwhile);
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
  Stream stream_;
  DeviceWeights weights_;
  LinearRunner linears_;
  std::unique_ptr<Decoder> decoder_;
  std::unique_ptr<VisionTower> vision_;
};

}  // namespace

Result<std::unique_ptr<Model>> LoadCudaModel(const std::string& directory, const ModelConfig& config,
                                             KvCalibration calibration, TensorSource source,
                                             const ModelOptions& options) {
  try {
    auto model =
        std::make_unique<CudaModel>(config, std::move(calibration), std::move(source), options.dummy_weights);
    RETURN_IF_ERROR(model->LoadWeights(options.codec, options.precision == Precision::kFp8));
    return std::unique_ptr<Model>(std::move(model));
  } catch (const OutOfDeviceMemory&) {
    return ResourceExhausted("the weights of '" + directory + "' do not fit in the memory of the GPU (" +
                             CurrentDevice().name + "); use a smaller model or --device cpu");
  } catch (const std::exception& e) {
    return Internal("the GPU could not prepare the weights of '" + directory + "': " + e.what());
  }
}

}  // namespace triaxial::cuda
