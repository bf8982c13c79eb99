#include <fmt/format.h>
#include <unistd.h>

#include <chrono>
#include <cstdio>

#include "apps/commands.h"
#include "apps/eval_report.h"
#include "apps/terminal.h"
#include "base/file.h"
#include "base/json.h"
#include "base/parallel.h"
#include "calib/evaluate.h"

namespace triaxial {
namespace {

struct EvalFlags {
  ModelFlags model;
  std::string trajectories;
  std::string images;
  std::string policies = "bf16,int4,int2,paper";
  std::string json;
  std::string html;
  size_t conversations = 0;
  size_t behind = 0;
  int chunk = 512;
  uint64_t seed = 1;
};

std::string Percent(double rate, const Interval& interval) {
  return Fixed(100 * rate, 1) + " [" + Fixed(100 * interval.low, 1) + ", " + Fixed(100 * interval.high, 1) +
         "]";
}

// One line: how far attention is off, and whose queries suffer most.
void PrintOutputErrors(const Evaluation& evaluation) {
  std::string line;
  for (const PolicyScores& p : evaluation.policies) {
    if (p.outputs.Relative() <= 0) continue;
    int worst = 0;
    for (int t = 0; t < kTags; ++t) {
      if (p.outputs.Relative(t) > p.outputs.Relative(worst)) worst = t;
    }
    line += fmt::format("{}{} {:.2g} ({} {:.2g})", line.empty() ? "" : ", ", p.policy.name,
                        p.outputs.Relative(), Name(Tag::FromIndex(worst)), p.outputs.Relative(worst));
  }
  if (line.empty()) return;
  fmt::print(
      "Attention output, squared error over bf16's squares, in {} layers (worst tag of the token that asks): "
      "{}\n",
      evaluation.layers.size(), line);
}

void PrintTable(const Evaluation& evaluation) {
  Table table({"policy", "bits", "KV bytes/step", "steps exact %", "conversations exact %", "top-1 %",
               "KL mean", "KL p99", "perplexity", "thoughts too: steps %", "conversations %"},
              {false, true, true, true, true, true, true, true, true, true, true});
  for (const PolicyScores& p : evaluation.policies) {
    const Fidelity& f = p.fidelity;
    table.Add({Bold(p.policy.name), Fixed(f.effective_bits, 2), Bytes(f.kv_bytes),
               Percent(f.action_match, f.action_match_ci), Percent(f.episode_exact, f.episode_exact_ci),
               Fixed(100 * f.top1_agreement, 2), fmt::format("{:.2e}", f.kl_mean),
               fmt::format("{:.2e}", f.kl_p99), fmt::format("{:.4f}", f.perplexity),
               Fixed(100 * f.all_exact, 1), Percent(f.episode_all_exact, f.episode_all_exact_ci)});
  }
  table.Print();
  const Fidelity& f = evaluation.policies[0].fidelity;
  std::printf(
      "\n%s conversations, %s steps, %s tokens, teacher-forced. A step is exact if every token of its call "
      "(name, all "
      "arguments) or\nanswer is the most likely one; a conversation, if all its steps are. In brackets: 95%% "
      "intervals, "
      "conversations resampled.\nBits and bytes count whole blocks, metadata and BF16 tails.\n",
      Count(f.conversations).c_str(), Count(f.steps).c_str(), Count(f.tokens).c_str());
  PrintOutputErrors(evaluation);
}

// Progress with the time left, on a terminal's stderr.
std::function<void(size_t, size_t)> Progress() {
  if (isatty(STDERR_FILENO) == 0) return nullptr;
  const auto start = std::chrono::steady_clock::now();
  return [start](size_t done, size_t total) {
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    const double left =
        done == 0 ? 0 : seconds / static_cast<double>(done) * static_cast<double>(total - done);
    std::fprintf(stderr, "\rconversation %zu of %zu", done + 1, total);
    if (done > 0)
      std::fprintf(stderr, ", %d:%02d left", static_cast<int>(left) / 60, static_cast<int>(left) % 60);
    std::fprintf(stderr, "   %s", done + 1 == total ? "\r\033[K" : "");
  };
}

Status RunEval(const EvalFlags& flags) {
  SetComputeThreads(flags.model.threads);
  const std::string& path = flags.trajectories;
  ASSIGN_OR_RETURN(const ServedModel served, LoadServedModel(flags.model.model, flags.model.tokenizer));
  ASSIGN_OR_RETURN(RecordedFile recorded, LoadRecorded(path, flags.images, flags.conversations));
  if (flags.behind > 0) RETURN_IF_ERROR(PutBehind(flags.behind, &recorded));
  const Codec codec = flags.model.kv_codec == "paper" ? Codec::kPaper : Codec::kRotated;
  ASSIGN_OR_RETURN(const std::vector<EvalPolicy> policies, ParseEvalPolicies(flags.policies, codec));
  EvalOptions options;
  options.model.device = flags.model.device == "cuda" ? Device::kCuda : Device::kCpu;
  options.model.precision = PrecisionOf(flags.model.dtype);
  if (!flags.model.kv_memory.empty()) {
    options.kv_memory = ParseBytes(flags.model.kv_memory);
    if (options.kv_memory <= 0)
      return InvalidArgument("--kv-memory " + flags.model.kv_memory + " is not a size");
  }
  options.replay.chunk = flags.chunk;
  options.replay.max_rows = std::max(options.replay.max_rows, flags.chunk);
  options.seed = flags.seed;
  options.progress = Progress();
  ASSIGN_OR_RETURN(const Evaluation evaluation, Evaluate(served, recorded, policies, options));
  const Json json = EvaluationJson(evaluation, served.name, path);
  if (!flags.html.empty()) {
    ASSIGN_OR_RETURN(const std::string page, EvaluationPage(evaluation, json, served, recorded));
    RETURN_IF_ERROR(WriteFile(flags.html, page));
  }
  if (flags.json == "-") {
    std::puts(json.dump(2, ' ', false, Json::error_handler_t::replace).c_str());
    return OkStatus();
  }
  if (!flags.json.empty()) {
    RETURN_IF_ERROR(WriteFile(flags.json, json.dump(2, ' ', false, Json::error_handler_t::replace) + "\n"));
  }
  PrintTable(evaluation);
  return OkStatus();
}

}  // namespace

Command AddEval(CLI::App* app) {
  auto flags = std::make_shared<EvalFlags>();
  CLI::App* command = app->add_subcommand(
      "eval", "Score KV policies on recorded conversations: what each costs in exactness, and in bytes");
  AddCheckpointFlags(command, &flags->model);
  command
      ->add_option("--trajectories", flags->trajectories,
                   "JSONL file: one conversation a line, with messages and tools")
      ->required();
  command->add_option("--images", flags->images,
                      "Directory that paths of pictures are relative to (default: the file's)");
  command
      ->add_option(
          "--kv", flags->policies,
          "Policies, separated by commas: POLICY[:BITS][+AXIS[-AXIS]][@CODEC]. POLICY is a built-in name or "
          "a "
          "JSON file; BITS, of a priced one, its budget; AXIS (temporal, modal, semantic) lets it see these "
          "only; CODEC is rotated or paper")
      ->capture_default_str();
  command->add_option("--kv-codec", flags->model.kv_codec, "Codec of policies that name none")
      ->check(CLI::IsMember({"rotated", "paper"}))
      ->capture_default_str();
  command->add_option("--conversations", flags->conversations, "The first so many only (default: all)")
      ->check(CLI::Range(1, 1 << 30));
  command
      ->add_option("--behind", flags->behind,
                   "Put so many other conversations in front of each, to see long ones; only its own answers "
                   "are scored")
      ->check(CLI::Range(0, 1 << 20));
  command
      ->add_option("--chunk", flags->chunk,
                   "Tokens of a prefill step, as the server's --max-num-batched-tokens")
      ->check(CLI::Range(1, 65536))
      ->capture_default_str();
  command->add_option("--seed", flags->seed, "Of the bootstrap's resampling")->capture_default_str();
  command
      ->add_option("--json", flags->json,
                   "Write the figures there as JSON; '-': print them instead of the table")
      ->expected(0, 1)
      ->default_str("-");
  command->add_option("--html", flags->html,
                      "Write a report: quality over bytes, the worst answers and their KV maps");
  flags->model.device = "cpu";
  command->add_option("--device", flags->model.device, "Where the model computes")
      ->check(CLI::IsMember({"cpu", "cuda"}))
      ->capture_default_str();
  command->add_option("--dtype", flags->model.dtype, "Arithmetic: bf16; fp8 on a GPU; f32 as the reference")
      ->check(CLI::IsMember({"bf16", "fp8", "f32"}))
      ->capture_default_str();
  command->add_option(
      "--kv-memory", flags->model.kv_memory,
      "Bytes of all caches together; less runs fewer policies side by side (default: a quarter of "
      "the machine's memory)");
  command->add_option("--threads", flags->model.threads, "Compute threads (default: all cores)")
      ->check(CLI::Range(0, 1024));
  return [flags]() -> Status { return RunEval(*flags); };
}

}  // namespace triaxial
