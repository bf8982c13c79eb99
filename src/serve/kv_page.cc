#include "serve/kv_page.h"

#include <array>
#include <string_view>

namespace triaxial {
namespace {

std::string FormatName(int format) { return std::string(Name(static_cast<Format>(format))); }

Json TotalsJson(const std::array<int64_t, kFormats>& bytes, const std::array<int64_t, kFormats>& tokens) {
  Json json = Json::object();
  for (int f = 0; f < kFormats; ++f) {
    json[FormatName(f)] = {{"bytes", bytes[static_cast<size_t>(f)]},
                           {"tokens", tokens[static_cast<size_t>(f)]}};
  }
  return json;
}

// Only what happened, by from, to and cause.
Json DemotionsJson(const EngineSnapshot& snapshot) {
  Json json = Json::array();
  for (int from = 0; from < kFormats; ++from) {
    for (int to = 0; to < kFormats; ++to) {
      for (int cause = 0; cause < kCauses; ++cause) {
        const int64_t blocks =
            snapshot
                .demotions[static_cast<size_t>(from)][static_cast<size_t>(to)][static_cast<size_t>(cause)];
        if (blocks == 0) continue;
        json.push_back({{"from", FormatName(from)},
                        {"to", FormatName(to)},
                        {"cause", std::string(Name(static_cast<Cause>(cause)))},
                        {"blocks", blocks}});
      }
    }
  }
  return json;
}

Json TagsJson(const KvBlock& block) {
  std::array<int, kTags> counts{};
  for (size_t i = 0; i < block.tokens; ++i) ++counts[block.tags[i]];
  Json json = Json::object();
  for (int t = 0; t < kTags; ++t) {
    if (counts[static_cast<size_t>(t)] > 0) json[Name(Tag::FromIndex(t))] = counts[static_cast<size_t>(t)];
  }
  return json;
}

// A fixed policy's wish, or what each format would cost under a priced one.
void AddNeed(const BlockNeed& need, Json* json) {
  (*json)["floor"] = std::string(Name(need.floor));
  if (need.loss == decltype(need.loss){}) {
    (*json)["wish"] = std::string(Name(need.wish));
    return;
  }
  for (int f = 0; f < kFormats; ++f) (*json)["loss"][FormatName(f)] = need.loss[static_cast<size_t>(f)];
}

Json HistoryJson(const KvBlock& block) {
  Json json = Json::array();
  for (const KvChange& change : block.history) {
    json.push_back({{"from", std::string(Name(change.from))},
                    {"to", std::string(Name(change.to))},
                    {"cause", std::string(Name(change.cause))},
                    {"price", change.price},
                    {"step", change.step}});
  }
  return json;
}

}  // namespace

Json KvSnapshotJson(const EngineSnapshot& snapshot) {
  const BlockStoreStats& store = snapshot.store;
  return {{"bytes", snapshot.kv.total_bytes()},
          {"tokens", snapshot.kv.total_tokens()},
          {"formats", TotalsJson(snapshot.kv.bytes, snapshot.kv.tokens)},
          {"effective_bits", snapshot.effective_bits},
          {"usage", snapshot.kv_usage},
          {"cached_tokens", snapshot.cached_tokens},
          {"prefix_queries", snapshot.prefix_queries},
          {"prefix_hits", snapshot.prefix_hits},
          {"price", snapshot.price},
          {"demotions", DemotionsJson(snapshot)},
          {"evictions", snapshot.evictions},
          {"preemptions", snapshot.preemptions},
          {"sleeping",
           {{"host", {{"blocks", store.host_blocks}, {"bytes", store.host_bytes}}},
            {"disk", {{"blocks", store.disk_blocks}, {"bytes", store.disk_bytes}}},
            {"stored", store.stored},
            {"woken", store.woken},
            {"dropped", store.dropped},
            {"corrupt", store.corrupt},
            {"foreign", store.foreign}}},
          {"integrity_errors", snapshot.integrity_errors}};
}

Json KvBlocksJson(const std::string& id, const std::vector<KvBlock>& blocks, const KvGeometry& geometry) {
  std::array<int64_t, kFormats> bytes{}, tokens{};
  Json list = Json::array();
  for (const KvBlock& block : blocks) {
    const auto format = static_cast<size_t>(block.format);
    const int64_t size = BlockBytes(geometry, block.format, block.capacity);
    bytes[format] += size;
    tokens[format] += block.tokens;
    Json json = {{"position", block.position},
                 {"tokens", block.tokens},
                 {"format", std::string(Name(block.format))},
                 {"bytes", size}};
    if (block.complete()) AddNeed(block.need, &json);
    json["tags"] = TagsJson(block);
    json["users"] = block.users;
    json["cached"] = block.node != kNoNode;
    json["history"] = HistoryJson(block);
    list.push_back(std::move(json));
  }
  return {{"id", id}, {"blocks", std::move(list)}, {"formats", TotalsJson(bytes, tokens)}};
}

}  // namespace triaxial
