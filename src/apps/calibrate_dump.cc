#include "apps/calibrate_dump.h"

#include <filesystem>

#include "base/file.h"

namespace triaxial {

Status DumpConversation(const std::string& directory, Measurement* m) {
  if (m->meter->options().metric == Metric::kKl)
    return InvalidArgument("--dump works with the metrics mse and output only");
  const size_t index = ChooseConversations(m->trajectories.size(), 1, m->options.seed).front();
  ASSIGN_OR_RETURN(Prompt prompt, m->trajectories.Read(index, m->model));
  const int32_t longest = m->model.config.text.max_position_embeddings;
  CutPrompt(m->options.max_tokens > 0 ? std::min(longest, m->options.max_tokens) : longest, &prompt);
  std::vector<LayerCapture> captures;
  ASSIGN_OR_RETURN(const ConversationLoss loss, m->meter->Measure(
                                                    prompt, [](double) { return true; }, &captures));
  std::error_code error;
  std::filesystem::create_directories(directory, error);
  const KvGeometry geometry = m->meter->model().geometry();
  const ClipRatios clip = m->meter->model().calibration().clip;
  Json json = {{"conversation", m->trajectories.NameOf(index)},
               {"tokens", prompt.tokens.size()},
               {"num_heads", m->model.config.text.num_heads},
               {"num_kv_heads", geometry.num_kv_heads},
               {"head_dim", geometry.head_dim},
               {"codec", std::string(Name(geometry.codec))},
               {"clip_k2", clip.k2},
               {"clip_v2", clip.v2},
               {"gain_k2", clip.k2_gain},
               {"gain_v2", clip.v2_gain},
               {"model", m->model.directory},
               {"metric", m->provenance["metric"]},
               {"aggregate", m->provenance["aggregate"]},
               {"tags_at", m->provenance["tags_at"]},
               {"layers", m->provenance["layers"]},
               {"spans", Json::array()}};
  for (const TagSpan& span : prompt.spans) {
    json["spans"].push_back({{"begin", span.begin},
                             {"end", span.end},
                             {"turn", span.turn},
                             {"modal", std::string(Name(span.modal))},
                             {"semantic", std::string(Name(span.semantic))}});
  }
  SensitivityProfile profile;
  profile.Add(loss);
  json["tags"] = ProfileToJson(profile)["tags"];
  for (const LayerCapture& capture : captures) {
    for (const auto& [name, data] : {std::pair{"q", &capture.q}, {"k", &capture.k}, {"v", &capture.v}}) {
      const std::string path = directory + "/" + name + "." + std::to_string(capture.layer) + ".f32";
      RETURN_IF_ERROR(
          WriteFile(path, {reinterpret_cast<const char*>(data->data()), data->size() * sizeof(float)}));
    }
  }
  return WriteFile(directory + "/dump.json", json.dump(1));
}

}  // namespace triaxial
