#include "calib/codec_fit.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <memory>
#include <utility>
#include <vector>

#include "engine/prepare.h"
#include "model/model.h"
#include "model/single_sequence.h"
#include "model/tensor_source.h"
#include "model/weights.h"

namespace triaxial {
namespace {

constexpr int kFactorChunk = 512;
// Short steps, so that nearly every token is read back quantized.
constexpr int kLevelChunk = 64;
constexpr size_t kLogitsBytes = size_t{512} << 20;
// Levels that are tried, from no clip on down to half a range. `inner` of the min-max range is what the gain
// fills, so the levels span inner * gain.
struct Levels {
  float inner;
  float gain;
};
constexpr Levels kLevels[] = {{1, 1},         {0.8f, 1},    {0.7f, 1.05f}, {0.7f, 1.1f}, {0.65f, 1.1f},
                              {0.65f, 1.15f}, {0.6f, 1.1f}, {0.6f, 1.15f}, {0.6f, 1.2f}};

// A conversation as tokens and pictures, independent of how the model's cache is calibrated.
struct Sample {
  Prompt prompt;
  MropePositions positions;
  std::vector<VisualFeatures> features;  // of the prompt's images, once Run has made them
  std::vector<size_t> predicted;         // rows whose next token the model would have generated
  std::vector<float> reference;          // [tokens][vocab_size] logits with a BF16 cache
};

Sample MakeSample(const ServedModel& model, Prompt&& prompt) {
  Sample sample;
  sample.positions = PositionsOf(prompt, model.preprocessor);
  for (const TagSpan& span : prompt.spans) {
    if (span.semantic != Semantic::kAssistant && span.semantic != Semantic::kReasoning &&
        span.semantic != Semantic::kToolCall) {
      continue;
    }
    for (int32_t token = std::max(1, span.begin); token < span.end; ++token) {
      sample.predicted.push_back(static_cast<size_t>(token) - 1);
    }
  }
  sample.prompt = std::move(prompt);
  return sample;
}

// Runs a sample through a cache of `format`; leaves the logits of all its tokens unless `logits` is null.
Status Run(const ServedModel& served, Model* model, Format format, int chunk, Sample* sample,
           std::vector<float>* logits) {
  const std::vector<PromptImage>& images = sample->prompt.images;
  std::vector<VisualFeatures>& features = sample->features;
  for (size_t i = features.size(); i < images.size(); ++i) {
    features.push_back(model->Encode(*images[i].patches, served.preprocessor));
  }
  std::vector<PlacedImage> placed;
  for (size_t i = 0; i < images.size(); ++i) placed.push_back({images[i].begin, &features[i]});
  const auto n = static_cast<int32_t>(sample->prompt.tokens.size());
  ASSIGN_OR_RETURN(const std::unique_ptr<SingleSequence> sequence, SingleSequence::Create(model, format, n));
  std::vector<float> none;
  return sequence->Append(sample->prompt.tokens, sample->positions.positions, placed, chunk,
                          logits == nullptr ? 0 : n, logits == nullptr ? &none : logits);
}

// Sums of squares over tokens, and of queries and keys over heads.
struct Energy {
  std::vector<double> queries, keys;  // [head_dim / 2], of RoPE pairs
  std::vector<double> values;         // [num_kv_heads * head_dim]

  // Of `n` numbers those that lie a multiple of `period` apart count as one channel.
  static void Add(const float* x, int64_t n, int64_t period, std::vector<double>* sums) {
    sums->resize(static_cast<size_t>(period));
    double* sum = sums->data();
    for (const float* end = x + n; x != end; x += period) {
      for (int64_t i = 0; i < period; ++i) sum[i] += double{x[i]} * x[i];
    }
  }
};

// RMS of keys over that of queries, square root of it: scores then err least for a given error of the stored
// keys, whose channels share one step size (the sum of q^2 times the sum of k^2 is smallest where the two are
// proportional). Relative to the geometric mean, to four digits.
std::vector<float> KeyFactors(const Energy& energy) {
  constexpr double kTiny = 1e-20;
  std::vector<double> logs;
  logs.reserve(energy.keys.size());
  double mean = 0;
  for (size_t c = 0; c < energy.keys.size(); ++c) {
    logs.push_back(0.25 * (std::log(energy.keys[c] + kTiny) - std::log(energy.queries[c] + kTiny)));
    mean += logs.back() / static_cast<double>(energy.keys.size());
  }
  std::vector<float> factors;
  factors.reserve(logs.size());
  for (const double log : logs) factors.push_back(std::stof(fmt::format("{:.4g}", std::exp(log - mean))));
  return factors;
}

// RMS of a value channel over the norm of the columns of o_proj that read it, square root of it: the same
// rule, one factor for each channel since nothing turns values, and the nearest power of two, so that weights
// in BF16 stay exact. Not relative to a mean: the result does not depend on how a checkpoint divides a scale
// between v_proj and o_proj.
std::vector<float> ValueFactors(const Energy& energy, int64_t tokens, const TextConfig& text,
                                const std::vector<float>& o_proj) {
  const auto dim = static_cast<size_t>(text.head_dim);
  const auto width = static_cast<size_t>(text.num_heads) * dim;
  const auto group = static_cast<size_t>(text.num_heads / text.num_kv_heads);
  std::vector<double> read(energy.values.size());
  for (size_t i = 0; i < o_proj.size(); ++i) {
    const size_t column = i % width;
    read[column / dim / group * dim + column % dim] += double{o_proj[i]} * o_proj[i];
  }
  std::vector<float> factors;
  for (size_t c = 0; c < read.size(); ++c) {
    const double ratio = energy.values[c] / static_cast<double>(tokens) / read[c];
    const double exponent = std::isfinite(ratio) && ratio > 0 ? std::round(0.25 * std::log2(ratio)) : 0;
    factors.push_back(
        std::clamp(static_cast<float>(std::exp2(exponent)), kMinEqualization, kMaxEqualization));
  }
  return factors;
}

// Mean over some rows of the root of the KL divergence of the second distribution from the first. The root,
// because a few rows hold most of the divergence.
double MeanRootKl(const std::vector<float>& p, const std::vector<float>& q, size_t vocab,
                  const std::vector<size_t>& rows) {
  double total = 0;
  for (const size_t r : rows) {
    const float* a = p.data() + r * vocab;
    const float* b = q.data() + r * vocab;
    const double top_a = *std::max_element(a, a + vocab), top_b = *std::max_element(b, b + vocab);
    double sum_a = 0;
    double sum_b = 0;
    for (size_t i = 0; i < vocab; ++i) {
      sum_a += std::exp(a[i] - top_a);
      sum_b += std::exp(b[i] - top_b);
    }
    const double shift = std::log(sum_a) + top_a - std::log(sum_b) - top_b;
    double kl = 0;
    for (size_t i = 0; i < vocab; ++i) {
      kl += std::exp(a[i] - top_a) / sum_a * (double{a[i]} - b[i] - shift);
    }
    total += std::sqrt(std::max(0.0, kl));
  }
  return total / static_cast<double>(rows.size());
}

class Fit {
 public:
  Fit(const ServedModel& model, const Trajectories& trajectories, const CodecFitOptions& options)
      : served_(model), trajectories_(trajectories), options_(options) {
    const auto all = static_cast<int>(trajectories.size());
    factors_ = std::min(options.factor_conversations, all);
    levels_ = std::min(options.level_conversations, all - factors_);
    // The levels' conversations run once for the reference and once for each choice of two sides.
    runs_ = factors_ + levels_ * (1 + 2 * static_cast<int>(std::size(kLevels)));
  }

  Result<KvCalibration> Run() {
    RETURN_IF_ERROR(Observe());
    RETURN_IF_ERROR(FitFactors());
    if (samples_.empty()) return std::move(calibration_);
    // Values first, beside 4-bit keys, whose errors do not drown theirs; then keys.
    RETURN_IF_ERROR(FitSide(Format::kK4V2, &ClipRatios::v2, &ClipRatios::v2_gain));
    RETURN_IF_ERROR(FitSide(Format::kK2V2, &ClipRatios::k2, &ClipRatios::k2_gain));
    return std::move(calibration_);
  }

 private:
  Status Done() {
    return options_.progress(static_cast<double>(++done_) / runs_) ? OkStatus() : Cancelled("interrupted");
  }

  // What the model's heads do in the first conversations, and what it says in the others.
  Status Observe() {
    const TextConfig& text = served_.config.text;
    energies_.resize(static_cast<size_t>(text.num_layers));
    bool observing = true;
    // With the paper's codec attention reads queries and keys as they are: neither rotated nor equalized.
    ModelOptions plain{.precision = Precision::kF32, .codec = Codec::kPaper};
    plain.observer = [&](int layer, int64_t rows, const float* q, const float* k, const float* v) {
      if (!observing) return;
      Energy& energy = energies_[static_cast<size_t>(layer)];
      const int64_t width = int64_t{text.num_kv_heads} * text.head_dim;
      Energy::Add(q, rows * text.num_heads * text.head_dim, text.head_dim / 2, &energy.queries);
      Energy::Add(k, rows * width, text.head_dim / 2, &energy.keys);
      Energy::Add(v, rows * width, width, &energy.values);
    };
    ASSIGN_OR_RETURN(const std::unique_ptr<Model> model, Model::Load(served_.directory, plain));
    const auto vocab = static_cast<size_t>(text.vocab_size);
    for (int i = 0; i < factors_ + levels_; ++i) {
      ASSIGN_OR_RETURN(Prompt prompt, trajectories_.Read(static_cast<size_t>(i), served_));
      observing = i < factors_;
      size_t limit = static_cast<size_t>(text.max_position_embeddings);
      if (!observing) limit = std::min(limit, kLogitsBytes / sizeof(float) / vocab);
      CutPrompt(static_cast<int32_t>(limit), &prompt);
      if (prompt.tokens.empty()) continue;
      Sample sample = MakeSample(served_, std::move(prompt));
      if (observing) {
        RETURN_IF_ERROR(triaxial::Run(served_, model.get(), Format::kBf16, kFactorChunk, &sample, nullptr));
        tokens_ += static_cast<int64_t>(sample.prompt.tokens.size());
      } else if (!sample.predicted.empty()) {
        RETURN_IF_ERROR(
            triaxial::Run(served_, model.get(), Format::kBf16, kFactorChunk, &sample, &sample.reference));
        samples_.push_back(std::move(sample));
      }
      RETURN_IF_ERROR(Done());
    }
    if (tokens_ == 0) return InvalidArgument("there is no conversation to fit the codec on");
    return OkStatus();
  }

  Status FitFactors() {
    const TextConfig& text = served_.config.text;
    calibration_.calibrated = true;
    options_.notice(fmt::format("{} tokens", tokens_));
    ASSIGN_OR_RETURN(const TensorSource source, TensorSource::Open(served_.directory));
    const std::string prefix = TextPrefix(served_.config);
    for (size_t layer = 0; layer < energies_.size(); ++layer) {
      calibration_.key_equalization.push_back(KeyFactors(energies_[layer]));
      const std::vector<float>& keys = calibration_.key_equalization.back();
      const auto [low, high] = std::minmax_element(keys.begin(), keys.end());
      std::string line = fmt::format("layer {}: factors of keys from {:.3f} to {:.2f}", layer, *low, *high);
      if (options_.equalize_values) {
        ASSIGN_OR_RETURN(
            const std::vector<float> o_proj,
            source.GetF32(fmt::format("{}layers.{}.self_attn.o_proj.weight", prefix, layer),
                          {text.hidden_size, int64_t{text.num_heads} * text.head_dim}, Fill::kNormal));
        calibration_.value_equalization.push_back(ValueFactors(energies_[layer], tokens_, text, o_proj));
        const std::vector<float>& values = calibration_.value_equalization.back();
        const auto [least, most] = std::minmax_element(values.begin(), values.end());
        line += fmt::format(", of values from {:.3g} to {:.3g}", *least, *most);
      }
      options_.notice(line);
    }
    return OkStatus();
  }

  // How far a cache of `format` leads from a BF16 one, over what the model says in the samples.
  Result<double> Divergence(Format format) {
    ASSIGN_OR_RETURN(
        const std::unique_ptr<Model> model,
        Model::Load(served_.directory, {.precision = Precision::kF32, .calibration = calibration_}));
    const auto vocab = static_cast<size_t>(served_.config.text.vocab_size);
    double mean = 0;
    std::vector<float> logits;
    for (Sample& sample : samples_) {
      RETURN_IF_ERROR(triaxial::Run(served_, model.get(), format, kLevelChunk, &sample, &logits));
      mean += MeanRootKl(sample.reference, logits, vocab, sample.predicted) /
              static_cast<double>(samples_.size());
      RETURN_IF_ERROR(Done());
    }
    const ClipRatios& c = calibration_.clip;
    options_.notice(fmt::format(
        "{}: mean root KL from a bf16 cache {:.4e}; keys: clip {:.3g}, gain {:.3g}; values: {:.3g}, {:.3g}",
        Name(format), mean, c.k2, c.k2_gain, c.v2, c.v2_gain));
    return mean;
  }

  // The clip ratio and gain of one side that serve a format best.
  Status FitSide(Format format, float ClipRatios::*clip, float ClipRatios::*gain) {
    double best = INFINITY;
    ClipRatios chosen;
    for (const Levels& levels : kLevels) {
      calibration_.clip.*clip = levels.inner * levels.gain;
      calibration_.clip.*gain = levels.gain;
      ASSIGN_OR_RETURN(const double d, Divergence(format));
      if (d < best) {
        best = d;
        chosen = calibration_.clip;
      }
    }
    calibration_.clip = chosen;
    return OkStatus();
  }

  const ServedModel& served_;
  const Trajectories& trajectories_;
  const CodecFitOptions& options_;
  int factors_ = 0, levels_ = 0, runs_ = 0, done_ = 0;  // conversations, and times that one is run
  std::vector<Energy> energies_;                        // by layer
  int64_t tokens_ = 0;
  std::vector<Sample> samples_;
  KvCalibration calibration_;
};

}  // namespace

Result<KvCalibration> FitCodec(const ServedModel& model, const Trajectories& trajectories,
                               const CodecFitOptions& options) {
  return Fit(model, trajectories, options).Run();
}

}  // namespace triaxial
