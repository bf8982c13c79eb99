#include "model/cuda/decoder.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <numeric>

#include "base/check.h"
#include "model/rope.h"
#include "ops/cuda/elementwise.h"
#include "ops/cuda/sample.h"

namespace triaxial::cuda {
namespace {

// Numbers of rows that graphs are made for; a step takes the least that has room for it.
constexpr int64_t kGraphRows[] = {1,  2,  3,  4,  6,  8,   12,  16,  20,  24,  32, 40,
                                  48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256};
constexpr int64_t kMaxGraphRows = 256;
constexpr int64_t kTunedRows = 512;    // steps of fewer rows take what cuBLASLt proposes first
constexpr int64_t kLogitsChunk = 256;  // rows whose logits are on the device at a time
// Layers in the first graph of a step: some 1 ms of a 32B model, while launching the second takes 0.4 ms.
constexpr size_t kFirstLayers = 4;

int64_t GraphRows(int64_t rows) {
  return *std::lower_bound(std::begin(kGraphRows), std::end(kGraphRows), rows);
}

}  // namespace

Decoder::Decoder(const TextConfig& config, Codec codec, const ClipRatios& clip, LinearRunner* linears,
                 cudaStream_t stream)
    : config_(config),
      geometry_{config.num_layers, config.num_kv_heads, config.head_dim, codec},
      clip_(clip),
      linears_(linears),
      stream_(stream) {}

Decoder::~Decoder() { DropGraphs(); }

Result<std::unique_ptr<Decoder>> Decoder::Load(const ModelConfig& config, Codec codec,
                                               const KvCalibration& calibration, bool fp8,
                                               DeviceWeights* weights, LinearRunner* linears,
                                               cudaStream_t stream) {
  const TextConfig& c = config.text;
  const std::string prefix = TextPrefix(config);
  const int64_t hidden = c.hidden_size;
  const int64_t dim = c.head_dim;
  std::unique_ptr<Decoder> decoder(new Decoder(c, codec, calibration.clip, linears, stream));
  ASSIGN_OR_RETURN(decoder->embedding_,
                   weights->LoadMatrix(prefix + "embed_tokens.weight", c.vocab_size, hidden));
  for (int i = 0; i < c.num_layers; ++i) {
    const std::string name = prefix + "layers." + std::to_string(i) + ".";
    const std::string attention = name + "self_attn.";
    std::vector<float> factors(static_cast<size_t>(dim / 2), 1.0f);
    if (codec == Codec::kRotated && !calibration.key_equalization.empty()) {
      factors = calibration.key_equalization[static_cast<size_t>(i)];
    }
    Layer layer;
    ASSIGN_OR_RETURN(layer.input_norm,
                     weights->LoadVector(name + "input_layernorm.weight", hidden, Fill::kOne));
    ASSIGN_OR_RETURN(layer.post_attention_norm,
                     weights->LoadVector(name + "post_attention_layernorm.weight", hidden, Fill::kOne));
    ASSIGN_OR_RETURN(layer.q_norm, weights->LoadScaled(attention + "q_norm.weight", dim, factors, false));
    ASSIGN_OR_RETURN(layer.k_norm, weights->LoadScaled(attention + "k_norm.weight", dim, factors, true));
    const ValueParts values = EqualizedValues(c, codec, calibration, attention, i);
    ASSIGN_OR_RETURN(layer.qkv, weights->Load({{attention + "q_proj", c.num_heads * dim},
                                               {attention + "k_proj", c.num_kv_heads * dim},
                                               values.v},
                                              {hidden}, Element::kF32, Epilogue::kNone, false));
    ASSIGN_OR_RETURN(layer.o,
                     weights->Load({values.o}, {c.num_heads * dim}, Element::kF32, Epilogue::kAdd, false));
    ASSIGN_OR_RETURN(layer.gate_up, weights->Load({{name + "mlp.gate_proj", c.intermediate_size},
                                                   {name + "mlp.up_proj", c.intermediate_size}},
                                                  {hidden}, Element::kBf16, Epilogue::kNone, false));
    ASSIGN_OR_RETURN(layer.down, weights->Load({{name + "mlp.down_proj", hidden}}, {c.intermediate_size},
                                               Element::kF32, Epilogue::kAdd, false));
    if (fp8) {
      for (LinearWeights* linear : {&layer.qkv, &layer.o, &layer.gate_up, &layer.down})
        RETURN_IF_ERROR(weights->ToFp8(name, linear));
    }
    decoder->layers_.push_back(layer);
  }
  ASSIGN_OR_RETURN(decoder->final_norm_, weights->LoadVector(prefix + "norm.weight", hidden, Fill::kOne));
  if (c.tie_word_embeddings) {
    decoder->lm_head_ = {
        {.in = hidden, .out = c.vocab_size, .input = Element::kBf16}, decoder->embedding_, nullptr};
  } else {
    ASSIGN_OR_RETURN(decoder->lm_head_, weights->Load({{"lm_head", c.vocab_size}}, {hidden}, Element::kF32,
                                                      Epilogue::kNone, false));
  }
  const Mrope rope(c.head_dim, c.rope_theta, c.mrope_section);
  decoder->frequencies_ = static_cast<const float*>(
      weights->Keep(rope.frequencies().data(), rope.frequencies().size() * sizeof(float)));
  decoder->axes_ = static_cast<const uint8_t*>(weights->Keep(rope.axes().data(), rope.axes().size()));
  return decoder;
}

int64_t Decoder::weight_bytes() const {
  int64_t sum = lm_head_.bytes();
  for (const Layer& layer : layers_) {
    sum += layer.qkv.bytes() + layer.o.bytes() + layer.gate_up.bytes() + layer.down.bytes();
  }
  return sum;
}

bool Decoder::IsDecode(const Batch& batch) {
  const int32_t rows = batch.rows();
  if (rows == 0 || rows > kMaxGraphRows || !batch.visual.empty()) return false;
  const auto one_row = [](const auto& part) { return part.rows == 1; };
  return std::all_of(batch.sequences.begin(), batch.sequences.end(), one_row) &&
         std::all_of(batch.stores.begin(), batch.stores.end(), one_row);
}

void Decoder::Forward(const Batch& batch, const CudaKvMemory& memory, std::span<const TokenDraw> draws,
                      int32_t* tokens, float* logits, const std::function<void()>& meanwhile) {
  CHECK(draws.empty() || draws.size() == batch.logits_rows.size());
  for (const int32_t token : batch.tokens) CHECK(token >= 0 && token < config_.vocab_size);
  for (const int32_t row : batch.logits_rows) CHECK(row >= 0 && row < batch.rows());
  // What kPaper does depends on the plan, so that no graph can hold it.
  const bool decode = geometry_.codec == Codec::kRotated && IsDecode(batch);
  if (decode) {
    Decode(batch, memory, draws, logits);
  } else {
    Prefill(batch, memory, draws, logits);
  }
  meanwhile();
  CUDA_OK(cudaStreamSynchronize(stream_));
  const auto* sampled = reinterpret_cast<const int32_t*>(download_.data());
  for (size_t i = 0; i < draws.size(); ++i) {
    tokens[i] = sampled[decode ? static_cast<size_t>(batch.logits_rows[i]) : i];
  }
}

Decoder::Inputs Decoder::LayOut(const Sizes& sizes, bool on_device) {
  size_t bytes = 0;
  const auto take = [&](int64_t count, size_t size) {
    const size_t at = bytes;
    bytes += (static_cast<size_t>(count) * size + 255) / 256 * 256;
    return at;
  };
  const size_t tokens = take(sizes.rows, sizeof(int32_t));
  const size_t positions = take(3 * sizes.rows, sizeof(int32_t));
  const size_t places = take(sizes.rows, sizeof(RowPlace));
  const size_t stores = take(sizes.stores, sizeof(KvStore));
  const size_t groups = take(sizes.groups, sizeof(int32_t));
  const size_t logits_rows = take(sizes.logits, sizeof(int32_t));
  const size_t draws = take(sizes.logits, sizeof(TokenDraw));
  // Last, so that their number moves nothing else.
  const size_t convert_count = take(1, sizeof(int32_t));
  const size_t converts = take(sizes.converts, sizeof(KvConvert));
  input_bytes_ = bytes;
  if (on_device && bytes > inputs_.size()) {
    DropGraphs();
    inputs_.Reserve(2 * bytes);
  }
  uint8_t* base = on_device ? inputs_.data() : upload_.Reserve(bytes);
  Inputs in;
  in.tokens = reinterpret_cast<int32_t*>(base + tokens);
  in.positions = reinterpret_cast<int32_t*>(base + positions);
  in.places = reinterpret_cast<RowPlace*>(base + places);
  in.stores = reinterpret_cast<KvStore*>(base + stores);
  in.groups = reinterpret_cast<int32_t*>(base + groups);
  in.logits_rows = reinterpret_cast<int32_t*>(base + logits_rows);
  in.draws = reinterpret_cast<TokenDraw*>(base + draws);
  in.convert_count = reinterpret_cast<int32_t*>(base + convert_count);
  in.converts = reinterpret_cast<KvConvert*>(base + converts);
  return in;
}

void Decoder::Upload() {
  CUDA_OK(cudaMemcpyAsync(inputs_.data(), upload_.data(), input_bytes_, cudaMemcpyHostToDevice, stream_));
}

void Decoder::Reserve(int64_t rows, int64_t logits_rows) {
  logits_rows = std::min(logits_rows, kLogitsChunk);
  if (rows > reserved_rows_ || logits_rows > reserved_logits_) DropGraphs();
  rows = std::max(rows, reserved_rows_);
  logits_rows = std::max(logits_rows, reserved_logits_);
  const int64_t width = config_.hidden_size;
  const int64_t q_width = int64_t{config_.num_heads} * config_.head_dim;
  const int64_t qkv_width = q_width + int64_t{2} * config_.num_kv_heads * config_.head_dim;
  hidden_.Reserve<float>(rows * width);
  cos_.Reserve<float>(rows * config_.head_dim / 2);
  sin_.Reserve<float>(rows * config_.head_dim / 2);
  normed_.Reserve<uint16_t>(rows * width);
  qkv_.Reserve<float>(rows * qkv_width);
  heads_.Reserve<uint16_t>(rows * qkv_width);
  attended_.Reserve<uint16_t>(rows * q_width);
  gate_up_.Reserve<uint16_t>(rows * 2 * config_.intermediate_size);
  inner_.Reserve<uint16_t>(rows * config_.intermediate_size);
  if (layers_.front().qkv.scales != nullptr)
    linears_->ReserveFp8(rows, std::max({width, q_width, int64_t{config_.intermediate_size}}));
  logits_.Reserve<float>(logits_rows * config_.vocab_size);
  sampled_.Reserve<int32_t>(std::max(rows, logits_rows));
  download_.Reserve(static_cast<size_t>(std::max(rows, logits_rows)) * sizeof(int32_t));
  reserved_rows_ = rows;  // only once everything is there
  reserved_logits_ = logits_rows;
}

void Decoder::PlanAttention(const Batch& batch) {
  int64_t blocks = 0;
  for (const AttentionSequence& sequence : batch.sequences)
    blocks += static_cast<int64_t>(sequence.blocks.size());
  const auto sequences = static_cast<int>(batch.sequences.size());
  if (attention_ == nullptr || sequences > limits_.sequences || blocks > limits_.blocks ||
      batch.rows() > limits_.rows) {
    DropGraphs();
    attention_.reset();
    limits_.sequences = std::max({256, limits_.sequences, 2 * sequences});
    limits_.blocks = std::max({int64_t{1} << 16, limits_.blocks, 2 * blocks});
    limits_.rows = std::max({2048, limits_.rows, batch.rows()});
    attention_ = std::make_unique<Attention>(geometry_, config_.num_heads, limits_);
  }
  attention_->Plan(batch.sequences, stream_);
}

void Decoder::RunLayers(size_t begin, size_t end, const CudaKvMemory& memory, const Inputs& in, int64_t rows,
                        const Batch* prefill) {
  const int64_t width = config_.hidden_size;
  const int64_t inner_width = config_.intermediate_size;
  const int64_t heads = config_.num_heads, kv_heads = config_.num_kv_heads, dim = config_.head_dim;
  const int64_t stride = (heads + 2 * kv_heads) * dim;
  const float eps = config_.rms_norm_eps;
  const CacheRegion region = memory.region();
  auto* hidden = hidden_.data<float>();
  auto* normed = normed_.data<uint16_t>();
  auto* q = heads_.data<uint16_t>();
  for (size_t i = begin; i < end; ++i) {
    const Layer& layer = layers_[i];
    uint8_t* arena = region.data + static_cast<int64_t>(i) * region.layer_bytes;
    RmsNorm(hidden, nullptr, layer.input_norm, eps, rows, width, normed, stream_);
    linears_->Run(layer.qkv, normed, rows, qkv_.data(), stream_);
    FinishQkv({.geometry = geometry_,
               .num_heads = config_.num_heads,
               .rows = rows,
               .qkv = qkv_.data<float>(),
               .q_norm = layer.q_norm,
               .k_norm = layer.k_norm,
               .eps = eps,
               .cos = cos_.data<float>(),
               .sin = sin_.data<float>(),
               .out = q,
               .arena_layer = arena,
               .places = prefill == nullptr ? in.places : nullptr},
              stream_);
    const LayerAttention attention = {
        .arena = arena,
        .q = q,
        .k = q + heads * dim,
        .v = q + (heads + kv_heads) * dim,
        .q_stride = stride,
        .kv_stride = stride,
        .out = attended_.data<uint16_t>(),
        .scale = 1.0f / std::sqrt(static_cast<float>(dim)),
        // What FinishQkv puts into tails are places that no plan of this step reads.
        .overlap = prefill == nullptr};
    attention_->RunDecode(attention, stream_);
    if (prefill != nullptr) {
      if (attention_->has_prefill()) attention_->RunPrefill(attention, stream_);
      StoreKv(geometry_, clip_, {arena, 0, 1}, attention.k, attention.v, stride, in.stores, in.groups,
              stores_.groups[0], stream_);
    }
    linears_->Run(layer.o, attended_.data(), rows, hidden, stream_);

    RmsNorm(hidden, nullptr, layer.post_attention_norm, eps, rows, width, normed, stream_);
    linears_->Run(layer.gate_up, normed, rows, gate_up_.data(), stream_);
    SwiGlu(gate_up_.data<uint16_t>(), rows, inner_width, inner_.data<uint16_t>(), stream_);
    linears_->Run(layer.down, inner_.data(), rows, hidden, stream_);

    if (prefill == nullptr) continue;
    for (const VisualRows& visual : prefill->visual) {
      const auto levels = static_cast<int64_t>(visual.features->device_deepstack);
      if (static_cast<int64_t>(i) >= levels) continue;
      const float* features =
          visual.features->device.get() + (static_cast<int64_t>(i) + 1) * visual.features->tokens * width;
      AddTo(features + visual.feature * width, visual.count * width, hidden + visual.row * width, stream_);
    }
  }
}

void Decoder::Prefill(const Batch& batch, const CudaKvMemory& memory, std::span<const TokenDraw> draws,
                      float* logits) {
  const int64_t rows = batch.rows();
  const int64_t width = config_.hidden_size;
  const auto wanted = static_cast<int64_t>(batch.logits_rows.size());
  ListStores(batch.stores, &stores_);
  const Sizes sizes = {rows, static_cast<int64_t>(stores_.stores.size()),
                       static_cast<int64_t>(stores_.groups.size()),
                       static_cast<int64_t>(batch.converts.size()), wanted};
  const Inputs host = LayOut(sizes, false);
  std::copy(batch.tokens.begin(), batch.tokens.end(), host.tokens);
  std::memcpy(host.positions, batch.positions.data(), batch.positions.size() * sizeof(batch.positions[0]));
  std::copy(stores_.stores.begin(), stores_.stores.end(), host.stores);
  std::copy(stores_.groups.begin(), stores_.groups.end(), host.groups);
  std::copy(batch.converts.begin(), batch.converts.end(), host.converts);
  *host.convert_count = static_cast<int32_t>(batch.converts.size());
  std::copy(batch.logits_rows.begin(), batch.logits_rows.end(), host.logits_rows);
  std::copy(draws.begin(), draws.end(), host.draws);
  Reserve(rows, wanted);
  // Full steps have one size, others any: those that come back are worth half a second.
  if (rows >= kTunedRows && ++seen_[rows] == 3) Tune(rows);
  const Inputs in = LayOut(sizes, true);
  Upload();
  ConvertKv(geometry_, clip_, memory.region(), in.converts, in.convert_count,
            static_cast<int>(batch.converts.size()), stream_);
  if (rows == 0) return;  // a step that only converts
  PlanAttention(batch);

  auto* hidden = hidden_.data<float>();
  EmbedTokens(in.tokens, embedding_, rows, width, hidden, stream_);
  for (const VisualRows& visual : batch.visual) {
    CHECK(visual.row >= 0 && visual.row + visual.count <= rows);
    CHECK(visual.feature >= 0 && visual.feature + visual.count <= visual.features->tokens);
    const float* features = visual.features->device.get();
    CHECK(features != nullptr);
    CUDA_OK(cudaMemcpyAsync(hidden + visual.row * width, features + visual.feature * width,
                            static_cast<size_t>(visual.count * width) * sizeof(float),
                            cudaMemcpyDeviceToDevice, stream_));
  }
  MropeAngles(in.positions, frequencies_, axes_, rows, config_.head_dim / 2, cos_.data<float>(),
              sin_.data<float>(), stream_);
  RunLayers(0, layers_.size(), memory, in, rows, &batch);

  for (int64_t first = 0; first < wanted; first += reserved_logits_) {
    const int64_t count = std::min(wanted - first, reserved_logits_);
    RmsNorm(hidden, in.logits_rows + first, final_norm_, config_.rms_norm_eps, count, width,
            normed_.data<uint16_t>(), stream_);
    linears_->Run(lm_head_, normed_.data(), count, logits_.data(), stream_);
    if (!draws.empty()) {
      SampleTokens(logits_.data<float>(), count, config_.vocab_size, in.draws + first,
                   sampled_.data<int32_t>(), stream_);
      CUDA_OK(cudaMemcpyAsync(reinterpret_cast<int32_t*>(download_.data()) + first, sampled_.data(),
                              static_cast<size_t>(count) * sizeof(int32_t), cudaMemcpyDeviceToHost, stream_));
    }
    for (int64_t i = 0; i < count; ++i) {
      if (!draws.empty() && !draws[static_cast<size_t>(first + i)].logits) continue;
      CUDA_OK(cudaMemcpyAsync(
          logits + (first + i) * config_.vocab_size, logits_.data<float>() + i * config_.vocab_size,
          static_cast<size_t>(config_.vocab_size) * sizeof(float), cudaMemcpyDeviceToHost, stream_));
    }
  }
}

void Decoder::Decode(const Batch& batch, const CudaKvMemory& memory, std::span<const TokenDraw> draws,
                     float* logits) {
  const int64_t rows = batch.rows();
  const int64_t graph_rows = GraphRows(rows);
  const auto converts = static_cast<int64_t>(batch.converts.size());
  const Sizes sizes = {graph_rows, graph_rows, graph_rows + 2, converts, graph_rows};
  const Inputs host = LayOut(sizes, false);
  std::fill_n(std::copy(batch.tokens.begin(), batch.tokens.end(), host.tokens), graph_rows - rows, 0);
  std::memset(host.positions, 0, static_cast<size_t>(3 * graph_rows) * sizeof(int32_t));
  std::memcpy(host.positions, batch.positions.data(), batch.positions.size() * sizeof(batch.positions[0]));
  std::fill_n(host.places, graph_rows, RowPlace());
  SplitStores(batch.stores, {host.places, static_cast<size_t>(rows)}, &stores_);
  std::copy(stores_.stores.begin(), stores_.stores.end(), host.stores);
  std::copy(stores_.groups.begin(), stores_.groups.end(), host.groups);
  std::copy(batch.converts.begin(), batch.converts.end(), host.converts);
  *host.convert_count = static_cast<int32_t>(converts);
  std::fill_n(host.draws, graph_rows, TokenDraw());
  for (size_t i = 0; i < draws.size(); ++i) host.draws[batch.logits_rows[i]] = draws[i];
  Reserve(graph_rows, graph_rows);
  const Inputs in = LayOut(sizes, true);
  Upload();
  ConvertKv(geometry_, clip_, memory.region(), in.converts, in.convert_count, static_cast<int>(converts),
            stream_);
  PlanAttention(batch);
  for (cudaGraphExec_t graph : GraphsOf(graph_rows, memory)) CUDA_OK(cudaGraphLaunch(graph, stream_));

  CUDA_OK(cudaMemcpyAsync(download_.data(), sampled_.data(), static_cast<size_t>(rows) * sizeof(int32_t),
                          cudaMemcpyDeviceToHost, stream_));
  for (size_t i = 0; i < batch.logits_rows.size(); ++i) {
    if (!draws.empty() && !draws[i].logits) continue;
    CUDA_OK(cudaMemcpyAsync(logits + static_cast<int64_t>(i) * config_.vocab_size,
                            logits_.data<float>() + int64_t{batch.logits_rows[i]} * config_.vocab_size,
                            static_cast<size_t>(config_.vocab_size) * sizeof(float), cudaMemcpyDeviceToHost,
                            stream_));
  }
}

void Decoder::Tune(int64_t rows) {
  const auto tune = [&](LinearWeights Layer::*linear, DeviceBuffer& x, DeviceBuffer& y) {
    std::vector<LinearWeights> all;
    for (const Layer& layer : layers_) all.push_back(layer.*linear);
    linears_->Tune(all, x.data(), rows, y.data(), stream_);
  };
  tune(&Layer::qkv, normed_, qkv_);
  tune(&Layer::o, attended_, hidden_);
  tune(&Layer::gate_up, normed_, gate_up_);
  tune(&Layer::down, inner_, hidden_);
  if (rows <= reserved_logits_) linears_->Tune({&lm_head_, 1}, normed_.data(), rows, logits_.data(), stream_);
}

void Decoder::DropGraphs() {
  if (graphs_.empty()) return;
  cudaStreamSynchronize(stream_);
  for (const auto& [rows, graphs] : graphs_) {
    for (cudaGraphExec_t graph : graphs) {
      if (graph != nullptr) cudaGraphExecDestroy(graph);
    }
  }
  graphs_.clear();
}

const Decoder::Graphs& Decoder::GraphsOf(int64_t rows, const CudaKvMemory& memory) {
  const CacheRegion region = memory.region();
  if (region.data != graph_region_.data || region.layer_bytes != graph_region_.layer_bytes) DropGraphs();
  graph_region_ = region;
  Graphs& made = graphs_[rows];
  if (made.back() != nullptr) return made;
  if (seen_[rows]++ == 0) Tune(rows);

  const Inputs in = LayOut({rows, rows, rows + 2, 0, rows}, true);
  for (size_t part = 0; part < made.size(); ++part) {
    if (made[part] != nullptr) continue;
    cudaGraph_t graph = nullptr;
    CUDA_OK(cudaStreamBeginCapture(stream_, cudaStreamCaptureModeThreadLocal));
    try {
      EnqueueDecode(part, memory, in, rows);
    } catch (...) {  // a stream that goes on capturing would be of no use to later steps
      cudaStreamEndCapture(stream_, &graph);
      cudaGraphDestroy(graph);
      throw;
    }
    CUDA_OK(cudaStreamEndCapture(stream_, &graph));
    const cudaError_t error = cudaGraphInstantiate(&made[part], graph, 0);
    cudaGraphDestroy(graph);
    CUDA_OK(error);
  }
  return made;
}

void Decoder::EnqueueDecode(size_t part, const CudaKvMemory& memory, const Inputs& in, int64_t rows) {
  const size_t first = std::min(kFirstLayers, layers_.size());
  if (part == 0) {
    EmbedTokens(in.tokens, embedding_, rows, config_.hidden_size, hidden_.data<float>(), stream_);
    MropeAngles(in.positions, frequencies_, axes_, rows, config_.head_dim / 2, cos_.data<float>(),
                sin_.data<float>(), stream_);
    return RunLayers(0, first, memory, in, rows, nullptr);
  }
  RunLayers(first, layers_.size(), memory, in, rows, nullptr);
  StoreKv(geometry_, clip_, memory.region(), nullptr, nullptr, 0, in.stores, in.groups,
          static_cast<int>(rows), stream_);
  RmsNorm(hidden_.data<float>(), nullptr, final_norm_, config_.rms_norm_eps, rows, config_.hidden_size,
          normed_.data<uint16_t>(), stream_);
  linears_->Run(lm_head_, normed_.data(), rows, logits_.data(), stream_);
  SampleTokens(logits_.data<float>(), rows, config_.vocab_size, in.draws, sampled_.data<int32_t>(), stream_);
}

}  // namespace triaxial::cuda
