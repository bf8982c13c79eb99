#include "calib/sensitivity.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "base/check.h"
#include "base/parallel.h"
#include "engine/prepare.h"
#include "model/tensor_source.h"
#include "model/weights.h"
#include "ops/kv_codec.h"
#include "ops/matmul.h"

namespace triaxial {
namespace {

constexpr int32_t kStep = 512;  // a multiple of kBlockTokens, so that steps end between blocks
constexpr int32_t kNoLogits = std::numeric_limits<int32_t>::max();
constexpr int kLayersOfSmallModels = 16;
constexpr int kLayersOfLargeModels = 4;
// Of the exact run's logits, which kKl keeps: 256 MiB.
constexpr int64_t kMaxKeptLogits = int64_t{1} << 26;

// Stores what is at `rows` of k and v, [rows][num_kv_heads][head_dim] from the start of a block on, as
// `format` does.
void StoreRows(const KvGeometry& g, const ClipRatios& clip, Format format, const std::vector<bool>& chosen,
               int64_t rows, float* k, float* v) {
  const int64_t stride = int64_t{g.num_kv_heads} * g.head_dim;
  const int64_t blocks = (rows + kBlockTokens - 1) / kBlockTokens;
  ParallelFor(blocks * g.num_kv_heads, [&](int64_t task) {
    const int64_t first = task / g.num_kv_heads * kBlockTokens;
    const int64_t offset = task % g.num_kv_heads * g.head_dim;
    const auto count = static_cast<int>(std::min<int64_t>(kBlockTokens, rows - first));
    std::vector<float> exact[2], stored;
    for (const int side : {0, 1}) {
      exact[side].resize(static_cast<size_t>(int64_t{kBlockTokens} * g.head_dim));
      for (int t = 0; t < count; ++t) {
        RoundToBf16((side == 0 ? k : v) + (first + t) * stride + offset, g.head_dim,
                    exact[side].data() + int64_t{t} * g.head_dim);
      }
    }
    std::vector<uint8_t> block(static_cast<size_t>(HeadBytes(g, Format::kBf16)));
    EncodeBlock(g, format, clip, exact[0].data(), exact[1].data(), g.head_dim, count, block.data());
    stored.resize(exact[0].size());
    for (const Side side : {Side::kK, Side::kV}) {
      DecodeSide(g, format, side, block.data(), count, stored.data());
      float* to = side == Side::kK ? k : v;
      for (int t = 0; t < count; ++t) {
        if (!chosen[static_cast<size_t>(first + t)]) continue;
        std::copy_n(stored.data() + int64_t{t} * g.head_dim, g.head_dim, to + (first + t) * stride + offset);
      }
    }
  });
}

// x[i] <- log of the softmax of x.
void ToLogProbabilities(float* x, int64_t n) {
  const float top = *std::max_element(x, x + n);
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += std::exp(double{x[i]} - top);
  const auto shift = static_cast<float>(top + std::log(sum));
  for (int64_t i = 0; i < n; ++i) x[i] -= shift;
}

double Divergence(const float* log_p, const float* log_q, int64_t n) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += std::exp(double{log_p[i]}) * (double{log_p[i]} - log_q[i]);
  return std::max(0.0, sum);
}

// Rows whose next token the model wrote; if there are none, all rows that have a next token.
std::vector<int32_t> PredictedRows(std::span<const TokenTurn> tokens) {
  std::vector<int32_t> rows;
  for (size_t i = 1; i < tokens.size(); ++i) {
    const Semantic semantic = tokens[i].semantic;
    if (semantic == Semantic::kAssistant || semantic == Semantic::kReasoning ||
        semantic == Semantic::kToolCall) {
      rows.push_back(static_cast<int32_t>(i) - 1);
    }
  }
  if (!rows.empty()) return rows;
  for (size_t i = 0; i + 1 < tokens.size(); ++i) rows.push_back(static_cast<int32_t>(i));
  return rows;
}

// Of each head, W' W / hidden_size, where W is the columns of o_proj that read it, in the basis in which
// values are stored: [num_heads][head_dim][head_dim].
Result<std::vector<float>> OutputGram(const TensorSource& source, const Model& model, int layer) {
  const TextConfig& text = model.config().text;
  const int64_t dim = text.head_dim, width = text.num_heads * dim, hidden = text.hidden_size;
  const Codec codec = model.geometry().codec;
  const LinearPart part =
      EqualizedValues(text, codec, model.calibration(),
                      TextPrefix(model.config()) + "layers." + std::to_string(layer) + ".self_attn.", layer)
          .o;
  ASSIGN_OR_RETURN(std::vector<float> w,
                   source.GetF32(part.name + ".weight", {hidden, width}, Fill::kNormal));
  ApplyFactors(part, Element::kF32, width, w.data());
  if (codec == Codec::kRotated) Hadamard(w.data(), hidden * text.num_heads, text.head_dim);
  std::vector<float> gram(static_cast<size_t>(width * dim));
  ParallelFor(text.num_heads, [&](int64_t head) {
    std::vector<float> columns(static_cast<size_t>(dim * hidden));  // [dim][hidden]
    for (int64_t row = 0; row < hidden; ++row) {
      for (int64_t c = 0; c < dim; ++c) {
        columns[static_cast<size_t>(c * hidden + row)] = w[static_cast<size_t>(row * width + head * dim + c)];
      }
    }
    float* own = gram.data() + head * dim * dim;
    MatMulTransposed(dim, dim, hidden, columns.data(), hidden, columns.data(), hidden, own, dim);
    for (int64_t i = 0; i < dim * dim; ++i) own[i] /= static_cast<float>(hidden);
  });
  return gram;
}

}  // namespace

// A conversation as the model's steps take it.
struct SensitivityMeter::Input {
  const Prompt& prompt;
  std::vector<TokenTurn> tokens;
  MropePositions positions;
  std::vector<VisualFeatures> features;
};

std::string_view Name(Metric metric) {
  switch (metric) {
    case Metric::kMse:
      return "mse";
    case Metric::kOutput:
      return "output";
    case Metric::kKl:
      return "kl";
  }
  return "";
}

std::vector<int> SpreadLayers(int num_layers, int count) {
  if (count <= 0) count = num_layers <= kLayersOfSmallModels ? num_layers : kLayersOfLargeModels;
  count = std::min(count, num_layers);
  std::vector<int> layers;
  layers.reserve(static_cast<size_t>(count));
  for (int i = 0; i < count; ++i) layers.push_back((2 * i + 1) * num_layers / (2 * count));
  return layers;
}

Result<std::unique_ptr<SensitivityMeter>> SensitivityMeter::Create(const std::string& directory,
                                                                   const ModelOptions& model_options,
                                                                   const PreprocessorConfig& preprocessor,
                                                                   const SensitivityOptions& options) {
  if (options.metric == Metric::kKl && options.tags_at == TagTime::kTurn) {
    return InvalidArgument(
        "the metric kl runs the model once for each tag, so a token has one tag for all queries; use it with "
        "tags as they are at the conversation's end");
  }
  std::unique_ptr<SensitivityMeter> meter(new SensitivityMeter(preprocessor, options));
  ModelOptions with_observer = model_options;
  with_observer.observer = [self = meter.get()](int layer, int64_t rows, const float* q, float* k, float* v) {
    if (self->observer_) self->observer_(layer, rows, q, k, v);
  };
  ASSIGN_OR_RETURN(meter->model_, Model::Load(directory, with_observer));
  const int num_layers = meter->model_->config().text.num_layers;
  for (const int layer : options.layers) {
    if (layer >= 0 && layer < num_layers) continue;
    return InvalidArgument("layer " + std::to_string(layer) + " is not one of the model's " +
                           std::to_string(num_layers) + ", which are numbered from 0");
  }
  if (options.layers.empty()) meter->options_.layers = SpreadLayers(num_layers, 0);
  if (options.metric == Metric::kOutput) {
    ASSIGN_OR_RETURN(const TensorSource source, TensorSource::Open(directory));
    for (const int layer : meter->options_.layers) {
      ASSIGN_OR_RETURN(std::vector<float> gram, OutputGram(source, *meter->model_, layer));
      meter->grams_.push_back(std::move(gram));
    }
  }
  return meter;
}

Status SensitivityMeter::Run(const Input& input, int32_t first_wanted, const StepFunction& step) {
  const auto total = static_cast<int32_t>(input.tokens.size());
  ASSIGN_OR_RETURN(const std::unique_ptr<SingleSequence> sequence,
                   SingleSequence::Create(model_.get(), Format::kBf16, total));
  std::vector<float> logits;
  for (int32_t begin = 0; begin < total; begin += kStep) {
    const int32_t end = std::min(total, begin + kStep);
    const auto count = static_cast<size_t>(end - begin);
    std::vector<PlacedImage> images;
    for (size_t i = 0; i < input.features.size(); ++i) {
      images.push_back({input.prompt.images[i].begin - begin, &input.features[i]});
    }
    RETURN_IF_ERROR(
        sequence->Append(std::span(input.prompt.tokens).subspan(static_cast<size_t>(begin), count),
                         std::span(input.positions.positions).subspan(static_cast<size_t>(begin), count),
                         images, kStep, end > first_wanted ? end - begin : 0, &logits));
    if (!step(begin, end, logits)) return Cancelled("the measurement was interrupted");
  }
  return OkStatus();
}

Result<ConversationLoss> SensitivityMeter::Measure(const Prompt& prompt,
                                                   const std::function<bool(double)>& progress,
                                                   std::vector<LayerCapture>* captures) {
  CHECK(!prompt.tokens.empty());
  Input input{prompt, TurnsOf(prompt.spans), {}, {}};
  CHECK(input.tokens.size() == prompt.tokens.size());
  for (const PromptImage& image : prompt.images) {
    input.features.push_back(model_->Encode(*image.patches, preprocessor_));
  }
  input.positions = PositionsOf(prompt, preprocessor_);
  Result<ConversationLoss> loss = options_.metric == Metric::kKl
                                      ? MeasurePredictions(input, progress)
                                      : MeasureAttention(input, progress, captures);
  observer_ = nullptr;
  if (!loss.ok()) return loss;
  loss->tokens = TokensByTag(input.tokens, options_.tags_at);
  loss->length = static_cast<int64_t>(input.tokens.size());
  return loss;
}

Result<ConversationLoss> SensitivityMeter::MeasureAttention(const Input& input,
                                                            const std::function<bool(double)>& progress,
                                                            std::vector<LayerCapture>* captures) {
  const KvGeometry geometry = model_->geometry();
  const int num_heads = model_->config().text.num_heads;
  std::vector<std::unique_ptr<TagAttention>> layers(static_cast<size_t>(geometry.num_layers));
  for (size_t i = 0; i < options_.layers.size(); ++i) {
    const TagAttention::Shape shape = {geometry, model_->calibration().clip, num_heads,
                                       grams_.empty() ? nullptr : grams_[i].data()};
    layers[static_cast<size_t>(options_.layers[i])] =
        std::make_unique<TagAttention>(shape, input.tokens, options_.tags_at);
  }
  if (captures != nullptr) {
    captures->clear();
    for (const int layer : options_.layers) captures->push_back({layer, {}, {}, {}});
  }
  observer_ = [&](int layer, int64_t rows, const float* q, float* k, float* v) {
    TagAttention* attention = layers[static_cast<size_t>(layer)].get();
    if (attention == nullptr) return;
    attention->Append(rows, q, k, v);
    if (captures == nullptr) return;
    for (LayerCapture& capture : *captures) {
      if (capture.layer != layer) continue;
      const int64_t kv_width = int64_t{geometry.num_kv_heads} * geometry.head_dim;
      capture.q.insert(capture.q.end(), q, q + rows * num_heads * geometry.head_dim);
      capture.k.insert(capture.k.end(), k, k + rows * kv_width);
      capture.v.insert(capture.v.end(), v, v + rows * kv_width);
    }
  };
  const double total = static_cast<double>(input.tokens.size());
  RETURN_IF_ERROR(Run(input, kNoLogits, [&](int32_t, int32_t end, const std::vector<float>&) {
    // Work grows with the square of the length.
    return progress(end / total * (end / total));
  }));
  ConversationLoss result;
  for (const std::unique_ptr<TagAttention>& layer : layers) {
    if (layer == nullptr) continue;
    for (size_t t = 0; t < kTags; ++t) {
      for (size_t f = 0; f < kFormats; ++f) {
        double largest = 0;
        double sum = 0;
        for (const TagAttention::Errors& head : layer->errors()) {
          largest = std::max(largest, head.sum[t][f]);
          sum += head.sum[t][f];
        }
        result.loss[t][f] += (options_.aggregate == Aggregate::kMax ? largest : sum / num_heads) / total;
      }
    }
  }
  return result;
}

Result<ConversationLoss> SensitivityMeter::MeasurePredictions(const Input& input,
                                                              const std::function<bool(double)>& progress) {
  const int64_t vocab = model_->config().text.vocab_size;
  std::vector<int32_t> wanted = PredictedRows(input.tokens);
  ConversationLoss result;
  if (wanted.empty()) return result;
  const auto kept = static_cast<size_t>(std::max<int64_t>(1, kMaxKeptLogits / vocab));
  if (wanted.size() > kept) wanted.erase(wanted.begin(), wanted.end() - static_cast<int64_t>(kept));
  std::vector<float> exact(wanted.size() * static_cast<size_t>(vocab));
  // Calls fn(index into wanted, logits of that row) for those in a step.
  const auto for_wanted = [&](int32_t begin, int32_t end, const std::vector<float>& logits, const auto& fn) {
    for (size_t i = 0; i < wanted.size(); ++i) {
      if (wanted[i] >= begin && wanted[i] < end) fn(i, logits.data() + (wanted[i] - begin) * vocab);
    }
  };
  const TagTotals tokens = TokensByTag(input.tokens, TagTime::kEnd);
  const auto tags =
      static_cast<double>(std::count_if(tokens.begin(), tokens.end(), [](double n) { return n > 0; }));
  const double passes = 1 + tags * (kFormats - 1);
  double done = 0;
  RETURN_IF_ERROR(
      Run(input, wanted.front(), [&](int32_t begin, int32_t end, const std::vector<float>& logits) {
        for_wanted(begin, end, logits, [&](size_t i, const float* row) {
          float* to = exact.data() + static_cast<int64_t>(i) * vocab;
          std::copy_n(row, vocab, to);
          ToLogProbabilities(to, vocab);
        });
        return progress(done / passes);
      }));
  done = 1;
  std::vector<float> row_logits(static_cast<size_t>(vocab));
  std::vector<bool> chosen;
  for (int t = 0; t < kTags; ++t) {
    if (tokens[static_cast<size_t>(t)] <= 0) continue;
    for (int f = 0; f < kFormats; ++f) {
      if (static_cast<Format>(f) == Format::kBf16) continue;
      std::vector<int32_t> at(static_cast<size_t>(model_->geometry().num_layers), 0);
      observer_ = [&](int layer, int64_t rows, const float*, float* k, float* v) {
        int32_t& begin = at[static_cast<size_t>(layer)];
        chosen.assign(static_cast<size_t>(rows), false);
        for (int64_t i = 0; i < rows; ++i) {
          const TokenTurn& token = input.tokens[static_cast<size_t>(begin + i)];
          const Tag tag{Age(token.turn, input.tokens.back().turn), token.modal, token.semantic};
          chosen[static_cast<size_t>(i)] = tag.index() == t;
        }
        begin += static_cast<int32_t>(rows);
        StoreRows(model_->geometry(), model_->calibration().clip, static_cast<Format>(f), chosen, rows, k, v);
      };
      double& loss = result.loss[static_cast<size_t>(t)][static_cast<size_t>(f)];
      RETURN_IF_ERROR(
          Run(input, wanted.front(), [&](int32_t begin, int32_t end, const std::vector<float>& logits) {
            for_wanted(begin, end, logits, [&](size_t i, const float* row) {
              std::copy_n(row, vocab, row_logits.data());
              ToLogProbabilities(row_logits.data(), vocab);
              loss += Divergence(exact.data() + static_cast<int64_t>(i) * vocab, row_logits.data(), vocab) /
                      static_cast<double>(wanted.size());
            });
            return progress(done / passes);
          }));
      done += 1;
    }
  }
  return result;
}

}  // namespace triaxial
