#include <cstdio>

#include "apps/calibrate_flags.h"
#include "apps/commands.h"
#include "apps/policy_tables.h"
#include "calib/compare.h"
#include "kv/policy.h"

namespace triaxial {
namespace {

struct Flags {
  std::string policy, other;
  bool json = false;
  bool distortion = false;
  MeasureFlags measure;
};

// Measures as the policy was, as far as its provenance says how.
Status CheckOnData(Flags* flags, const Policy& policy) {
  if (!policy.priced) {
    return InvalidArgument("policy " + policy.name +
                           " is a fixed one, without losses to compare; give a policy of triaxial calibrate");
  }
  const Json& from = policy.provenance;
  const auto set = [&](const char* field, const std::vector<std::string>& values, std::string* flag) {
    if (!from.is_object() || !from.contains(field)) return;
    for (const std::string& value : values) {
      if (from[field] == value) *flag = value;
    }
  };
  set("codec", {"rotated", "paper"}, &flags->measure.model.kv_codec);
  set("metric", MetricNames(), &flags->measure.metric);
  set("aggregate", {"max", "mean"}, &flags->measure.aggregate);
  set("tags_at", {"end", "turn"}, &flags->measure.tags_at);
  std::vector<int> layers;
  if (flags->measure.metric != "kl" && from.is_object() && from.contains("layers")) {
    for (const Json& layer : from["layers"]) layers.push_back(layer.get<int>());
  }
  ASSIGN_OR_RETURN(Measurement measurement, PrepareMeasurement(flags->measure, layers));
  if (from.is_object() && from.contains("model_hash") &&
      from["model_hash"] != measurement.provenance["model_hash"]) {
    std::fprintf(stderr, "the policy was measured on another checkpoint (%s)\n",
                 from.value("model", Json("unnamed")).dump().c_str());
  }
  ASSIGN_OR_RETURN(const SensitivityProfile profile, RunMeasurement(&measurement));
  ASSIGN_OR_RETURN(const Drift drift, MeasureDrift(policy, profile, measurement.meter->model().geometry()));
  if (flags->json) {
    std::puts(DriftToJson(policy, drift).dump(2).c_str());
  } else {
    ShowDrift(policy, drift);
  }
  return OkStatus();
}

void PrintValid(const Flags& flags, const Policy& policy) {
  if (policy.priced) {
    std::printf("%s is valid: a priced policy, every tag has its losses\n", flags.policy.c_str());
  } else {
    std::printf("%s is valid: %zu rules, every tag has a format\n", flags.policy.c_str(),
                policy.rules.size());
  }
}

}  // namespace

Command AddPolicy(CLI::App* app) {
  auto flags = std::make_shared<Flags>();
  CLI::App* command = app->add_subcommand("policy", "Look at, compare and validate KV policies");
  command->require_subcommand(1);
  CLI::App* show = command->add_subcommand(
      "show", "The format of every tag, as a table over the three axes; a priced policy's at rest");
  show->add_option("policy", flags->policy, "Built-in name or JSON file")->required();
  show->add_flag("--distortion", flags->distortion, "And what each format loses, of a priced policy");
  show->add_flag("--json", flags->json, "Print the policy file");
  CLI::App* diff = command->add_subcommand("diff", "What two policies store differently");
  diff->add_option("policy", flags->policy, "Built-in name or JSON file")->required();
  diff->add_option("other", flags->other, "Another one")->required();
  diff->add_flag("--json", flags->json, "Print JSON");
  CLI::App* check = command->add_subcommand("check",
                                            "Validate a policy file; with --trajectories also measure its "
                                            "sensitivities anew, on other data, and say how far "
                                            "they moved");
  check->add_option("policy", flags->policy, "Built-in name or JSON file")->required();
  AddCheckpointFlags(check, &flags->measure.model);
  CLI::Option* data = check->add_option("--trajectories", flags->measure.trajectories,
                                        "Recorded conversations: files of JSON lines");
  AddMeasureFlags(check, &flags->measure);
  check->add_flag("--json", flags->json, "Print JSON");
  return [flags, show, diff, data]() -> Status {
    ASSIGN_OR_RETURN(const Policy policy, LoadPolicy(flags->policy));
    if (show->parsed()) {
      if (flags->json) {
        std::puts(PolicyToJson(policy).dump(2).c_str());
      } else {
        ShowPolicy(policy, flags->distortion);
      }
    } else if (diff->parsed()) {
      ASSIGN_OR_RETURN(const Policy other, LoadPolicy(flags->other));
      if (flags->json) {
        std::puts(DifferenceToJson(policy, other).dump(2).c_str());
      } else {
        ShowDifference(policy, other);
      }
    } else if (data->count() > 0) {
      return CheckOnData(flags.get(), policy);
    } else {
      PrintValid(*flags, policy);
    }
    return OkStatus();
  };
}

}  // namespace triaxial
