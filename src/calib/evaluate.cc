#include "calib/evaluate.h"

#include <fmt/format.h>

#include <algorithm>
#include <memory>
#include <utility>

#include "base/check.h"
#include "base/parallel.h"
#include "calib/sensitivity.h"

namespace triaxial {
namespace {

constexpr int kWatchedLayers = 4;

// The policies of one codec, by index, and the model that runs them.
struct Group {
  std::unique_ptr<Model> model;
  std::vector<size_t> policies;
};

FeaturesOf EncodeImages(const RecordedConversation& conversation, const PreprocessorConfig& preprocessor,
                        Model* model) {
  FeaturesOf features;
  for (const RecordedStep& step : conversation.steps) {
    for (const PromptImage& image : step.prompt.images) {
      if (features.contains(image.patches.get())) continue;
      features.emplace(image.patches.get(), model->Encode(*image.patches, preprocessor));
    }
  }
  return features;
}

// One conversation's steps under the reference, then under all others.
class ConversationRun {
 public:
  ConversationRun(const RecordedConversation& conversation, int32_t index, const EvalOptions& options,
                  const FeaturesOf& features, OutputMeter* outputs)
      : conversation_(conversation),
        index_(index),
        options_(options),
        features_(features),
        outputs_(outputs) {
    outputs_->Begin(conversation.longest);
  }

  // Also the scores of `bf16`, if that is not null: the reference has them by itself.
  Status RunReference(Model* model, const Policy& bf16, PolicyScores* scores, std::vector<float>* kl) {
    const auto vocab = static_cast<size_t>(model->config().text.vocab_size);
    ASSIGN_OR_RETURN(const std::unique_ptr<Replay> replay,
                     Replay::Create(model, std::span(&bf16, 1), conversation_.longest, options_.replay));
    for (size_t s = 0; s < conversation_.steps.size(); ++s) {
      const RecordedStep& step = conversation_.steps[s];
      std::vector<ReferenceRow>& reference = reference_.emplace_back(step.output.size());
      std::vector<TokenScore> tokens(step.output.size());
      outputs_->Keep(s, *replay);
      RETURN_IF_ERROR(
          replay->Play(step, features_, [&](std::span<const Replay::Row> rows, const float* logits) {
            ParallelFor(static_cast<int64_t>(rows.size()), [&](int64_t i) {
              const auto row = static_cast<size_t>(i);
              const size_t token = rows[row].token;
              const auto one = std::span(logits + row * vocab, vocab);
              reference[token] = MakeReference(one);
              if (scores != nullptr) tokens[token] = ScoreToken(reference[token], one, step.output[token]);
            });
          }));
      if (scores != nullptr) Keep(s, tokens, *replay, 0, scores, kl);
    }
    return OkStatus();
  }

  // Policies `chosen` side by side.
  Status RunPolicies(Model* model, std::span<const size_t> chosen, std::vector<PolicyScores>* scores,
                     std::vector<std::vector<float>>* kl) {
    const auto vocab = static_cast<size_t>(model->config().text.vocab_size);
    std::vector<Policy> policies;
    std::vector<OutputErrors*> errors;
    for (const size_t i : chosen) {
      policies.push_back((*scores)[i].policy.policy);
      errors.push_back(&(*scores)[i].outputs);
    }
    ASSIGN_OR_RETURN(const std::unique_ptr<Replay> replay,
                     Replay::Create(model, policies, conversation_.longest, options_.replay));
    for (size_t s = 0; s < conversation_.steps.size(); ++s) {
      const RecordedStep& step = conversation_.steps[s];
      std::vector<std::vector<TokenScore>> tokens(chosen.size(), std::vector<TokenScore>(step.output.size()));
      outputs_->Compare(s, *replay, errors);
      RETURN_IF_ERROR(
          replay->Play(step, features_, [&](std::span<const Replay::Row> rows, const float* logits) {
            ParallelFor(static_cast<int64_t>(rows.size()), [&](int64_t i) {
              const auto row = static_cast<size_t>(i);
              const auto [lane, token] = rows[row];
              tokens[lane][token] = ScoreToken(reference_[s][token], std::span(logits + row * vocab, vocab),
                                               step.output[token]);
            });
          }));
      for (size_t lane = 0; lane < chosen.size(); ++lane) {
        Keep(s, tokens[lane], *replay, lane, &(*scores)[chosen[lane]], &(*kl)[chosen[lane]]);
      }
    }
    return OkStatus();
  }

 private:
  void Keep(size_t s, std::span<const TokenScore> tokens, const Replay& replay, size_t lane,
            PolicyScores* scores, std::vector<float>* kl) const {
    StepScore score = Sum(conversation_.steps[s], tokens);
    score.conversation = index_;
    score.step = static_cast<int32_t>(s);
    score.kv_bytes = replay.Usage(lane).total_bytes();
    score.kv_tokens = replay.Usage(lane).total_tokens();
    scores->steps.push_back(score);
    scores->blocks.push_back(replay.Blocks(lane));
    for (const TokenScore& token : tokens) kl->push_back(token.kl);
  }

  static StepScore Sum(const RecordedStep& step, std::span<const TokenScore> tokens) {
    StepScore score{.exact = true, .action = true, .tokens = static_cast<int32_t>(tokens.size())};
    for (size_t i = 0; i < tokens.size(); ++i) {
      score.exact &= tokens[i].exact;
      if (static_cast<int32_t>(i) >= step.action) score.action &= tokens[i].exact;
      score.agreeing += tokens[i].agrees;
      score.nll += tokens[i].nll;
      score.kl += tokens[i].kl;
      score.kl_max = std::max(score.kl_max, tokens[i].kl);
      if (tokens[i].exact || score.wrong >= 0) continue;
      score.wrong = static_cast<int32_t>(i);
      score.said = tokens[i].argmax;
    }
    return score;
  }

  const RecordedConversation& conversation_;
  int32_t index_;
  const EvalOptions& options_;
  const FeaturesOf& features_;
  OutputMeter* outputs_;
  std::vector<std::vector<ReferenceRow>> reference_;  // [steps][output tokens]
};

}  // namespace

Result<Evaluation> Evaluate(const ServedModel& served, const RecordedFile& recorded,
                            const std::vector<EvalPolicy>& policies, const EvalOptions& options) {
  CHECK(!policies.empty());
  Evaluation evaluation;
  const auto is_bf16 = [](const EvalPolicy& p) { return p.policy.name == "bf16"; };
  if (std::none_of(policies.begin(), policies.end(), is_bf16)) {
    ASSIGN_OR_RETURN(EvalPolicy bf16, ParseEvalPolicy("bf16", policies[0].codec));
    evaluation.policies.push_back({.policy = std::move(bf16)});
  }
  for (const EvalPolicy& policy : policies) evaluation.policies.push_back({.policy = policy});
  // The reference is what `bf16` is in the first policy's codec, and need not be run twice.
  size_t bf16_index = evaluation.policies.size();

  const TextConfig& text = served.config.text;
  const bool watched = options.model.device == Device::kCpu;
  OutputMeter outputs(watched ? SpreadLayers(text.num_layers, kWatchedLayers) : std::vector<int>(),
                      int64_t{text.num_heads} * text.head_dim);
  evaluation.layers = outputs.layers();
  for (PolicyScores& p : evaluation.policies) p.outputs = outputs.Empty();

  std::vector<Group> groups;
  for (const Codec codec :
       {policies[0].codec, policies[0].codec == Codec::kPaper ? Codec::kRotated : Codec::kPaper}) {
    Group group;
    for (size_t i = 0; i < evaluation.policies.size(); ++i) {
      const EvalPolicy& policy = evaluation.policies[i].policy;
      if (policy.codec != codec) continue;
      if (groups.empty() && bf16_index == evaluation.policies.size() && is_bf16(policy)) {
        bf16_index = i;
      } else {
        group.policies.push_back(i);
      }
    }
    if (group.policies.empty() && !groups.empty()) continue;
    ModelOptions model_options = options.model;
    model_options.codec = codec;
    if (watched) {
      model_options.output_observer = [&outputs](int layer, int64_t, const float* out) {
        outputs.Observe(layer, out);
      };
    }
    ASSIGN_OR_RETURN(group.model, Model::Load(served.directory, model_options));
    for (PolicyScores& p : evaluation.policies) {
      if (p.policy.codec == codec) p.geometry = group.model->geometry();
    }
    groups.push_back(std::move(group));
  }
  Model* reference = groups[0].model.get();
  ASSIGN_OR_RETURN(const Policy bf16, LoadPolicy("bf16"));
  const int64_t memory = options.kv_memory > 0 ? options.kv_memory : reference->FreeMemory();

  std::vector<std::vector<float>> kl(evaluation.policies.size());
  for (size_t c = 0; c < recorded.lines.size(); ++c) {
    if (options.progress) options.progress(c, recorded.lines.size());
    ASSIGN_OR_RETURN(const RecordedConversation conversation, PrepareRecorded(served, recorded, c));
    evaluation.conversations.push_back(conversation.id);
    const FeaturesOf features = EncodeImages(conversation, served.preprocessor, reference);
    ConversationRun run(conversation, static_cast<int32_t>(c), options, features, &outputs);
    const bool wanted = bf16_index < evaluation.policies.size();
    RETURN_IF_ERROR(run.RunReference(reference, bf16, wanted ? &evaluation.policies[bf16_index] : nullptr,
                                     wanted ? &kl[bf16_index] : nullptr));
    for (const Group& group : groups) {
      const int64_t lane = Replay::LaneBytes(group.model->geometry(), conversation.longest);
      const auto together = static_cast<size_t>(std::max<int64_t>(1, memory / lane));
      for (size_t begin = 0; begin < group.policies.size(); begin += together) {
        const auto chosen =
            std::span(group.policies).subspan(begin, std::min(together, group.policies.size() - begin));
        RETURN_IF_ERROR(run.RunPolicies(group.model.get(), chosen, &evaluation.policies, &kl));
      }
    }
  }
  for (size_t i = 0; i < evaluation.policies.size(); ++i) {
    PolicyScores& p = evaluation.policies[i];
    const int64_t elements =
        int64_t{2} * p.geometry.num_layers * p.geometry.num_kv_heads * p.geometry.head_dim;
    p.fidelity = Summarize(p.steps, kl[i], elements, options.seed);
  }
  return evaluation;
}

}  // namespace triaxial
