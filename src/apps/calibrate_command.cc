#include <fmt/chrono.h>

#include <cstdio>
#include <ctime>
#include <filesystem>

#include "apps/calibrate_dump.h"
#include "apps/calibrate_flags.h"
#include "apps/commands.h"
#include "apps/policy_tables.h"
#include "apps/terminal.h"
#include "base/file.h"
#include "calib/allocate.h"

namespace triaxial {
namespace {

constexpr int kMaxSweep = 1000;

struct Flags {
  MeasureFlags measure;
  std::string out = "policy.json";
  std::string name;
  double budget = 2.8;
  std::string sweep;
  std::string dump;
  bool fixed = false;
  bool resume = false;
  bool json = false;
};

// "FROM:TO:STEP".
Result<std::vector<double>> ParseSweep(const std::string& text) {
  double from = 0;
  double to = 0;
  double step = 0;
  char rest = 0;
  const bool parsed = std::sscanf(text.c_str(), "%lf:%lf:%lf%c", &from, &to, &step, &rest) == 3;
  if (!parsed || !(from > 0) || !(to >= from) || !(step > 0) || (to - from) / step > kMaxSweep) {
    return InvalidArgument("--sweep " + text + " is no range; write FROM:TO:STEP, for example 2.25:4.5:0.25");
  }
  std::vector<double> budgets;
  for (int i = 0; from + i * step <= to + step * 1e-6; ++i) budgets.push_back(from + i * step);
  return budgets;
}

// The ways to meet one budget.
struct Allocations {
  double budget;
  Result<Allocation> exact, price, greedy;
};

Allocations AllocateAll(const Policy& policy, const KvGeometry& geometry, bool two_bit_keys, double budget) {
  const TagNeeds needs = ResolveNeeds(policy, geometry, two_bit_keys, 0);
  const AllocationProblem problem = MakeAllocationProblem(needs, policy.counts, geometry);
  return {budget, AllocateExactly(problem, budget), AllocateByPrice(needs, policy.counts, geometry, budget),
          AllocateGreedily(problem, budget, Format::kK2V2, Format::kK4V4)};
}

void PrintAllocations(const std::vector<Allocations>& rows) {
  Table table({"budget", "exact: bits", "loss", "one price: bits", "loss", "greedy 2/4: bits", "loss"},
              std::vector<bool>(7, true));
  for (const Allocations& row : rows) {
    std::vector<std::string> cells = {Fixed(row.budget, 2)};
    for (const Result<Allocation>* way : {&row.exact, &row.price, &row.greedy}) {
      cells.push_back(way->ok() ? Fixed((*way)->bits, 3) : "-");
      cells.push_back(way->ok() ? Scientific((*way)->loss) : "-");
    }
    table.Add(std::move(cells));
  }
  table.Print();
}

Json AllocationsToJson(const std::vector<Allocations>& rows) {
  Json list = Json::array();
  for (const Allocations& row : rows) {
    Json entry = {{"budget", row.budget}};
    const auto add = [&](const char* name, const Result<Allocation>& way) {
      entry[name] = way.ok() ? Json{{"bits", way->bits}, {"loss", way->loss}} : Json();
    };
    add("exact", row.exact);
    add("price", row.price);
    add("greedy", row.greedy);
    list.push_back(std::move(entry));
  }
  return list;
}

// A file name without its extension, as far as policy names go.
std::string NameFrom(const std::string& path) {
  std::string name;
  for (const char c : std::filesystem::path(path).stem().string()) {
    name += std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '.' || c == '_' ? c : '-';
  }
  return name.substr(0, 64);
}

// Formats for all tags: tags without tokens, which no budget knows, take those of the price.
std::array<Format, kTags> FixedFormats(const Allocation& exact, const Policy& policy,
                                       const KvGeometry& geometry) {
  std::array<Format, kTags> formats = FormatsAtRest(policy, geometry);
  for (size_t t = 0; t < kTags; ++t) {
    if (policy.counts[t] > 0) formats[t] = exact.formats[t];
  }
  return formats;
}

Status Run(const Flags& flags) {
  std::vector<double> budgets;
  if (!flags.sweep.empty()) {
    ASSIGN_OR_RETURN(budgets, ParseSweep(flags.sweep));
  }
  ASSIGN_OR_RETURN(Measurement measurement, PrepareMeasurement(flags.measure, {}));
  if (measurement.meter->model().geometry().codec == Codec::kRotated &&
      !measurement.meter->model().calibration().calibrated) {
    std::fprintf(
        stderr,
        "%s has no kv_calibration.json, so keys get 4 bits at least; --codec-out %s/kv_calibration.json "
        "fits one first\n",
        flags.measure.model.model.c_str(), flags.measure.model.model.c_str());
  }
  if (!flags.dump.empty()) return DumpConversation(flags.dump, &measurement);
  measurement.options.checkpoint = flags.out + ".partial";
  measurement.options.resume = flags.resume;
  const Result<SensitivityProfile> profile = RunMeasurement(&measurement);
  if (!profile.ok() && profile.status().code() == Code::kCancelled) {
    return Cancelled("interrupted; the same command with --resume goes on from " +
                     measurement.options.checkpoint);
  }
  RETURN_IF_ERROR(profile.status());

  const Model& model = measurement.meter->model();
  const KvGeometry geometry = model.geometry();
  const bool two_bit_keys = geometry.codec == Codec::kPaper || model.calibration().calibrated;
  Json provenance = measurement.provenance;
  provenance["date"] = fmt::format("{:%Y-%m-%dT%H:%M:%SZ}", fmt::gmtime(std::time(nullptr)));
  provenance["tool_version"] = TRIAXIAL_VERSION;
  const std::string name = flags.name.empty() ? NameFrom(flags.out) : flags.name;
  ASSIGN_OR_RETURN(Policy policy, MakePricedPolicy(*profile, name, flags.budget, std::move(provenance)));
  policy.description = fmt::format("Calibrated on {} conversations of {} for {:.4g} effective bits.",
                                   profile->conversations, measurement.model.name, flags.budget);
  Allocations chosen = AllocateAll(policy, geometry, two_bit_keys, flags.budget);
  RETURN_IF_ERROR(chosen.exact.status());
  const Allocation& used = flags.fixed ? *chosen.exact : *chosen.price;
  policy.provenance["predicted_loss"] = used.loss;
  policy.provenance["predicted_bits"] = used.bits;
  if (flags.fixed) policy = MakeFixedPolicy(policy, FixedFormats(*chosen.exact, policy, geometry));
  RETURN_IF_ERROR(WriteFile(flags.out, PolicyToJson(policy).dump(2) + "\n"));

  std::vector<Allocations> rows;
  for (const double budget : budgets) rows.push_back(AllocateAll(policy, geometry, two_bit_keys, budget));
  if (flags.fixed && !budgets.empty()) rows.clear();
  rows.push_back(std::move(chosen));
  if (flags.json) {
    std::puts(Json{{"policy", flags.out},
                   {"conversations", profile->conversations},
                   {"tokens", profile->length},
                   {"allocations", AllocationsToJson(rows)}}
                  .dump(2)
                  .c_str());
    return OkStatus();
  }
  std::printf("%s tokens of %d conversations\n\n", Count(profile->length).c_str(), profile->conversations);
  ShowPolicy(policy, false);
  std::puts("");
  PrintAllocations(rows);
  std::printf("\nwrote %s\n", flags.out.c_str());
  return OkStatus();
}

}  // namespace

Command AddCalibrate(CLI::App* app) {
  auto flags = std::make_shared<Flags>();
  CLI::App* command = app->add_subcommand(
      "calibrate",
      "Measure on recorded conversations how much each tag suffers at each format, and write a policy");
  AddCheckpointFlags(command, &flags->measure.model);
  command
      ->add_option("--trajectories", flags->measure.trajectories,
                   "Recorded conversations: files of JSON lines {\"messages\", \"tools\"}, image paths "
                   "relative to them")
      ->required();
  command->add_option("--out", flags->out, "The policy file to write")->capture_default_str();
  command->add_option("--name", flags->name, "The policy's name (default: the file's)");
  command->add_option("--budget", flags->budget, "Effective bits at rest, metadata included")
      ->capture_default_str();
  command->add_option("--sweep", flags->sweep, "Also print what budgets FROM:TO:STEP are predicted to lose");
  command->add_option(
      "--codec-out", flags->measure.codec_out,
      "First fit the codec to the model on the same conversations (factors of channels, clips, "
      "gains), write that file and calibrate with it; `serve` reads it as "
      "kv_calibration.json beside the checkpoint");
  command->add_flag("--fixed", flags->fixed,
                    "Write a fixed table, the exact optimum for the budget, not a priced policy");
  AddMeasureFlags(command, &flags->measure);
  AddMethodFlags(command, &flags->measure);
  command->add_flag("--resume", flags->resume,
                    "Go on from OUT.partial, which an interrupted calibration leaves");
  command->add_flag("--json", flags->json, "Print JSON");
  // For tools/reference/calibration_reference.py.
  command->add_option("--dump", flags->dump, "")->group("");
  return [flags]() { return Run(*flags); };
}

}  // namespace triaxial
