// Fits a checkpoint's kv_calibration.json (kv/calibration.h) on conversations: factors that balance the RoPE
// pairs of queries and keys, and the value channels with what reads them, and the clip ratios and gains of
// 2-bit sides that keep what the model says closest to what it says with a BF16 cache.
#include <fmt/core.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <fstream>
#include <map>
#include <memory>
#include <numeric>
#include <string>
#include <vector>

#include "base/file.h"
#include "base/json.h"
#include "kv/calibration.h"
#include "model/model.h"
#include "model/single_sequence.h"
#include "model/tensor_source.h"
#include "text/chat_template.h"
#include "text/tokenizer.h"

namespace triaxial {
namespace {

constexpr int kFitChunk = 512;
// Short steps, so that nearly every token is read back quantized.
constexpr int kClipChunk = 64;
// Levels that are tried. `inner` of the min-max range is what the gain fills, so the levels span inner *
// gain.
struct Levels {
  float inner;
  float gain;
};
constexpr Levels kLevels[] = {{1, 1},         {0.8f, 1},    {0.7f, 1.05f}, {0.7f, 1.1f}, {0.65f, 1.1f},
                              {0.65f, 1.15f}, {0.6f, 1.1f}, {0.6f, 1.15f}, {0.6f, 1.2f}};

struct Options {
  std::string model = "models/pocket-agent";
  std::string conversations;
  std::string images;
  std::string output;
  int fit = 40;
  int clip = 6;
  bool equalize_values = true;
};

// A conversation as tokens and pictures, independent of how the model's cache is calibrated.
struct Sample {
  Prompt prompt;
  MropePositions positions;
  std::vector<VisualFeatures> features;  // of the prompt's images, once RunSample has made them
  std::vector<size_t> predicted;         // rows whose next token the model would have generated
};

struct Inputs {
  const ChatTemplate& chat;
  PreprocessorConfig preprocessor;
  std::string images;
  std::map<std::string, std::shared_ptr<const ImagePatches>> patches;  // by path

  Result<Sample> Prepare(const Json& line) {
    ASSIGN_OR_RETURN(const Conversation conversation,
                     ParseConversation(line["messages"], line.value("tools", Json())));
    std::vector<std::shared_ptr<const ImagePatches>> pictures;
    for (const Message& message : conversation.messages) {
      for (const ContentPart& part : message.content) {
        if (part.kind != ContentPart::Kind::kImage) continue;
        std::shared_ptr<const ImagePatches>& entry = patches[part.text];
        if (entry == nullptr) {
          ASSIGN_OR_RETURN(const std::string bytes, ReadFile(images + "/" + part.text, size_t{64} << 20));
          ASSIGN_OR_RETURN(ImagePatches made, PreprocessImage(bytes, ImageLimits(), preprocessor));
          entry = std::make_shared<const ImagePatches>(std::move(made));
        }
        pictures.push_back(entry);
      }
    }
    TemplateOptions template_options;
    template_options.add_generation_prompt = false;
    Sample sample;
    ASSIGN_OR_RETURN(sample.prompt,
                     chat.Render(conversation, pictures, preprocessor.merge_size, template_options));
    std::vector<ImageRun> runs;
    for (const PromptImage& image : sample.prompt.images) {
      runs.push_back({image.begin, image.patches->grid_h / preprocessor.merge_size,
                      image.patches->grid_w / preprocessor.merge_size});
    }
    sample.positions = ComputePositions(static_cast<int32_t>(sample.prompt.tokens.size()), runs);
    for (const TagSpan& span : sample.prompt.spans) {
      if (span.semantic != Semantic::kAssistant && span.semantic != Semantic::kReasoning &&
          span.semantic != Semantic::kToolCall) {
        continue;
      }
      for (int32_t token = std::max(1, span.begin); token < span.end; ++token) {
        sample.predicted.push_back(static_cast<size_t>(token) - 1);
      }
    }
    return sample;
  }
};

// Runs a sample through a cache of `format` and leaves the sequence for reading.
Result<std::unique_ptr<SingleSequence>> RunSample(Model* model, const Inputs& inputs, Format format,
                                                  int chunk, bool all_logits, Sample* sample,
                                                  std::vector<float>* logits) {
  const std::vector<PromptImage>& images = sample->prompt.images;
  std::vector<VisualFeatures>& features = sample->features;
  for (size_t i = features.size(); i < images.size(); ++i) {
    features.push_back(model->Encode(*images[i].patches, inputs.preprocessor));
  }
  std::vector<PlacedImage> placed;
  for (size_t i = 0; i < images.size(); ++i) placed.push_back({images[i].begin, &features[i]});
  const auto n = static_cast<int32_t>(sample->prompt.tokens.size());
  ASSIGN_OR_RETURN(std::unique_ptr<SingleSequence> sequence, SingleSequence::Create(model, format, n));
  RETURN_IF_ERROR(sequence->Append(sample->prompt.tokens, sample->positions.positions, placed, chunk,
                                   all_logits ? n : 0, logits));
  return sequence;
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
std::vector<float> Factors(const Energy& energy) {
  constexpr double kTiny = 1e-20;
  std::vector<double> logs;
  double mean = 0;
  for (size_t c = 0; c < energy.keys.size(); ++c) {
    logs.push_back(0.25 * (std::log(energy.keys[c] + kTiny) - std::log(energy.queries[c] + kTiny)));
    mean += logs.back() / static_cast<double>(energy.keys.size());
  }
  std::vector<float> factors;
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
    double sum_a = 0;
    double sum_b = 0;
    for (size_t i = 0; i < vocab; ++i) {
      sum_a += std::exp(double{a[i]});
      sum_b += std::exp(double{b[i]});
    }
    const double shift = std::log(sum_a) - std::log(sum_b);
    double kl = 0;
    for (size_t i = 0; i < vocab; ++i) {
      kl += std::exp(double{a[i]}) / sum_a * (double{a[i]} - b[i] - shift);
    }
    total += std::sqrt(std::max(0.0, kl));
  }
  return total / static_cast<double>(rows.size());
}

// How far a cache of `format` leads from a BF16 one, over what the model says in the samples.
Result<double> Divergence(const Options& options, const KvCalibration& calibration, Format format,
                          const Inputs& inputs, std::vector<Sample>* samples,
                          const std::vector<std::vector<float>>& reference) {
  ASSIGN_OR_RETURN(const std::unique_ptr<Model> model,
                   Model::Load(options.model, {.precision = Precision::kF32, .calibration = calibration}));
  const auto vocab = static_cast<size_t>(model->config().text.vocab_size);
  double mean = 0;
  std::vector<float> logits;
  for (size_t i = 0; i < samples->size(); ++i) {
    Sample& sample = (*samples)[i];
    ASSIGN_OR_RETURN(const auto sequence,
                     RunSample(model.get(), inputs, format, kClipChunk, true, &sample, &logits));
    mean += MeanRootKl(reference[i], logits, vocab, sample.predicted) / static_cast<double>(samples->size());
  }
  const ClipRatios& c = calibration.clip;
  fmt::print(
      "{}: mean root KL from a bf16 cache {:.4e}; keys: clip {:.3g}, gain {:.3g}; values: {:.3g}, {:.3g}\n",
      Name(format), mean, c.k2, c.k2_gain, c.v2, c.v2_gain);
  std::fflush(stdout);
  return mean;
}

// The clip ratio and gain of one side that serve a format best, from no clip on down to half a range.
Status FitSide(const Options& options, Format format, float ClipRatios::*clip, float ClipRatios::*gain,
               const Inputs& inputs, std::vector<Sample>* samples,
               const std::vector<std::vector<float>>& reference, KvCalibration* calibration) {
  double best = INFINITY;
  ClipRatios chosen;
  for (const Levels& levels : kLevels) {
    calibration->clip.*clip = levels.inner * levels.gain;
    calibration->clip.*gain = levels.gain;
    ASSIGN_OR_RETURN(const double d, Divergence(options, *calibration, format, inputs, samples, reference));
    if (d < best) {
      best = d;
      chosen = calibration->clip;
    }
  }
  calibration->clip = chosen;
  return OkStatus();
}

Status Fit(const Options& options) {
  ASSIGN_OR_RETURN(const Tokenizer tokenizer, Tokenizer::Load(options.model));
  ASSIGN_OR_RETURN(const ChatTemplate chat, ChatTemplate::Load(options.model, tokenizer));
  ASSIGN_OR_RETURN(const PreprocessorConfig preprocessor, LoadPreprocessorConfig(options.model));
  Inputs inputs{chat, preprocessor, options.images, {}};
  ASSIGN_OR_RETURN(const ModelConfig config, LoadModelConfig(options.model));
  const TextConfig& text = config.text;
  std::vector<Energy> energies(static_cast<size_t>(text.num_layers));
  bool fitting = true;
  // With the paper's codec attention reads queries and keys as they are: neither rotated nor equalized.
  ModelOptions plain_options{.precision = Precision::kF32, .codec = Codec::kPaper};
  plain_options.observer = [&](int layer, int64_t rows, const float* q, const float* k, const float* v) {
    if (!fitting) return;
    Energy& energy = energies[static_cast<size_t>(layer)];
    const int64_t width = int64_t{text.num_kv_heads} * text.head_dim;
    Energy::Add(q, rows * text.num_heads * text.head_dim, text.head_dim / 2, &energy.queries);
    Energy::Add(k, rows * width, text.head_dim / 2, &energy.keys);
    Energy::Add(v, rows * width, width, &energy.values);
  };
  ASSIGN_OR_RETURN(std::unique_ptr<Model> model, Model::Load(options.model, plain_options));

  std::ifstream lines(options.conversations);
  if (!lines) return NotFound("cannot open '" + options.conversations + "'");
  std::vector<Sample> samples;
  std::vector<std::vector<float>> reference;
  std::string line;
  int64_t tokens = 0;
  for (int i = 0; i < options.fit + options.clip && std::getline(lines, line); ++i) {
    ASSIGN_OR_RETURN(const Json json,
                     ParseJson(line, fmt::format("{}, line {}", options.conversations, i + 1)));
    ASSIGN_OR_RETURN(Sample sample, inputs.Prepare(json));
    fitting = i < options.fit;
    std::vector<float> logits;
    ASSIGN_OR_RETURN(const auto sequence,
                     RunSample(model.get(), inputs, Format::kBf16, kFitChunk, !fitting, &sample, &logits));
    if (fitting) {
      tokens += sequence->length();
    } else {
      samples.push_back(std::move(sample));
      reference.push_back(std::move(logits));
    }
  }
  if (tokens == 0) return InvalidArgument("'" + options.conversations + "' holds no conversation to fit on");
  model.reset();

  KvCalibration calibration;
  calibration.calibrated = true;
  fmt::print("{} tokens\n", tokens);
  ASSIGN_OR_RETURN(const TensorSource source, TensorSource::Open(options.model));
  const std::string prefix =
      config.architecture == Architecture::kQwen3Vl ? "model.language_model." : "model.";
  for (size_t layer = 0; layer < energies.size(); ++layer) {
    calibration.key_equalization.push_back(Factors(energies[layer]));
    const std::vector<float>& f = calibration.key_equalization.back();
    const auto [low, high] = std::minmax_element(f.begin(), f.end());
    fmt::print("layer {}: factors of keys from {:.3f} to {:.2f}", layer, *low, *high);
    if (options.equalize_values) {
      ASSIGN_OR_RETURN(
          const std::vector<float> o_proj,
          source.GetF32(fmt::format("{}layers.{}.self_attn.o_proj.weight", prefix, layer),
                        {text.hidden_size, int64_t{text.num_heads} * text.head_dim}, Fill::kNormal));
      calibration.value_equalization.push_back(ValueFactors(energies[layer], tokens, text, o_proj));
      const std::vector<float>& values = calibration.value_equalization.back();
      const auto [least, most] = std::minmax_element(values.begin(), values.end());
      fmt::print(", of values from {:.3g} to {:.3g}", *least, *most);
    }
    fmt::print("\n");
  }
  if (!samples.empty()) {
    // Values first, beside 4-bit keys, whose errors do not drown theirs; then keys.
    RETURN_IF_ERROR(FitSide(options, Format::kK4V2, &ClipRatios::v2, &ClipRatios::v2_gain, inputs, &samples,
                            reference, &calibration));
    RETURN_IF_ERROR(FitSide(options, Format::kK2V2, &ClipRatios::k2, &ClipRatios::k2_gain, inputs, &samples,
                            reference, &calibration));
  }
  return SaveKvCalibration(options.output, calibration, text.head_dim);
}

int Main(int argc, char** argv) {
  Options options;
  CLI::App app{"Fits kv_calibration.json of a checkpoint on recorded conversations"};
  app.add_option("--model", options.model, "checkpoint directory")->capture_default_str();
  app.add_option("--conversations", options.conversations, "JSON lines: {\"messages\", \"tools\"}")
      ->required();
  app.add_option("--images", options.images, "directory that image paths are relative to")->required();
  app.add_option("--output", options.output, "file to write")->required();
  app.add_option("--fit", options.fit, "conversations for the factors")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  app.add_option("--clip", options.clip, "further conversations for clips and gains; 0 keeps them at 1")
      ->check(CLI::Range(0, 1 << 20))
      ->capture_default_str();
  app.add_flag("!--no-value-equalization", options.equalize_values, "Leave the value channels as they are");
  CLI11_PARSE(app, argc, argv);
  const Status status = Fit(options);
  if (!status.ok()) fmt::print(stderr, "fit_kv_calibration: {}\n", status.message());
  return status.ok() ? 0 : 1;
}

}  // namespace
}  // namespace triaxial

int main(int argc, char** argv) { return triaxial::Main(argc, argv); }
