#include "model/single_sequence.h"

#include <algorithm>

#include "base/check.h"

namespace triaxial {

SingleSequence::SingleSequence(Model* model, Format format, std::unique_ptr<KvMemory> memory)
    : model_(model),
      memory_(std::move(memory)),
      cache_(memory_->geometry(), memory_->total_rows(), TagNeeds::Uniform(format)),
      id_(cache_.CreateSequence()) {}

Result<std::unique_ptr<SingleSequence>> SingleSequence::Create(Model* model, Format format,
                                                               int32_t max_tokens) {
  const KvGeometry geometry = model->geometry();
  // A step's completed blocks take their place before the tail gives its own back, and a tail that grows lies
  // beside its old place.
  const int64_t blocks = max_tokens / kBlockTokens + 4;
  ASSIGN_OR_RETURN(std::unique_ptr<KvMemory> memory,
                   model->AllocateKv(blocks * BlockBytes(geometry, Format::kBf16)));
  return std::unique_ptr<SingleSequence>(new SingleSequence(model, format, std::move(memory)));
}

void SingleSequence::Clear() {
  cache_.FreeSequence(id_);
  id_ = cache_.CreateSequence();
}

Status SingleSequence::Append(std::span<const int32_t> tokens,
                              std::span<const std::array<int32_t, 3>> positions,
                              std::span<const PlacedImage> images, int32_t chunk, int32_t logits_rows,
                              std::vector<float>* logits) {
  const auto total = static_cast<int32_t>(tokens.size());
  CHECK(chunk > 0 && logits_rows <= total && positions.size() == tokens.size());
  const auto vocab = static_cast<size_t>(model_->config().text.vocab_size);
  logits->resize(static_cast<size_t>(logits_rows) * vocab);
  size_t written = 0;
  for (int32_t begin = 0; begin < total; begin += chunk) {
    const int32_t end = std::min(total, begin + chunk);
    batch_.Clear();
    batch_.tokens.assign(tokens.begin() + begin, tokens.begin() + end);
    batch_.positions.assign(positions.begin() + begin, positions.begin() + end);
    for (const PlacedImage& image : images) {
      const int32_t first = std::max(begin, image.begin);
      const int32_t last = std::min(end, image.begin + image.features->tokens);
      if (first < last) {
        batch_.visual.push_back({first - begin, first - image.begin, last - first, image.features});
      }
    }
    for (int32_t row = std::max(begin, total - logits_rows); row < end; ++row) {
      batch_.logits_rows.push_back(row - begin);
    }
    tokens_.assign(static_cast<size_t>(end - begin), KvToken{});
    RETURN_IF_ERROR(cache_.Append(id_, tokens_, &append_));
    batch_.converts = append_.converts;
    batch_.stores = append_.stores;
    batch_.sequences.push_back({0, end - begin, cache_.View(id_)});
    model_->Forward(batch_, memory_.get(), logits->data() + written);
    written += batch_.logits_rows.size() * vocab;
    cache_.FinishStep();
  }
  return OkStatus();
}

}  // namespace triaxial
