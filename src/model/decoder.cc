#include "model/decoder.h"

#include <algorithm>
#include <cmath>

#include "base/check.h"
#include "base/parallel.h"
#include "ops/elementwise.h"
#include "ops/kv_store.h"

namespace triaxial {

Decoder::Decoder(const TextConfig& config, Element element, Codec codec, const ClipRatios& clip)
    : config_(config),
      element_(element),
      geometry_{config.num_layers, config.num_kv_heads, config.head_dim, codec},
      clip_(clip),
      rope_(config.head_dim, config.rope_theta, config.mrope_section),
      attention_(element) {}

Result<std::unique_ptr<Decoder>> Decoder::Load(const ModelConfig& config, Element element, Codec codec,
                                               const KvCalibration& calibration, const TensorSource& source,
                                               LinearLoader* loader) {
  const TextConfig& c = config.text;
  const std::string prefix = TextPrefix(config);
  const int64_t hidden = c.hidden_size;
  const int64_t dim = c.head_dim;
  std::unique_ptr<Decoder> decoder(new Decoder(c, element, codec, calibration.clip));
  ASSIGN_OR_RETURN(decoder->embedding_,
                   source.Get(prefix + "embed_tokens.weight", {c.vocab_size, hidden}, Fill::kNormal));
  for (int i = 0; i < c.num_layers; ++i) {
    const std::string name = prefix + "layers." + std::to_string(i) + ".";
    const std::string attention = name + "self_attn.";
    Layer layer;
    ASSIGN_OR_RETURN(layer.input_norm, source.GetF32(name + "input_layernorm.weight", {hidden}, Fill::kOne));
    ASSIGN_OR_RETURN(layer.post_attention_norm,
                     source.GetF32(name + "post_attention_layernorm.weight", {hidden}, Fill::kOne));
    ASSIGN_OR_RETURN(layer.q_norm, source.GetF32(attention + "q_norm.weight", {dim}, Fill::kOne));
    ASSIGN_OR_RETURN(layer.k_norm, source.GetF32(attention + "k_norm.weight", {dim}, Fill::kOne));
    if (codec == Codec::kRotated && !calibration.key_equalization.empty()) {
      for (size_t channel = 0; channel < static_cast<size_t>(dim); ++channel) {
        const float factor =
            calibration.key_equalization[static_cast<size_t>(i)][channel % static_cast<size_t>(dim / 2)];
        layer.q_norm[channel] *= factor;
        layer.k_norm[channel] /= factor;
      }
    }
    ValueParts values = EqualizedValues(c, codec, calibration, attention, i);
    ASSIGN_OR_RETURN(layer.qkv, loader->Load({{attention + "q_proj", c.num_heads * dim},
                                              {attention + "k_proj", c.num_kv_heads * dim},
                                              values.v},
                                             {hidden}, Element::kF32, Epilogue::kNone, false));
    ASSIGN_OR_RETURN(layer.o,
                     loader->Load({values.o}, {c.num_heads * dim}, Element::kF32, Epilogue::kAdd, false));
    layer.output_factors = std::move(values.o.column_factors);
    ASSIGN_OR_RETURN(layer.gate_up, loader->Load({{name + "mlp.gate_proj", c.intermediate_size},
                                                  {name + "mlp.up_proj", c.intermediate_size}},
                                                 {hidden}, Element::kF32, Epilogue::kNone, false));
    ASSIGN_OR_RETURN(layer.down, loader->Load({{name + "mlp.down_proj", hidden}}, {c.intermediate_size},
                                              Element::kF32, Epilogue::kAdd, false));
    decoder->layers_.push_back(std::move(layer));
  }
  ASSIGN_OR_RETURN(decoder->final_norm_, source.GetF32(prefix + "norm.weight", {hidden}, Fill::kOne));
  ASSIGN_OR_RETURN(decoder->lm_head_,
                   loader->Load({{c.tie_word_embeddings ? prefix + "embed_tokens" : "lm_head", c.vocab_size}},
                                {hidden}, Element::kF32, Epilogue::kNone, false));
  decoder->small_parameters_ = c.num_layers * 2 * (hidden + dim) + hidden;
  if (!c.tie_word_embeddings) decoder->small_parameters_ += c.vocab_size * hidden;
  return decoder;
}

int64_t Decoder::weight_bytes() const {
  int64_t bytes = lm_head_.bytes() + config_.hidden_size * int64_t{sizeof(float)};
  for (const Layer& layer : layers_) {
    bytes += layer.qkv.bytes() + layer.o.bytes() + layer.gate_up.bytes() + layer.down.bytes();
    bytes += 2 * (config_.hidden_size + config_.head_dim) * int64_t{sizeof(float)};
  }
  return bytes;
}

void Decoder::Embed(const Batch& batch, float* hidden) const {
  const int64_t width = config_.hidden_size;
  ParallelFor(batch.rows(), [&](int64_t row) {
    const int32_t token = batch.tokens[static_cast<size_t>(row)];
    CHECK(token >= 0 && token < config_.vocab_size);
    float* out = hidden + row * width;
    // The table is rounded to the model's type, as the product with it is.
    if (element_ == Element::kF32) {
      embedding_.Read(token, 1, Element::kF32, out);
    } else {
      thread_local std::vector<uint16_t> rounded;
      rounded.resize(static_cast<size_t>(width));
      embedding_.Read(token, 1, element_, rounded.data());
      Widen(rounded.data(), element_, width, out);
    }
  });
  for (const VisualRows& visual : batch.visual) {
    CHECK(visual.row >= 0 && visual.row + visual.count <= batch.rows());
    CHECK(visual.feature >= 0 && visual.feature + visual.count <= visual.features->tokens);
    std::copy_n(visual.features->embeddings.data() + visual.feature * width, visual.count * width,
                hidden + visual.row * width);
  }
}

void Decoder::SplitHeads(const Layer& layer, int64_t rows, const float* qkv, const float* cos,
                         const float* sin, float* q, float* k, float* v) const {
  const int heads = config_.num_heads;
  const int kv_heads = config_.num_kv_heads;
  const int dim = config_.head_dim;
  const float eps = config_.rms_norm_eps;
  ParallelFor(rows, [&](int64_t r) {
    const float* in = qkv + r * (heads + 2 * kv_heads) * dim;
    float* q_row = q + r * heads * dim;
    float* k_row = k + r * kv_heads * dim;
    float* v_row = v + r * kv_heads * dim;
    const float* c = cos + r * dim / 2;
    const float* s = sin + r * dim / 2;
    NormRotate(in, heads, dim, layer.q_norm.data(), eps, c, s, q_row);
    NormRotate(in + heads * dim, kv_heads, dim, layer.k_norm.data(), eps, c, s, k_row);
    std::copy_n(in + (heads + kv_heads) * dim, kv_heads * dim, v_row);
    if (geometry_.codec == Codec::kRotated) {
      Hadamard(q_row, heads, dim);
      Hadamard(k_row, kv_heads, dim);
      Hadamard(v_row, kv_heads, dim);
    }
  });
}

void Decoder::JoinHeads(int64_t rows, float* attended, void* out) const {
  const int64_t width = int64_t{config_.num_heads} * config_.head_dim;
  ParallelFor(rows, [&](int64_t r) {
    float* row = attended + r * width;
    if (geometry_.codec == Codec::kRotated) Hadamard(row, config_.num_heads, config_.head_dim);
    Convert(row, 1.0f, width, element_, static_cast<uint8_t*>(out) + r * width * ByteSize(element_));
  });
}

// Behind JoinHeads; q has been read by then.
void Decoder::ShowOutputs(int index, int64_t rows, const float* attended) {
  const std::vector<float>& factors = layers_[static_cast<size_t>(index)].output_factors;
  if (factors.empty()) {
    output_observer_(index, rows, attended);
    return;
  }
  const auto width = static_cast<int64_t>(factors.size());
  auto* own = q_.Reserve<float>(rows * width);
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t i = 0; i < width; ++i)
      own[r * width + i] = attended[r * width + i] * factors[static_cast<size_t>(i)];
  }
  output_observer_(index, rows, own);
}

void Decoder::Forward(const Batch& batch, KvArena* arena, float* logits) {
  const int64_t rows = batch.rows();
  const int64_t width = config_.hidden_size;
  const int64_t inner_width = config_.intermediate_size;
  const int64_t q_width = int64_t{config_.num_heads} * config_.head_dim;
  const int64_t kv_width = int64_t{config_.num_kv_heads} * config_.head_dim;
  const int64_t size = ByteSize(element_);
  CHECK(batch.positions.size() == batch.tokens.size() && arena->geometry() == geometry_);

  if (rows == 0) {  // a step that only converts
    for (size_t i = 0; i < layers_.size(); ++i) {
      ConvertKv(geometry_, clip_, arena->LayerData(static_cast<int>(i)), batch.converts);
    }
    return;
  }
  auto* hidden = hidden_.Reserve<float>(rows * width);
  auto* cos = cos_.Reserve<float>(rows * config_.head_dim / 2);
  auto* sin = sin_.Reserve<float>(rows * config_.head_dim / 2);
  void* normed = normed_.Reserve(static_cast<size_t>(rows * width * size));
  auto* qkv = qkv_.Reserve<float>(rows * (q_width + 2 * kv_width));
  auto* q = q_.Reserve<float>(rows * q_width);
  auto* k = k_.Reserve<float>(rows * kv_width);
  auto* v = v_.Reserve<float>(rows * kv_width);
  auto* attended = attended_.Reserve<float>(rows * q_width);
  void* joined = joined_.Reserve(static_cast<size_t>(rows * q_width * size));
  auto* gate_up = gate_up_.Reserve<float>(rows * 2 * inner_width);
  void* inner = inner_.Reserve(static_cast<size_t>(rows * inner_width * size));

  Embed(batch, hidden);
  rope_.Angles(batch.positions, cos, sin);
  const float eps = config_.rms_norm_eps;
  for (size_t i = 0; i < layers_.size(); ++i) {
    const Layer& layer = layers_[i];
    uint8_t* cache = arena->LayerData(static_cast<int>(i));
    ConvertKv(geometry_, clip_, cache, batch.converts);

    RmsNorm(hidden, layer.input_norm.data(), eps, rows, width, element_, normed);
    layer.qkv.Run(normed, rows, qkv);
    SplitHeads(layer, rows, qkv, cos, sin, q, k, v);
    if (observer_) observer_(static_cast<int>(i), rows, q, k, v);
    attention_.Run({.geometry = geometry_,
                    .num_heads = config_.num_heads,
                    .scale = 1.0f / std::sqrt(static_cast<float>(config_.head_dim)),
                    .arena = cache,
                    .q = q,
                    .k = k,
                    .v = v,
                    .out = attended,
                    .sequences = batch.sequences});
    StoreKv(geometry_, clip_, cache, k, v, batch.stores);
    JoinHeads(rows, attended, joined);
    if (output_observer_) ShowOutputs(static_cast<int>(i), rows, attended);
    layer.o.Run(joined, rows, hidden);

    RmsNorm(hidden, layer.post_attention_norm.data(), eps, rows, width, element_, normed);
    layer.gate_up.Run(normed, rows, gate_up);
    SwiGlu(gate_up, rows, inner_width, element_, inner);
    layer.down.Run(inner, rows, hidden);

    for (const VisualRows& visual : batch.visual) {
      if (i >= visual.features->deepstack.size()) continue;
      const std::vector<float>& features = visual.features->deepstack[i];
      AddTo(features.data() + visual.feature * width, visual.count * width, hidden + visual.row * width);
    }
  }

  const auto wanted = static_cast<int64_t>(batch.logits_rows.size());
  if (wanted == 0) return;
  for (int64_t i = 0; i < wanted; ++i) {
    const int32_t row = batch.logits_rows[static_cast<size_t>(i)];
    CHECK(row >= 0 && row < rows);
    RmsNorm(hidden + row * width, final_norm_.data(), eps, 1, width, element_,
            static_cast<uint8_t*>(normed) + i * width * size);
  }
  lm_head_.Run(normed, wanted, logits);
}

}  // namespace triaxial
