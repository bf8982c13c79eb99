#include "apps/eval_report.h"

#include <algorithm>

namespace triaxial {
namespace {

Json Pair(const Interval& interval) { return Json::array({interval.low, interval.high}); }

Json OutputErrorsJson(const OutputErrors& outputs) {
  Json json = {{"relative", outputs.Relative()}, {"by_tag", Json::object()}};
  for (int t = 0; t < kTags; ++t) {
    const int64_t queries = outputs.queries[static_cast<size_t>(t)];
    if (queries == 0) continue;
    json["by_tag"][Name(Tag::FromIndex(t))] = {{"relative", outputs.Relative(t)}, {"queries", queries}};
  }
  return json;
}

}  // namespace

Json EvaluationJson(const Evaluation& evaluation, const std::string& model, const std::string& trajectories) {
  constexpr uint64_t kSeed = 1;
  const auto reference = std::find_if(evaluation.policies.begin(), evaluation.policies.end(),
                                      [](const PolicyScores& p) { return p.policy.policy.name == "bf16"; });
  const Fidelity& any = evaluation.policies[0].fidelity;
  Json json = {
      {"model", model},           {"trajectories", trajectories}, {"conversations", any.conversations},
      {"steps", any.steps},       {"tokens", any.tokens},         {"layers", evaluation.layers},
      {"policies", Json::array()}};
  for (const PolicyScores& p : evaluation.policies) {
    const Fidelity& f = p.fidelity;
    Json row = {{"name", p.policy.name},
                {"codec", std::string(Name(p.policy.codec))},
                {"effective_bits", f.effective_bits},
                {"kv_bytes", f.kv_bytes},
                {"action_match", f.action_match},
                {"action_match_ci", Pair(f.action_match_ci)},
                {"all_tokens_exact", f.all_exact},
                {"all_tokens_exact_ci", Pair(f.all_exact_ci)},
                {"episode_exact", f.episode_exact},
                {"episode_exact_ci", Pair(f.episode_exact_ci)},
                {"episode_all_tokens_exact", f.episode_all_exact},
                {"episode_all_tokens_exact_ci", Pair(f.episode_all_exact_ci)},
                {"top1_agreement", f.top1_agreement},
                {"kl_mean", f.kl_mean},
                {"kl_p99", f.kl_p99},
                {"kl_root_mean", f.kl_root_mean},
                {"perplexity", f.perplexity}};
    Json wrong =
        Json::array();  // by conversation: steps, those whose action, and those where any token is wrong
    const std::vector<ConversationCount> actions = CountByConversation(p.steps, Measure::kAction);
    const std::vector<ConversationCount> all = CountByConversation(p.steps, Measure::kAllTokens);
    for (size_t c = 0; c < actions.size(); ++c) {
      wrong.push_back({actions[c].total, actions[c].total - actions[c].hits, all[c].total - all[c].hits});
    }
    row["wrong_by_conversation"] = std::move(wrong);
    const auto difference = [&](Measure measure) {
      return Pair(BootstrapDifference(CountByConversation(reference->steps, measure),
                                      CountByConversation(p.steps, measure), kSeed));
    };
    row["minus_bf16"] = {{"action_match_ci", difference(Measure::kAction)},
                         {"all_tokens_exact_ci", difference(Measure::kAllTokens)},
                         {"episode_exact_ci", difference(Measure::kEpisode)},
                         {"episode_all_tokens_exact_ci", difference(Measure::kEpisodeAllTokens)}};
    if (!p.outputs.layers.empty()) row["attention_error"] = OutputErrorsJson(p.outputs);
    json["policies"].push_back(std::move(row));
  }
  return json;
}

}  // namespace triaxial
