// Fits a checkpoint's kv_calibration.json (kv/calibration.h) on conversations: the RMS of every RoPE pair of
// key channels, and the clip ratios of 2-bit sides that keep the logits closest to those of a BF16 cache.
#include <fmt/core.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <cmath>
#include <fstream>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "base/file.h"
#include "base/json.h"
#include "kv/calibration.h"
#include "model/model.h"
#include "model/single_sequence.h"
#include "ops/kv_codec.h"
#include "text/chat_template.h"
#include "text/tokenizer.h"

namespace triaxial {
namespace {

constexpr int kFitChunk = 512;
// Short steps, so that nearly every token is read back quantized.
constexpr int kClipChunk = 64;
constexpr float kClips[] = {1.0f, 0.95f, 0.9f, 0.85f, 0.8f};

struct Options {
  std::string model = "models/pocket-agent";
  std::string conversations;
  std::string images;
  std::string output;
  int fit = 40;
  int clip = 8;
};

// A conversation as tokens and pictures, independent of the model's weights.
struct Sample {
  Prompt prompt;
  MropePositions positions;
  std::vector<size_t> predicted;  // rows whose next token the model would have generated
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
Result<std::unique_ptr<SingleSequence>> RunSample(Model* model, const Inputs& inputs, const Sample& sample,
                                                  Format format, int chunk, bool all_logits,
                                                  std::vector<float>* logits) {
  std::vector<VisualFeatures> features;
  features.reserve(sample.prompt.images.size());
  std::vector<PlacedImage> placed;
  for (const PromptImage& image : sample.prompt.images) {
    features.push_back(model->Encode(*image.patches, inputs.preprocessor));
    placed.push_back({image.begin, &features.back()});
  }
  const auto n = static_cast<int32_t>(sample.prompt.tokens.size());
  ASSIGN_OR_RETURN(std::unique_ptr<SingleSequence> sequence, SingleSequence::Create(model, format, n));
  RETURN_IF_ERROR(sequence->Append(sample.prompt.tokens, sample.positions.positions, placed, chunk,
                                   all_logits ? n : 0, logits));
  return sequence;
}

// Adds the squares of all stored keys to sums[layer][pair].
void AddSquares(const SingleSequence& sequence, std::vector<std::vector<double>>* sums) {
  const KvGeometry& g = sequence.arena().geometry();
  std::vector<float> keys(static_cast<size_t>(kBlockTokens * g.head_dim));
  for (const KvBlockRef& block : sequence.blocks()) {
    for (int layer = 0; layer < g.num_layers; ++layer) {
      std::vector<double>& of_layer = (*sums)[static_cast<size_t>(layer)];
      for (int head = 0; head < g.num_kv_heads; ++head) {
        DecodeSide(g, block.format, Side::kK,
                   sequence.arena().LayerData(layer) + block.unit_row * UnitRowBytes(g) +
                       int64_t{head} * HeadBytes(g, block.format),
                   block.tokens, keys.data());
        for (int i = 0; i < block.tokens * g.head_dim; ++i) {
          of_layer[static_cast<size_t>(i % g.head_dim % (g.head_dim / 2))] += double{keys[i]} * keys[i];
        }
      }
    }
  }
}

// RMS relative to the layer's geometric mean, to four digits.
std::vector<float> Factors(const std::vector<double>& sums) {
  double log_mean = 0;
  for (const double sum : sums) log_mean += 0.5 * std::log(sum + 1e-20) / static_cast<double>(sums.size());
  std::vector<float> factors;
  for (const double sum : sums) {
    factors.push_back(std::stof(fmt::format("{:.4g}", std::exp(0.5 * std::log(sum + 1e-20) - log_mean))));
  }
  return factors;
}

// Mean KL divergence of the second distribution from the first, over some rows of logits.
double MeanKl(const std::vector<float>& p, const std::vector<float>& q, size_t vocab,
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
    for (size_t i = 0; i < vocab; ++i) {
      total += std::exp(double{a[i]}) / sum_a * (double{a[i]} - b[i] - shift);
    }
  }
  return total / static_cast<double>(rows.size());
}

// Mean KL of a cache of `format` from a BF16 cache over what the model says in the samples.
Result<double> Divergence(const Options& options, const KvCalibration& calibration, Format format,
                          const Inputs& inputs, const std::vector<Sample>& samples,
                          const std::vector<std::vector<float>>& reference) {
  ASSIGN_OR_RETURN(const std::unique_ptr<Model> model,
                   Model::Load(options.model, {.precision = Precision::kF32, .calibration = calibration}));
  double sum = 0;
  std::vector<float> logits;
  for (size_t i = 0; i < samples.size(); ++i) {
    ASSIGN_OR_RETURN(const auto sequence,
                     RunSample(model.get(), inputs, samples[i], format, kClipChunk, true, &logits));
    sum += MeanKl(reference[i], logits, static_cast<size_t>(model->config().text.vocab_size),
                  samples[i].predicted);
  }
  return sum / static_cast<double>(samples.size());
}

Status Fit(const Options& options) {
  ASSIGN_OR_RETURN(const Tokenizer tokenizer, Tokenizer::Load(options.model));
  ASSIGN_OR_RETURN(const ChatTemplate chat, ChatTemplate::Load(options.model, tokenizer));
  ASSIGN_OR_RETURN(const PreprocessorConfig preprocessor, LoadPreprocessorConfig(options.model));
  Inputs inputs{chat, preprocessor, options.images, {}};
  // The paper's codec stores keys as they are: neither rotated nor equalized.
  ASSIGN_OR_RETURN(std::unique_ptr<Model> model,
                   Model::Load(options.model, {.precision = Precision::kF32, .codec = Codec::kPaper}));
  const TextConfig text = model->config().text;
  std::vector<std::vector<double>> sums(static_cast<size_t>(text.num_layers),
                                        std::vector<double>(static_cast<size_t>(text.head_dim / 2)));

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
    const bool for_clip = i >= options.fit;
    std::vector<float> logits;
    ASSIGN_OR_RETURN(const auto sequence,
                     RunSample(model.get(), inputs, sample, Format::kBf16, kFitChunk, for_clip, &logits));
    if (for_clip) {
      samples.push_back(std::move(sample));
      reference.push_back(std::move(logits));
    } else {
      AddSquares(*sequence, &sums);
      tokens += sequence->length();
    }
  }
  if (tokens == 0) return InvalidArgument("'" + options.conversations + "' holds no conversation to fit on");
  model.reset();

  KvCalibration calibration;
  calibration.calibrated = true;
  fmt::print("{} tokens\n", tokens);
  for (size_t layer = 0; layer < sums.size(); ++layer) {
    calibration.key_equalization.push_back(Factors(sums[layer]));
    const std::vector<float>& f = calibration.key_equalization.back();
    const auto [low, high] = std::minmax_element(f.begin(), f.end());
    fmt::print("layer {}: factors from {:.3f} to {:.2f}\n", layer, *low, *high);
  }
  if (!samples.empty()) {
    KvCalibration plain;
    plain.key_equalization.assign(sums.size(), std::vector<float>(sums[0].size(), 1.0f));
    plain.calibrated = true;
    ASSIGN_OR_RETURN(const double before,
                     Divergence(options, plain, Format::kK2V2, inputs, samples, reference));
    fmt::print("KL of k2v2 from a bf16 cache: {:.3g} without calibration\n", before);
    // The sides hardly interact, so each is searched with the other fixed, keys first.
    for (float ClipRatios::*side : {&ClipRatios::k2, &ClipRatios::v2}) {
      double best = INFINITY;
      float chosen = 1;
      for (const float clip : kClips) {
        calibration.clip.*side = clip;
        ASSIGN_OR_RETURN(const double kl,
                         Divergence(options, calibration, Format::kK2V2, inputs, samples, reference));
        fmt::print("KL {:.3g} with clips of keys {:.2f}, of values {:.2f}\n", kl, calibration.clip.k2,
                   calibration.clip.v2);
        if (kl < best) {
          best = kl;
          chosen = clip;
        }
      }
      calibration.clip.*side = chosen;
    }
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
  app.add_option("--clip", options.clip, "further conversations for the clips; 0 keeps them at 1")
      ->check(CLI::Range(0, 1 << 20))
      ->capture_default_str();
  CLI11_PARSE(app, argc, argv);
  const Status status = Fit(options);
  if (!status.ok()) fmt::print(stderr, "fit_kv_calibration: {}\n", status.message());
  return status.ok() ? 0 : 1;
}

}  // namespace
}  // namespace triaxial

int main(int argc, char** argv) { return triaxial::Main(argc, argv); }
