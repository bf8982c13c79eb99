#include "apps/demo_page.h"

#include <algorithm>

#include "apps/demo_report_html.h"
#include "base/json.h"

namespace triaxial {
namespace {

Json MapJson(const KvMap& map) {
  Json blocks = Json::array();
  for (const Format format : map.blocks) blocks.push_back(static_cast<int>(format));
  return {{"blocks", std::move(blocks)},
          {"bytes", map.usage.bytes},
          {"tokens", map.usage.tokens},
          {"total_bytes", map.usage.total_bytes()}};
}

// The urls of a conversation's pictures, in order of appearance.
std::vector<std::string> ImageUrls(const Conversation& conversation) {
  std::vector<std::string> urls;
  for (const Message& message : conversation.messages) {
    for (const ContentPart& part : message.content) {
      if (part.kind == ContentPart::Kind::kImage) urls.push_back(part.text);
    }
  }
  return urls;
}

}  // namespace

double EffectiveBits(const PlayResult& result, const KvGeometry& geometry) {
  const double elements = static_cast<double>(result.stored_tokens()) * 2.0 * geometry.num_layers *
                          geometry.num_kv_heads * geometry.head_dim;
  return elements > 0 ? 8.0 * static_cast<double>(result.kv_bytes) / elements : 0;
}

double CapacityRatio(const PlayResult& result, const KvGeometry& geometry) {
  const double bits = EffectiveBits(result, geometry);
  return bits > 0 ? 16.0 / bits : 0;
}

Json RunJson(const DemoRun& run, const KvGeometry& geometry) {
  const PlayResult& r = run.result;
  return {{"policy", run.policy.name},
          {"description", run.policy.description},
          {"asked", r.asked},
          {"right", r.right},
          {"conversations", r.conversations},
          {"conversations_right", r.conversations_right},
          {"prompt_tokens", r.prompt_tokens},
          {"completion_tokens", r.completion_tokens},
          {"kv_bytes_per_step", static_cast<double>(r.kv_bytes) / std::max(1, r.asked)},
          {"effective_bits", EffectiveBits(r, geometry)},
          {"capacity_ratio", CapacityRatio(r, geometry)},
          {"cached_tokens", r.cached_tokens},
          {"demotions", r.demotions},
          {"evictions", r.evictions},
          {"preemptions", r.preemptions},
          {"seconds", r.seconds}};
}

KvMap MapTokens(const std::vector<Tag>& tags, const TagNeeds& needs, const KvGeometry& geometry) {
  std::vector<KvToken> tokens;
  for (const Tag& tag : tags) tokens.push_back({{}, static_cast<uint8_t>(tag.index())});
  const int64_t blocks = static_cast<int64_t>(tokens.size()) / kBlockTokens + 2;
  KvCache cache(geometry, 2 * blocks * UnitsOf(geometry, Format::kBf16), needs);
  const SequenceId id = cache.CreateSequence();
  KvAppend append;
  for (size_t begin = 0; begin < tokens.size(); begin += kBlockTokens) {
    const size_t count = std::min<size_t>(kBlockTokens, tokens.size() - begin);
    CHECK(cache.Append(id, std::span(tokens).subspan(begin, count), &append).ok());
    cache.FinishStep();
  }
  KvMap map;
  for (const KvBlock* block : cache.Blocks(id)) map.blocks.push_back(block->format);
  map.usage = cache.Usage();
  return map;
}

Result<std::string> DemoPage(const ServedModel& model, const KvGeometry& geometry,
                             const std::vector<DemoRun>& runs, const Trajectory& trajectory) {
  const Json request = StepRequest(trajectory, trajectory.steps.size() - 1, model.name, 1);
  ASSIGN_OR_RETURN(const Conversation conversation, ParseConversation(request["messages"], trajectory.tools));
  ASSIGN_OR_RETURN(const Prompt prompt, BuildChatPrompt(model, conversation, {}, ImageFromDataUrl));
  const std::vector<Tag> tags = TagTokens(prompt.spans, static_cast<int32_t>(prompt.tokens.size()));

  Json data = {{"model", model.name},          {"codec", std::string(Name(geometry.codec))},
               {"block_tokens", kBlockTokens}, {"episode", trajectory.id},
               {"formats", Json::array()},     {"runs", Json::array()},
               {"maps", Json::array()},        {"tokens", Json::array()},
               {"spans", Json::array()},       {"images", Json::array()}};
  data["bf16_bytes"] = Bf16KvBytesPerToken(model.config.text) * static_cast<int64_t>(prompt.tokens.size());
  for (int f = 0; f < kFormats; ++f) {
    const Format format = static_cast<Format>(f);
    data["formats"].push_back(
        {{"name", std::string(Name(format))}, {"bits", EffectiveBits(geometry, format)}});
  }
  for (const DemoRun& run : runs) {
    data["runs"].push_back(RunJson(run, geometry));
    data["maps"].push_back(MapJson(MapTokens(tags, run.needs, geometry)));
  }
  for (const int32_t token : prompt.tokens)
    data["tokens"].push_back(std::string(model.tokenizer->TokenBytes(token)));
  for (const TagSpan& span : prompt.spans) {
    const Tag& tag = tags[static_cast<size_t>(span.begin)];
    data["spans"].push_back({{"begin", span.begin},
                             {"end", span.end},
                             {"message", span.message},
                             {"turn", span.turn},
                             {"age", std::string(Name(tag.temporal))},
                             {"modal", std::string(Name(tag.modal))},
                             {"semantic", std::string(Name(tag.semantic))}});
  }
  const std::vector<std::string> urls = ImageUrls(conversation);
  for (size_t i = 0; i < prompt.images.size(); ++i) {
    const PromptImage& image = prompt.images[i];
    data["images"].push_back({{"begin", image.begin},
                              {"tokens", image.tokens},
                              {"columns", image.patches->grid_w / model.preprocessor.merge_size},
                              {"rows", image.patches->grid_h / model.preprocessor.merge_size},
                              {"url", urls[i]}});
  }
  // Inside a script element, so that no text of the conversation can close it.
  std::string json = data.dump(-1, ' ', false, Json::error_handler_t::replace);
  for (size_t at = json.find('<'); at != std::string::npos; at = json.find('<', at))
    json.replace(at, 1, "\\u003c");

  std::string page = kDemoReportHtml;
  constexpr std::string_view kSlot = "__DATA__";
  const size_t slot = page.find(kSlot);
  CHECK(slot != std::string::npos);
  return page.replace(slot, kSlot.size(), json);
}

}  // namespace triaxial
