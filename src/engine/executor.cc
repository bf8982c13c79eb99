#include "engine/executor.h"

#include <algorithm>

#include "engine/sampler.h"

namespace triaxial {
namespace {

struct Overlap {
  int32_t begin;
  int32_t end;
  bool empty() const { return begin >= end; }
};

Overlap OverlapOf(const PromptImage& image, int32_t begin, int32_t end) {
  return {std::max(begin, image.begin), std::min(end, image.begin + image.tokens)};
}

TokenDraw DrawOf(const RequestState& request) {
  const SamplingParams& sampling = request.request.sampling;
  return {.uniform = UniformDraw(request.seed, static_cast<uint64_t>(request.output_tokens())),
          .temperature = sampling.temperature,
          .top_p = sampling.top_p,
          .min_p = sampling.min_p,
          .top_k = sampling.top_k,
          .logits = request.history.active() || sampling.logprobs >= 0};
}

}  // namespace

void Executor::EncodeImages(RequestState* request, int32_t begin, int32_t count) {
  const std::vector<PromptImage>& images = request->request.prompt.images;
  for (size_t i = 0; i < images.size(); ++i) {
    std::unique_ptr<VisualFeatures>& features = request->features[i];
    if (features != nullptr || OverlapOf(images[i], begin, begin + count).empty()) continue;
    features = std::make_unique<VisualFeatures>(model_->Encode(*images[i].patches, preprocessor_));
  }
}

void Executor::DropPassedImages(RequestState* request) {
  const std::vector<PromptImage>& images = request->request.prompt.images;
  for (size_t i = 0; i < images.size(); ++i) {
    if (images[i].begin + images[i].tokens <= request->computed) request->features[i].reset();
  }
}

void Executor::AddVisualRows(const RequestState& request, const Step::Item& item) {
  const std::vector<PromptImage>& images = request.request.prompt.images;
  for (size_t i = 0; i < images.size(); ++i) {
    const Overlap overlap = OverlapOf(images[i], item.begin, item.begin + item.count);
    if (overlap.empty()) continue;
    batch_.visual.push_back({item.row + overlap.begin - item.begin, overlap.begin - images[i].begin,
                             overlap.end - overlap.begin, request.features[i].get()});
  }
}

void Executor::Run(const Step& step, const std::function<void()>& meanwhile) {
  batch_.Clear();
  logits_of_.clear();
  draws_.clear();
  batch_.converts.assign(step.converts.begin(), step.converts.end());
  batch_.stores.assign(step.stores.begin(), step.stores.end());
  for (const Step::Item& item : step.items) {
    const auto& request = static_cast<const RequestState&>(*item.sequence);
    for (int32_t t = item.begin; t < item.begin + item.count; ++t) {
      batch_.tokens.push_back(request.tokens[static_cast<size_t>(t)]);
      batch_.positions.push_back(request.Position(t));
    }
    batch_.sequences.push_back({item.row, item.count, item.blocks});
    if (item.begin < request.prompt_tokens) AddVisualRows(request, item);
    const bool last = item.begin + item.count == static_cast<int32_t>(request.tokens.size());
    logits_of_.push_back(last ? static_cast<int32_t>(batch_.logits_rows.size()) : -1);
    if (last) batch_.logits_rows.push_back(item.row + item.count - 1);
    if (last) draws_.push_back(DrawOf(request));
  }
  const size_t needed = batch_.logits_rows.size() * static_cast<size_t>(model_->config().text.vocab_size);
  if (logits_.size() < needed) logits_.resize(needed);
  if (model_->samples()) {
    sampled_.resize(draws_.size());
    model_->ForwardAndSample(batch_, memory_, draws_, sampled_.data(), logits_.data(), meanwhile);
  } else {
    model_->Forward(batch_, memory_, logits_.data());
  }
  for (const Step::Item& item : step.items) {
    auto& request = static_cast<RequestState&>(*item.sequence);
    if (item.begin < request.prompt_tokens) DropPassedImages(&request);
  }
}

std::optional<int32_t> Executor::Sampled(size_t item) const {
  if (!model_->samples() || logits_of_[item] < 0) return std::nullopt;
  const auto row = static_cast<size_t>(logits_of_[item]);
  if (draws_[row].logits) return std::nullopt;
  return sampled_[row];
}

std::span<float> Executor::Logits(size_t item) {
  if (logits_of_[item] < 0) return {};
  const auto vocab = static_cast<size_t>(model_->config().text.vocab_size);
  return std::span(logits_).subspan(static_cast<size_t>(logits_of_[item]) * vocab, vocab);
}

}  // namespace triaxial
