// Sensitivities of one recorded conversation: D[tag][format], by replaying its attention
// (calib/tag_attention.h) or, as the slow reference, by what it does to the model's predictions.
#ifndef TRIAXIAL_CALIB_SENSITIVITY_H_
#define TRIAXIAL_CALIB_SENSITIVITY_H_

#include <array>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "calib/tag_attention.h"
#include "model/model.h"
#include "model/single_sequence.h"
#include "text/prompt.h"

namespace triaxial {

using TagLosses = std::array<std::array<double, kFormats>, kTags>;

enum class Metric : uint8_t {
  kMse,     // squared error of the attention output, averaged over queries and channels, summed over layers
  kOutput,  // the same of what o_proj makes of each head's output: as it arrives in the residual stream,
            // where errors of keys and of values count as the model minds them
  kKl,  // KL divergence of the next token's distribution, averaged over the tokens that the model wrote; one
        // pass of the model for each tag and format
};
inline constexpr std::array kAllMetrics = {Metric::kMse, Metric::kOutput, Metric::kKl};
std::string_view Name(Metric metric);            // "mse", "output", "kl"
enum class Aggregate : uint8_t { kMax, kMean };  // over the heads of a layer

struct SensitivityOptions {
  std::vector<int> layers;  // that are replayed (kMse, kOutput)
  Metric metric = Metric::kMse;
  Aggregate aggregate = Aggregate::kMax;
  TagTime tags_at = TagTime::kEnd;  // kKl knows kEnd only
};
// `count` layers (at most all), evenly spread; 0: all of a model of up to 16 layers, else 4.
std::vector<int> SpreadLayers(int num_layers, int count);

struct ConversationLoss {
  TagLosses loss{};    // of all of the tag's tokens together; 0 for tags that do not occur
  TagTotals tokens{};  // TokensByTag; of loss / tokens both sides are of the same queries
  int64_t length = 0;
};

// What a layer attended to, for checks by other implementations.
struct LayerCapture {
  int layer = 0;
  std::vector<float> q, k, v;  // as TagAttention::Append takes them
};

// Not thread-safe. Uses the compute threads.
class SensitivityMeter {
 public:
  // Loads the model, in the codec and precision of `model_options`. Errors as Model::Load; InvalidArgument
  // for layers that the model does not have, and for kKl with kTurn.
  static Result<std::unique_ptr<SensitivityMeter>> Create(const std::string& directory,
                                                          const ModelOptions& model_options,
                                                          const PreprocessorConfig& preprocessor,
                                                          const SensitivityOptions& options);

  // `progress` is called now and then with the fraction that is done; Cancelled once it returns false.
  // Memory: kMse and kOutput keep keys and values of the replayed layers in F32, once exactly and once for
  // each width of codes; queries only of one step. `captures` receives the replayed layers if it is not null.
  // At least one token (CHECK), no more than the model takes.
  Result<ConversationLoss> Measure(const Prompt& prompt, const std::function<bool(double)>& progress,
                                   std::vector<LayerCapture>* captures = nullptr);

  const Model& model() const { return *model_; }
  const SensitivityOptions& options() const { return options_; }

 private:
  struct Input;
  SensitivityMeter(const PreprocessorConfig& preprocessor, SensitivityOptions options)
      : preprocessor_(preprocessor), options_(std::move(options)) {}
  Result<ConversationLoss> MeasureAttention(const Input& input, const std::function<bool(double)>& progress,
                                            std::vector<LayerCapture>* captures);
  Result<ConversationLoss> MeasurePredictions(const Input& input,
                                              const std::function<bool(double)>& progress);
  // One pass over the conversation. Behind each step from token `begin` on, `step` gets the logits of its
  // rows, or none if no row from `first_wanted` on is among them; Cancelled once it returns false.
  using StepFunction = std::function<bool(int32_t begin, int32_t end, const std::vector<float>& logits)>;
  Status Run(const Input& input, int32_t first_wanted, const StepFunction& step);

  PreprocessorConfig preprocessor_;
  SensitivityOptions options_;
  std::unique_ptr<Model> model_;
  std::vector<std::vector<float>> grams_;  // kOutput: of the replayed layers, as TagAttention takes them
  AttentionObserver observer_;             // of the pass that is running
};

}  // namespace triaxial

#endif  // TRIAXIAL_CALIB_SENSITIVITY_H_
