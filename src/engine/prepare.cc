#include "engine/prepare.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "base/log.h"

namespace triaxial {
namespace {

Status CheckTokens(const std::vector<int32_t>& tokens, const EngineContext& context) {
  if (tokens.empty()) return InvalidArgument("the prompt is empty; it needs at least one token");
  if (static_cast<int64_t>(tokens.size()) >= context.max_model_len) {
    return InvalidArgument(fmt::format(
        "the prompt has {} tokens, but the server takes at most {} and needs room for one of output; shorten "
        "the conversation or raise --max-model-len",
        tokens.size(), context.max_model_len));
  }
  const int vocab = context.config.text.vocab_size;
  for (size_t i = 0; i < tokens.size(); ++i) {
    if (tokens[i] >= 0 && tokens[i] < vocab) continue;
    return InvalidArgument(
        fmt::format("token {} of the prompt is {}; the vocabulary has ids 0 to {}", i, tokens[i], vocab - 1));
  }
  return OkStatus();
}

Status CheckSpans(const Prompt& prompt) {
  int32_t end = 0;
  for (const TagSpan& span : prompt.spans) {
    if (span.begin != end || span.end <= span.begin) {
      return InvalidArgument(
          fmt::format("a tag span of the prompt covers tokens {} to {}, but the one before ends at {}; spans "
                      "must follow each other without gaps",
                      span.begin, span.end, end));
    }
    end = span.end;
  }
  if (static_cast<size_t>(end) == prompt.tokens.size()) return OkStatus();
  return InvalidArgument(
      fmt::format("tag spans cover {} of the prompt's {} tokens", end, prompt.tokens.size()));
}

Status CheckImages(const Prompt& prompt, const EngineContext& context) {
  if (!prompt.images.empty() && !context.config.vision) {
    return InvalidArgument("the prompt has images, but the model reads text only");
  }
  int32_t end = 0;
  for (size_t i = 0; i < prompt.images.size(); ++i) {
    const PromptImage& image = prompt.images[i];
    const int merge = context.preprocessor.merge_size;
    const bool placed = image.begin >= end && image.tokens > 0 &&
                        int64_t{image.begin} + image.tokens <= static_cast<int64_t>(prompt.tokens.size());
    if (!placed || image.patches == nullptr || image.patches->tokens(merge) != image.tokens) {
      return InvalidArgument(fmt::format(
          "image {} of the prompt ({} tokens from token {}) does not match its pixels or its place", i,
          image.tokens, image.begin));
    }
    end = image.begin + image.tokens;
  }
  return OkStatus();
}

std::vector<int32_t> StopIds(const SamplingParams& sampling, const GenerationConfig& generation) {
  std::vector<int32_t> ids = sampling.stop_token_ids;
  if (!sampling.ignore_eos) {
    ids.insert(ids.end(), generation.eos_token_ids.begin(), generation.eos_token_ids.end());
  }
  std::sort(ids.begin(), ids.end());
  return ids;
}

}  // namespace

TagNeeds NeedsOf(const Policy& policy, const KvGeometry& geometry, const KvCalibration& calibration,
                 bool dummy_weights, double budget_bits) {
  const bool two_bit_keys = geometry.codec != Codec::kRotated || calibration.calibrated || dummy_weights;
  TagNeeds needs = ResolveNeeds(policy, geometry, two_bit_keys, budget_bits);
  const bool asks = policy.priced || std::count(policy.table.begin(), policy.table.end(), Format::kK2V2) > 0;
  if (!two_bit_keys && asks) {
    spdlog::warn(
        "policy {} asks for k2v2, but the checkpoint has no kv_calibration.json, without which 2-bit keys "
        "lose too much: such tokens are stored as k4v2. Add the file, or use the codec 'paper'",
        policy.name);
  }
  return needs;
}

MropePositions PositionsOf(const Prompt& prompt, const PreprocessorConfig& preprocessor) {
  std::vector<ImageRun> runs;
  const int merge = preprocessor.merge_size;
  for (const PromptImage& image : prompt.images) {
    runs.push_back({image.begin, image.patches->grid_h / merge, image.patches->grid_w / merge});
  }
  return ComputePositions(static_cast<int32_t>(prompt.tokens.size()), runs);
}

Result<std::unique_ptr<RequestState>> PrepareRequest(Request request, const EngineContext& context) {
  Prompt& prompt = request.prompt;
  RETURN_IF_ERROR(Validate(request.sampling));
  RETURN_IF_ERROR(CheckTokens(prompt.tokens, context));
  RETURN_IF_ERROR(CheckSpans(prompt));
  RETURN_IF_ERROR(CheckImages(prompt, context));

  auto state = std::make_unique<RequestState>(context.markup, request.starts_in_thought);
  const auto tokens = static_cast<int32_t>(prompt.tokens.size());
  const int32_t wanted = request.sampling.max_tokens;
  state->prompt_tokens = tokens;
  state->max_length =
      wanted > 0 && wanted < context.max_model_len - tokens ? tokens + wanted : context.max_model_len;
  state->stop_ids = StopIds(request.sampling, context.generation);
  state->history = TokenHistory(request.sampling, prompt.tokens);

  state->kv_tokens.reserve(static_cast<size_t>(state->max_length));
  AppendKvTokens(prompt, &state->kv_tokens);
  state->salt = request.salt;
  state->tenant = request.tenant;
  state->min_format = request.min_format;
  state->priority = request.priority;
  const int64_t rows =
      PredictRows(context.geometry, context.needs, state->kv_tokens, /*begin=*/0, request.min_format);
  if (rows > context.total_rows) {
    const int64_t row_bytes = UnitRowBytes(context.geometry) * context.geometry.num_layers;
    return TooLarge(fmt::format(
        "the prompt's {} tokens need {} bytes of KV cache under policy {}, but the server has {}; raise "
        "--kv-memory or shorten the conversation",
        tokens, rows * row_bytes, context.policy.name, context.total_rows * row_bytes));
  }

  state->positions = PositionsOf(prompt, context.preprocessor);
  state->features.resize(prompt.images.size());
  state->tokens.reserve(static_cast<size_t>(state->max_length));
  state->tokens.assign(prompt.tokens.begin(), prompt.tokens.end());
  prompt.tokens = {};
  prompt.spans = {};
  state->request = std::move(request);
  return state;
}

}  // namespace triaxial
