#include "calib/calibrate.h"

#include <fmt/format.h>

#include <algorithm>
#include <filesystem>

#include "base/check.h"
#include "base/file.h"

namespace triaxial {
namespace {

namespace fs = std::filesystem;

// Those of `names` that `directory` has, then its files that end in `extension`, sorted.
std::vector<std::string> FilesOf(const std::string& directory, std::initializer_list<const char*> names,
                                 const std::string& extension) {
  std::vector<std::string> files;
  std::error_code ignored;
  for (const char* name : names) {
    const fs::path path = fs::path(directory) / name;
    if (fs::exists(path, ignored)) files.push_back(path.string());
  }
  const size_t named = files.size();
  if (extension.empty()) return files;
  for (const auto& entry : fs::directory_iterator(directory, ignored)) {
    if (entry.path().extension() == extension) files.push_back(entry.path().string());
  }
  std::sort(files.begin() + static_cast<int64_t>(named), files.end());
  return files;
}

// Of an interrupted calibration with the same provenance.
struct Progress {
  size_t done = 0;
  SensitivityProfile profile;
};

Result<Progress> ReadCheckpoint(const std::string& path, const Json& provenance, size_t conversations) {
  ASSIGN_OR_RETURN(const Json json, ReadJsonFile(path));
  if (!json.is_object() || !json.contains("provenance") || !json.contains("profile") ||
      !json.contains("done") || !json["done"].is_number_unsigned() ||
      json["done"].get<size_t>() > conversations) {
    return InvalidArgument(path + " is no checkpoint of a calibration; remove it to start over");
  }
  if (json["provenance"] != provenance) {
    std::string field = "its fields";
    for (const auto& [key, value] : provenance.items()) {
      if (json["provenance"].is_object() && json["provenance"].value(key, Json()) != value) field = key;
    }
    return InvalidArgument(path + " is of a calibration with another " + field +
                           "; repeat its command, or remove the file to start over");
  }
  Progress progress;
  progress.done = json["done"].get<size_t>();
  ASSIGN_OR_RETURN(progress.profile, ParseProfile(json["profile"], path));
  return progress;
}

}  // namespace

Result<Json> ProvenanceOf(const ServedModel& model, const SensitivityMeter& meter,
                          const std::vector<std::string>& trajectories, const CalibrationOptions& options) {
  Json json;
  json["model"] = model.name;
  ASSIGN_OR_RETURN(
      json["model_hash"],
      HashFiles(FilesOf(model.directory, {"config.json", "kv_calibration.json"}, ".safetensors")));
  ASSIGN_OR_RETURN(
      json["tokenizer_hash"],
      HashFiles(
          FilesOf(model.directory, {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}, "")));
  ASSIGN_OR_RETURN(json["data_hash"], HashFiles(trajectories));
  const SensitivityOptions& s = meter.options();
  json["codec"] = std::string(Name(meter.model().geometry().codec));
  json["head_dim"] = meter.model().geometry().head_dim;
  json["metric"] = std::string(Name(s.metric));
  json["aggregate"] = s.aggregate == Aggregate::kMax ? "max" : "mean";
  json["tags_at"] = s.tags_at == TagTime::kEnd ? "end" : "turn";
  json["layers"] = s.metric == Metric::kKl ? SpreadLayers(meter.model().config().text.num_layers,
                                                          meter.model().config().text.num_layers)
                                           : s.layers;
  json["max_conversations"] = options.max_conversations;
  json["max_tokens"] = options.max_tokens;
  json["seed"] = options.seed;
  return json;
}

Result<SensitivityProfile> Calibrate(const ServedModel& model, const Trajectories& trajectories,
                                     const Json& provenance, const CalibrationOptions& options,
                                     SensitivityMeter* meter) {
  const std::vector<size_t> order = ChooseConversations(
      trajectories.size(), static_cast<size_t>(std::max(0, options.max_conversations)), options.seed);
  const int32_t longest = model.config.text.max_position_embeddings;
  const int32_t limit = options.max_tokens > 0 ? std::min(longest, options.max_tokens) : longest;
  Progress progress;
  std::error_code ignored;
  if (options.resume && fs::exists(options.checkpoint, ignored)) {
    ASSIGN_OR_RETURN(progress, ReadCheckpoint(options.checkpoint, provenance, order.size()));
    options.notice(fmt::format("goes on behind {} of {} conversations", progress.done, order.size()));
  }
  const auto total = static_cast<double>(order.size());
  for (; progress.done < order.size(); ++progress.done) {
    const size_t index = order[progress.done];
    ASSIGN_OR_RETURN(Prompt prompt, trajectories.Read(index, model));
    const size_t tokens = prompt.tokens.size();
    if (CutPrompt(limit, &prompt)) {
      options.notice(fmt::format("{} has {} tokens; only the first {} are measured",
                                 trajectories.NameOf(index), tokens, prompt.tokens.size()));
    }
    if (prompt.tokens.empty()) continue;
    const auto within = [&](double part) {
      return options.progress((static_cast<double>(progress.done) + part) / total);
    };
    ASSIGN_OR_RETURN(const ConversationLoss loss, meter->Measure(prompt, within));
    progress.profile.Add(loss);
    if (options.checkpoint.empty()) continue;
    const Json json = {{"provenance", provenance},
                       {"done", progress.done + 1},
                       {"profile", ProfileToJson(progress.profile)}};
    RETURN_IF_ERROR(WriteFile(options.checkpoint, json.dump()));
  }
  if (!options.checkpoint.empty()) fs::remove(options.checkpoint, ignored);
  return progress.profile;
}

Result<Policy> MakePricedPolicy(const SensitivityProfile& profile, const std::string& name,
                                double budget_bits, Json provenance) {
  ASSIGN_OR_RETURN(const LossTable table, MakeLossTable(profile));
  Policy policy;
  policy.name = name;
  policy.priced = true;
  policy.distortion = table.per_token;
  policy.counts = MeanTokens(profile);
  policy.budget_bits = budget_bits;
  provenance["conversations"] = profile.conversations;
  provenance["tokens"] = profile.length;
  Json fallbacks = Json::object();
  for (const auto& [tag, from] : table.fallbacks) fallbacks[Name(Tag::FromIndex(tag))] = from;
  provenance["unmeasured"] = std::move(fallbacks);
  Json not_falling = Json::array();
  for (const int tag : table.not_falling) not_falling.push_back(Name(Tag::FromIndex(tag)));
  provenance["not_falling"] = std::move(not_falling);
  policy.provenance = std::move(provenance);
  return policy;
}

Policy MakeFixedPolicy(const Policy& priced, const std::array<Format, kTags>& formats) {
  Policy policy;
  policy.name = priced.name;
  policy.description = priced.description;
  policy.provenance = priced.provenance;
  policy.pins = priced.pins;
  policy.floor = priced.floor;
  policy.sink = priced.sink;
  policy.recent_window = priced.recent_window;
  std::array<int, kFormats> count{};
  for (const Format format : formats) ++count[static_cast<size_t>(format)];
  const auto common = static_cast<Format>(std::max_element(count.begin(), count.end()) - count.begin());
  for (int t = 0; t < kTags; ++t) {
    const Format format = formats[static_cast<size_t>(t)];
    if (format != common) policy.rules.push_back({Name(Tag::FromIndex(t)), format});
  }
  policy.rules.push_back({"*/*/*", common});
  CHECK(ResolveRules(policy.name, &policy).ok());
  return policy;
}

}  // namespace triaxial
