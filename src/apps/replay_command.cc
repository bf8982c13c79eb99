#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <filesystem>

#include "apps/commands.h"
#include "apps/replay_page.h"
#include "apps/terminal.h"
#include "base/file.h"
#include "replay/recording.h"
#include "replay/report.h"
#include "replay/simulation.h"

namespace triaxial {
namespace {

struct Flags {
  ModelFlags model;
  std::vector<std::string> traces;
  std::string images;
  std::string tag_mix;
  std::string device = "h100-80g";
  std::string kv_memory;
  std::vector<std::string> policies = {"bf16", "paper"};
  std::string codec = "rotated";
  double budget_bits = 0;
  ArrivalOptions arrivals;
  int max_num_seqs = 256;
  int max_num_batched_tokens = 2048;
  int max_model_len = 0;
  std::string html;
  bool json = false;
};

struct Inputs {
  std::string model_name;
  ModelConfig config;
  Recording recording;
  SimulationOptions options;  // all but the policy
  std::vector<Policy> policies;
};

void AddFlags(CLI::App* command, Flags* flags) {
  command
      ->add_option(
          "--trace", flags->traces,
          "What is replayed, by format: Mooncake's JSONL, Azure's CSV, or conversations, one a line, as "
          "'serve --record' writes them (each assistant message is a step). Repeatable")
      ->required();
  AddCheckpointFlags(command, &flags->model);
  command->get_option("--model")->description("Checkpoint directory, or a config.json; no weights are read");
  command->add_option("--device", flags->device, "h100-80g, h200, b200, cpu, or a JSON file (docs/replay.md)")
      ->capture_default_str();
  command->add_option(
      "--kv-memory", flags->kv_memory,
      "Bytes of the KV cache, e.g. 512M or 4G (default: what the weights leave of the device)");
  command
      ->add_option("--kv-policy", flags->policies,
                   "Policies to compare, with commas between: built-in names or JSON files")
      ->delimiter(',')
      ->capture_default_str();
  command->add_option("--kv-codec", flags->codec, "How blocks are quantized")
      ->check(CLI::IsMember({"rotated", "paper"}))
      ->capture_default_str();
  command
      ->add_option("--kv-budget-bits", flags->budget_bits,
                   "Effective bits at which priced policies rest (default: their own)")
      ->check(CLI::Range(0.0, 16.0));
  command
      ->add_option("--requests", flags->arrivals.requests,
                   "Requests in all; recordings repeat (default: each recording once)")
      ->check(CLI::Range(int64_t{0}, int64_t{1} << 40));
  command->add_option("--agents", flags->arrivals.agents, "Conversations at a time")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  command
      ->add_option("--think-time", flags->arrivals.think_seconds,
                   "Seconds from an answer to the conversation's next request")
      ->check(CLI::Range(0.0, 1e6))
      ->capture_default_str();
  command->add_option("--speedup", flags->arrivals.speedup, "How much faster than recorded a trace arrives")
      ->check(CLI::Range(1e-6, 1e6))
      ->capture_default_str();
  command
      ->add_option("--images", flags->images,
                   "Directory of the conversations' pictures (default: their file's)")
      ->check(CLI::ExistingDirectory);
  command
      ->add_option("--tag-mix", flags->tag_mix,
                   "JSON file that says what a trace's tokens are (default: an agent's mix, docs/replay.md)")
      ->check(CLI::ExistingFile);
  command->add_option("--max-num-seqs", flags->max_num_seqs, "Sequences decoded together")
      ->check(CLI::Range(1, 4096))
      ->capture_default_str();
  command
      ->add_option("--max-num-batched-tokens", flags->max_num_batched_tokens,
                   "Tokens of one step, decode and prefill together")
      ->check(CLI::Range(1, 65536))
      ->capture_default_str();
  command
      ->add_option("--max-model-len", flags->max_model_len,
                   "Longest sequence in tokens (default: the model's)")
      ->check(CLI::Range(0, 1 << 24));
  command->add_option("--html", flags->html, "Page with the curves over time to write (default: none)");
  command->add_flag("--json", flags->json, "Print the results as JSON");
}

Result<int64_t> KvMemory(const Flags& flags, const DeviceSpec& device, const ModelCost& cost) {
  if (!flags.kv_memory.empty()) {
    const int64_t bytes = ParseBytes(flags.kv_memory);
    if (bytes > 0) return bytes;
    return InvalidArgument("--kv-memory " + flags.kv_memory +
                           " is not a size; give bytes, or a number with K, M, G or T");
  }
  const double bytes = device.memory * device.usable - static_cast<double>(cost.weight_bytes());
  if (bytes > 0) return static_cast<int64_t>(bytes);
  return InvalidArgument("the model's weights take " + Bytes(static_cast<double>(cost.weight_bytes())) +
                         ", and " + device.name + " has " + Bytes(device.memory * device.usable) +
                         " for them and the KV cache; choose a larger --device, or say --kv-memory");
}

Result<Inputs> Prepare(const Flags& flags) {
  Inputs inputs;
  RecordingOptions recording;
  const std::string& model = flags.model.model;
  if (std::filesystem::is_directory(model)) {
    inputs.model_name =
        std::filesystem::path(model + "/").lexically_normal().parent_path().filename().string();
    ASSIGN_OR_RETURN(inputs.config, LoadModelConfig(model));
    ASSIGN_OR_RETURN(recording.preprocessor, LoadPreprocessorConfig(model));
    recording.tokenizer_directory = model;
  } else {
    inputs.model_name = std::filesystem::path(model).stem().string();
    ASSIGN_OR_RETURN(inputs.config, LoadModelConfigFile(model));
    if (inputs.config.vision) {
      recording.preprocessor.patch_size = inputs.config.vision->patch_size;
      recording.preprocessor.merge_size = inputs.config.vision->spatial_merge_size;
    }
  }
  if (!flags.model.tokenizer.empty()) recording.tokenizer_directory = flags.model.tokenizer;
  recording.config = inputs.config;
  recording.images = flags.images;
  if (!flags.tag_mix.empty()) {
    ASSIGN_OR_RETURN(recording.mix, LoadTagMix(flags.tag_mix));
  }

  SimulationOptions& options = inputs.options;
  for (const std::string& name : flags.policies) {
    ASSIGN_OR_RETURN(Policy policy, LoadPolicy(name));
    if (policy.priced && !options.distortion) options.distortion = policy.distortion;
    inputs.policies.push_back(std::move(policy));
  }
  const bool any_priced = std::any_of(inputs.policies.begin(), inputs.policies.end(),
                                      [](const Policy& policy) { return policy.priced; });
  if (flags.budget_bits > 0 && !any_priced) {
    return InvalidArgument("--kv-budget-bits needs a policy with a distortion table; " +
                           inputs.policies[0].name + " says fixed formats");
  }
  const TextConfig& text = inputs.config.text;
  options.geometry = {text.num_layers, text.num_kv_heads, text.head_dim,
                      flags.codec == "paper" ? Codec::kPaper : Codec::kRotated};
  options.budget_bits = flags.budget_bits;
  options.max_running = flags.max_num_seqs;
  options.max_step_tokens = std::max(flags.max_num_batched_tokens, flags.max_num_seqs);
  options.max_model_len = flags.max_model_len > 0 ? flags.max_model_len : text.max_position_embeddings;
  options.cost = CostOf(inputs.config);
  ASSIGN_OR_RETURN(options.device, LoadDevice(flags.device));
  ASSIGN_OR_RETURN(options.kv_bytes, KvMemory(flags, options.device, options.cost));
  ASSIGN_OR_RETURN(inputs.recording, LoadRecording(flags.traces, recording));
  return inputs;
}

// A line on the terminal that counts requests; nothing where stderr is a file.
class Progress {
 public:
  Progress(std::string name, int64_t total)
      : name_(std::move(name)), total_(total), show_(isatty(STDERR_FILENO) != 0) {}
  ~Progress() {
    if (show_) std::fprintf(stderr, "\r\x1b[K");
  }
  void operator()(int64_t done) {
    const auto now = std::chrono::steady_clock::now();
    if (!show_ || now - last_ < std::chrono::milliseconds(100)) return;
    last_ = now;
    std::fprintf(stderr, "\r\x1b[K%s: %s of %s requests", name_.c_str(), Count(done).c_str(),
                 Count(total_).c_str());
  }

 private:
  std::string name_;
  int64_t total_;
  bool show_;
  std::chrono::steady_clock::time_point last_;
};

Json About(const Flags& flags, const Inputs& inputs) {
  const SimulationOptions& options = inputs.options;
  std::string workload;
  for (const std::string& trace : flags.traces) {
    workload += (workload.empty() ? "" : ", ") + std::filesystem::path(trace).filename().string();
  }
  Json about = {{"workload", workload},
                {"model", inputs.model_name},
                {"device", options.device.name},
                {"device_source", options.device.source},
                {"codec", std::string(Name(options.geometry.codec))},
                {"weights", options.cost.weight_bytes()},
                {"kv_memory", options.kv_bytes},
                {"max_num_seqs", options.max_running},
                {"max_num_batched_tokens", options.max_step_tokens}};
  if (!inputs.recording.agents.empty()) {
    about["agents"] = flags.arrivals.agents;
    about["think_time"] = flags.arrivals.think_seconds;
  }
  if (!inputs.recording.trace.empty()) about["speedup"] = flags.arrivals.speedup;
  return about;
}

std::string Percent(double share) { return Fixed(100 * share, share > 0 && share < 0.1 ? 2 : 1) + "%"; }

// Times are read by people: "31 ms", "4.20 s".
std::string Duration(double seconds) {
  return seconds < 1 ? Fixed(1000 * seconds, 1) + " ms" : Fixed(seconds, 2) + " s";
}

void PrintTable(const std::vector<PolicyRun>& runs) {
  std::vector<std::string> header = {""};
  std::vector<bool> right = {false};
  for (const PolicyRun& run : runs) {
    header.push_back(run.policy.name);
    right.push_back(true);
  }
  Table table(std::move(header), std::move(right));
  const auto row = [&](const std::string& label, const auto& cell) {
    std::vector<std::string> cells = {label};
    for (const PolicyRun& run : runs) cells.push_back(cell(run.result));
    table.Add(std::move(cells));
  };
  using R = SimulationResult;
  row("effective bits, tails included", [](const R& r) { return Fixed(r.effective_bits, 2); });
  row("bits of complete blocks", [](const R& r) { return Fixed(r.block_bits, 2); });
  row("capacity, tokens", [](const R& r) { return Count(r.capacity_tokens); });
  row("lost to rounding", [](const R& r) { return Percent(r.rounding_loss); });
  row("BF16 tails, of bytes in use", [](const R& r) { return Percent(r.tail_share); });
  row("KV memory in use, peak", [](const R& r) { return Percent(r.peak_usage); });
  row("the same, while blocks are dropped", [](const R& r) { return r.filled ? Percent(*r.filled) : "-"; });
  row("requests running, mean", [](const R& r) { return Fixed(r.mean_running, 1); });
  row("requests running, peak", [](const R& r) { return Count(r.peak_running); });
  row("prefix hit rate", [](const R& r) { return Percent(r.hit_rate); });
  row("computed, of prompt tokens", [](const R& r) {
    return Percent(static_cast<double>(r.prefilled_tokens) /
                   std::max(1.0, static_cast<double>(r.prompt_tokens)));
  });
  row("demotions", [](const R& r) { return Count(r.demotions); });
  row("evictions", [](const R& r) { return Count(r.evictions); });
  row("preemptions", [](const R& r) { return Count(r.preemptions); });
  row("generated tokens/s", [](const R& r) {
    return Fixed(static_cast<double>(r.generated_tokens) / std::max(r.seconds, 1e-9), 1);
  });
  row("time to first token, p50", [](const R& r) { return Duration(Percentile(r.ttft, 0.5)); });
  row("time to first token, p99", [](const R& r) { return Duration(Percentile(r.ttft, 0.99)); });
  row("time per token, p50", [](const R& r) { return Duration(Percentile(r.tpot, 0.5)); });
  row("predicted loss per token",
      [](const R& r) { return r.predicted_loss ? fmt::format("{:.4g}", *r.predicted_loss) : "-"; });
  row("requests finished", [](const R& r) { return Count(r.finished); });
  row("refused, too long", [](const R& r) { return Count(r.refused); });
  row("failed for memory", [](const R& r) { return Count(r.failed); });
  row("simulated time", [](const R& r) { return Fixed(r.seconds, 0) + " s"; });
  row("it took", [&](const R& r) {
    const auto run =
        std::find_if(runs.begin(), runs.end(), [&](const PolicyRun& x) { return &x.result == &r; });
    return Fixed(run->wall_seconds, 1) + " s";
  });
  table.Print();
}

Status Run(const Flags& flags) {
  ASSIGN_OR_RETURN(Inputs inputs, Prepare(flags));
  const SimulationOptions& options = inputs.options;
  const Json about = About(flags, inputs);
  const int64_t total = Arrivals(&inputs.recording, flags.arrivals).total();
  std::fprintf(stderr, "%s on %s: %s of weights, %s of KV cache; %s requests\n", inputs.model_name.c_str(),
               options.device.name.c_str(), Bytes(static_cast<double>(options.cost.weight_bytes())).c_str(),
               Bytes(static_cast<double>(options.kv_bytes)).c_str(), Count(total).c_str());
  std::vector<PolicyRun> runs;
  for (Policy& policy : inputs.policies) {
    inputs.options.policy = policy;
    const auto start = std::chrono::steady_clock::now();
    Progress progress(policy.name, total);
    ASSIGN_OR_RETURN(SimulationResult result,
                     Simulate(inputs.recording, flags.arrivals, options, std::ref(progress)));
    const std::chrono::duration<double> wall = std::chrono::steady_clock::now() - start;
    runs.push_back({std::move(policy), std::move(result), wall.count()});
  }
  if (!flags.html.empty()) RETURN_IF_ERROR(WriteFile(flags.html, ReplayPage(about, runs)));
  if (flags.json) {
    Json json = ReportJson(runs);
    json.update(about);
    std::puts(json.dump(2).c_str());
  } else {
    PrintTable(runs);
  }
  return OkStatus();
}

}  // namespace

Command AddReplay(CLI::App* app) {
  auto flags = std::make_shared<Flags>();
  CLI::App* command = app->add_subcommand("replay",
                                          "Replay a trace or recorded conversations on a simulated device: "
                                          "the real scheduler and cache, no weights");
  AddFlags(command, flags.get());
  return [flags] { return Run(*flags); };
}

}  // namespace triaxial
