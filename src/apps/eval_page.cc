// The HTML page of `triaxial eval`.
#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <map>

#include "apps/eval_report.h"
#include "apps/eval_report_html.h"
#include "kv/tag.h"

namespace triaxial {
namespace {

constexpr size_t kWorstAnswers = 5;  // of each policy

Json TagJson(int index) {
  const Tag tag = Tag::FromIndex(index);
  return {{"age", std::string(Name(tag.temporal))},
          {"modal", std::string(Name(tag.modal))},
          {"semantic", std::string(Name(tag.semantic))}};
}

// Loss of a token by tag and format, of policies that carry it.
Json Sensitivities(const Evaluation& evaluation) {
  Json all = Json::array();
  for (const PolicyScores& p : evaluation.policies) {
    const Policy& policy = p.policy.policy;
    if (!policy.priced) continue;
    Json entry = {{"policy", p.policy.name}, {"formats", Json::array()}, {"tags", Json::array()}};
    for (int f = 0; f < static_cast<int>(Format::kBf16); ++f) {
      entry["formats"].push_back(std::string(Name(static_cast<Format>(f))));
    }
    for (int t = 0; t < kTags; ++t) {
      const auto& loss = policy.distortion[static_cast<size_t>(t)];
      if (policy.counts[static_cast<size_t>(t)] <= 0) continue;
      entry["tags"].push_back({{"tag", TagJson(t)}, {"loss", loss}});
    }
    all.push_back(std::move(entry));
  }
  return all;
}

// Squared error of the attention output over squared output, by the tag of the token that asks.
Json AttentionErrors(const Evaluation& evaluation) {
  Json all = Json::array();
  for (const PolicyScores& p : evaluation.policies) {
    if (p.outputs.Relative() <= 0) continue;
    Json entry = {{"policy", p.policy.name}, {"tags", Json::array()}};
    for (int t = 0; t < kTags; ++t) {
      const int64_t queries = p.outputs.queries[static_cast<size_t>(t)];
      if (queries == 0) continue;
      entry["tags"].push_back({{"tag", TagJson(t)}, {"value", p.outputs.Relative(t)}, {"queries", queries}});
    }
    all.push_back(std::move(entry));
  }
  return all;
}

// "12 current/text/obs, 52 older/text/inst": what a block's tokens are.
std::string Contents(const RecordedStep& step, const std::vector<Tag>& prompt, size_t begin) {
  std::map<std::string, int> counts;
  const size_t end = std::min(begin + kBlockTokens, prompt.size() + step.output.size() - 1);
  for (size_t i = begin; i < end; ++i) {
    const Tag tag = i < prompt.size() ? prompt[i] : Tag::FromIndex(step.tags[i - prompt.size()]);
    ++counts[Name(tag)];
  }
  std::string text;
  for (const auto& [name, count] : counts)
    text += fmt::format("{}{} {}", text.empty() ? "" : ", ", count, name);
  return text;
}

Json Answer(const PolicyScores& p, size_t index, const RecordedConversation& conversation,
            const Tokenizer& tokenizer) {
  const StepScore& score = p.steps[index];
  const RecordedStep& step = conversation.steps[static_cast<size_t>(score.step)];
  const auto text = [&](size_t begin, size_t end) {
    return tokenizer.Decode({step.output.begin() + static_cast<std::ptrdiff_t>(begin),
                             step.output.begin() + static_cast<std::ptrdiff_t>(end)},
                            false);
  };
  const auto wrong = score.wrong < 0 ? step.output.size() : static_cast<size_t>(score.wrong);
  const size_t after = std::min(wrong + 1, step.output.size());
  Json answer = {{"conversation", conversation.id},
                 {"message", step.message},
                 {"exact", score.exact},
                 {"kl", score.kl / score.tokens},
                 {"before", text(0, wrong)},
                 {"wrong", text(wrong, after)},
                 {"said", score.said < 0 ? std::string() : tokenizer.Decode({score.said}, false)},
                 {"after", text(after, step.output.size())},
                 {"blocks", Json::array()}};
  const std::vector<Tag> tags = TagTokens(step.prompt.spans, static_cast<int32_t>(step.prompt.tokens.size()));
  for (size_t b = 0; b < p.blocks[index].size(); ++b) {
    const std::string format(Name(p.blocks[index][b]));
    answer["blocks"].push_back(
        {{"format", format},
         {"text", fmt::format("block {}, {}: {}", b, format, Contents(step, tags, b * kBlockTokens))}});
  }
  return answer;
}

}  // namespace

Result<std::string> EvaluationPage(const Evaluation& evaluation, const Json& json, const ServedModel& served,
                                   const RecordedFile& recorded) {
  Json data = {{"evaluation", json},
               {"formats", Json::array()},
               {"sensitivities", Sensitivities(evaluation)},
               {"attention", AttentionErrors(evaluation)},
               {"worst", Json::array()}};
  for (int f = 0; f < kFormats; ++f) data["formats"].push_back(std::string(Name(static_cast<Format>(f))));
  std::map<int32_t, RecordedConversation> conversations;
  for (const PolicyScores& p : evaluation.policies) {
    std::vector<size_t> order(p.steps.size());
    for (size_t i = 0; i < order.size(); ++i) order[i] = i;
    const auto worse = [&](size_t a, size_t b) {
      const StepScore& x = p.steps[a];
      const StepScore& y = p.steps[b];
      return std::pair(x.exact, -x.kl / x.tokens) < std::pair(y.exact, -y.kl / y.tokens);
    };
    const size_t shown = std::min(kWorstAnswers, order.size());
    std::partial_sort(order.begin(), order.begin() + static_cast<std::ptrdiff_t>(shown), order.end(), worse);
    Json worst = {{"policy", p.policy.name}, {"answers", Json::array()}};
    for (size_t i = 0; i < shown; ++i) {
      const int32_t c = p.steps[order[i]].conversation;
      if (!conversations.contains(c)) {
        ASSIGN_OR_RETURN(conversations[c], PrepareRecorded(served, recorded, static_cast<size_t>(c)));
      }
      worst["answers"].push_back(Answer(p, order[i], conversations[c], *served.tokenizer));
    }
    data["worst"].push_back(std::move(worst));
  }
  // Inside a script element, so that no text of a conversation can close it.
  std::string text = data.dump(-1, ' ', false, Json::error_handler_t::replace);
  for (size_t at = text.find('<'); at != std::string::npos; at = text.find('<', at))
    text.replace(at, 1, "\\u003c");
  std::string page = kEvalReportHtml;
  constexpr std::string_view kSlot = "__DATA__";
  const size_t slot = page.find(kSlot);
  CHECK(slot != std::string::npos);
  return page.replace(slot, kSlot.size(), text);
}

}  // namespace triaxial
