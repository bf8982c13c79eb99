// What `triaxial eval` writes: figures as JSON, and a page to look at them.
#ifndef TRIAXIAL_APPS_EVAL_REPORT_H_
#define TRIAXIAL_APPS_EVAL_REPORT_H_

#include <string>

#include "base/json.h"
#include "base/status.h"
#include "calib/evaluate.h"

namespace triaxial {

// {"model", "trajectories", "conversations", "steps", "tokens", "layers", "policies": [{"name", "codec",
// "effective_bits", "kv_bytes", "action_match", "action_match_ci", "all_tokens_exact", "all_tokens_exact_ci",
// "episode_exact", "episode_exact_ci", "episode_all_tokens_exact", "episode_all_tokens_exact_ci",
// "top1_agreement", "kl_mean", "kl_p99", "perplexity", "minus_bf16", "attention_error": {"relative",
// "by_tag": {TAG: {"relative", "queries"}}}}]}. Rates from 0 to 1, intervals [low, high], bytes a mean over
// answers; "minus_bf16" are paired intervals of the rates' differences from bf16; "attention_error" of the
// outputs of "layers" (calib/output_error.h), by the tag of the token that asks; absent on a GPU.
Json EvaluationJson(const Evaluation& evaluation, const std::string& model, const std::string& trajectories);

// A self-contained page: quality over bytes, the answers that suffered most with their KV maps, and the
// sensitivities of policies that carry them. Errors as PrepareRecorded.
Result<std::string> EvaluationPage(const Evaluation& evaluation, const Json& json, const ServedModel& served,
                                   const RecordedFile& recorded);

}  // namespace triaxial

#endif  // TRIAXIAL_APPS_EVAL_REPORT_H_
