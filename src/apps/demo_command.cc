#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <numeric>

#include "apps/commands.h"
#include "apps/demo_page.h"
#include "apps/demo_player.h"
#include "apps/terminal.h"
#include "base/file.h"
#include "base/json.h"
#include "base/log.h"
#include "engine/prepare.h"
#include "kv/calibration.h"
#include "serve/api.h"

namespace triaxial {
namespace {

struct DemoFlags {
  ModelFlags model;
  std::string trajectories;
  std::string html = "demo-report.html";
  std::vector<std::string> policies = {"bf16", "paper"};
  size_t conversations = 0;
  int in_flight = 4;
  bool json = false;
};

// Serves the model under one policy on a free port, plays the conversations, and stops the server.
Result<PlayResult> PlayPolicy(const DemoFlags& flags, const std::vector<Trajectory>& trajectories,
                              const std::string& policy) {
  ModelFlags model_flags = flags.model;
  model_flags.kv_policy = policy;
  ASSIGN_OR_RETURN(ServedModel model, LoadServedModel(model_flags.model, model_flags.tokenizer));
  ASSIGN_OR_RETURN(std::unique_ptr<Engine> engine, StartEngine(model_flags, model));
  PlayOptions play;
  play.model = model.name;
  play.label = policy;
  play.in_flight = flags.in_flight;
  const Engine* running = engine.get();  // the server's from here on
  ApiOptions api;
  api.http.host = play.host;
  api.http.port = 0;
  ASSIGN_OR_RETURN(const std::unique_ptr<ApiServer> server,
                   ApiServer::Start(std::move(model), std::move(engine), std::move(api)));
  play.port = server->port();
  spdlog::info("policy {}: playing against http://{}:{}/v1", policy, play.host, play.port);
  Result<PlayResult> result = Play(trajectories, play);
  if (result.ok()) {
    const EngineSnapshot snapshot = running->Snapshot();
    result->cached_tokens = snapshot.prefix_hits;
    result->evictions = snapshot.evictions;
    result->preemptions = snapshot.preemptions;
    for (const auto& from : snapshot.demotions) {
      for (const auto& to : from)
        result->demotions = std::accumulate(to.begin(), to.end(), result->demotions);
    }
  }
  server->Shutdown(0);
  return result;
}

void PrintTable(const std::vector<DemoRun>& runs, const KvGeometry& geometry) {
  Table table({"policy", "steps right", "sessions right", "prompt tokens", "cached", "KV bytes/step",
               "bits/element", "capacity", "demoted", "preempted", "tokens/s", "time"},
              {false, true, true, true, true, true, true, true, true, true, true, true});
  for (const DemoRun& run : runs) {
    const PlayResult& r = run.result;
    table.Add({Bold(run.policy.name), Count(r.right) + " / " + Count(r.asked),
               std::to_string(r.conversations_right) + " / " + std::to_string(r.conversations),
               Count(r.prompt_tokens), Count(r.cached_tokens),
               Bytes(static_cast<double>(r.kv_bytes) / std::max(1, r.asked)),
               Fixed(EffectiveBits(r, geometry), 2), Fixed(CapacityRatio(r, geometry), 2) + "x",
               Count(r.demotions), Count(r.preemptions),
               Fixed(static_cast<double>(r.completion_tokens) / std::max(1e-9, r.seconds), 1),
               Fixed(r.seconds, 1) + " s"});
  }
  std::puts("");
  table.Print();
  std::puts(
      "\nCached: tokens of prompts whose keys and values were there already. Demoted: blocks that were "
      "re-quantized.\nA step is right if its tool call (name and every argument) or its text equals the "
      "recorded one. KV "
      "bytes "
      "count whole\nblocks, metadata and the BF16 tail block included; capacity compares them with BF16 for "
      "exactly the stored tokens.\nTokens/s are generated tokens over wall time, in which the prompts were "
      "read as well.");
}

Status RunDemo(const DemoFlags& flags) {
  const std::string path =
      flags.trajectories.empty()
          ? (std::filesystem::path(flags.model.model) / "episodes" / "heldout.jsonl").string()
          : flags.trajectories;
  ASSIGN_OR_RETURN(std::vector<Trajectory> trajectories, LoadTrajectories(path, flags.conversations));
  std::erase_if(trajectories, [](const Trajectory& t) { return t.steps.empty(); });
  if (trajectories.empty()) return InvalidArgument(path + " holds no assistant message to ask for");
  ASSIGN_OR_RETURN(const ServedModel model, LoadServedModel(flags.model.model, flags.model.tokenizer));
  const TextConfig& text = model.config.text;
  const KvGeometry geometry = {text.num_layers, text.num_kv_heads, text.head_dim,
                               flags.model.kv_codec == "paper" ? Codec::kPaper : Codec::kRotated};
  ASSIGN_OR_RETURN(const KvCalibration calibration,
                   LoadKvCalibration(flags.model.model, text.num_layers, text.num_kv_heads, text.head_dim));

  if (!flags.html.empty()) {  // not found out after minutes of playing
    const std::filesystem::path folder = std::filesystem::absolute(flags.html).parent_path();
    if (!std::filesystem::is_directory(folder)) {
      return NotFound("there is no directory " + folder.string() + " to write --html " + flags.html + " to");
    }
  }
  std::vector<DemoRun> runs;
  for (const std::string& name : flags.policies) {
    DemoRun run;
    ASSIGN_OR_RETURN(run.policy, LoadPolicy(name));
    runs.push_back(std::move(run));
  }
  for (size_t i = 0; i < runs.size(); ++i) {
    ASSIGN_OR_RETURN(runs[i].result, PlayPolicy(flags, trajectories, flags.policies[i]));
    runs[i].needs = NeedsOf(runs[i].policy, geometry, calibration, flags.model.load_format == "dummy", 0);
  }
  if (flags.json) {
    Json json = Json::array();
    for (const DemoRun& run : runs) json.push_back(RunJson(run, geometry));
    std::puts(json.dump(2).c_str());
  } else {
    PrintTable(runs, geometry);
  }
  if (flags.html.empty()) return OkStatus();
  // The page shows the session with the most pictures.
  const auto pictures = [](const Trajectory& t) {
    const Result<Conversation> conversation = ParseConversation(t.messages, t.tools);
    return conversation.ok() ? conversation->images() : 0;
  };
  const auto shown =
      std::max_element(trajectories.begin(), trajectories.end(),
                       [&](const Trajectory& a, const Trajectory& b) { return pictures(a) < pictures(b); });
  ASSIGN_OR_RETURN(const std::string page, DemoPage(model, geometry, runs, *shown));
  RETURN_IF_ERROR(WriteFile(flags.html, page));
  std::fprintf(flags.json ? stderr : stdout, "\nThe KV map of one session, token by token: %s\n",
               std::filesystem::absolute(flags.html).c_str());
  return OkStatus();
}

}  // namespace

Command AddDemo(CLI::App* app) {
  auto flags = std::make_shared<DemoFlags>();
  CLI::App* command = app->add_subcommand(
      "demo", "Play recorded agent sessions against the server under several KV policies and compare");
  AddCheckpointFlags(command, &flags->model);
  AddEngineFlags(command, &flags->model);
  command->add_option("--kv-codec", flags->model.kv_codec, "How blocks are quantized")
      ->check(CLI::IsMember({"rotated", "paper"}))
      ->capture_default_str();
  command->add_option("--policies", flags->policies, "KV policies to compare: built-in names or JSON files")
      ->delimiter(',')
      ->capture_default_str();
  command->add_option("--trajectories", flags->trajectories,
                      "JSONL file of conversations (default: episodes/heldout.jsonl of the model)");
  command->add_option("--conversations", flags->conversations, "Play only the first ones (default: all)");
  command->add_option("--in-flight", flags->in_flight, "Steps asked at once")
      ->check(CLI::Range(1, 256))
      ->capture_default_str();
  command->add_option("--html", flags->html, "Page to write; empty for none")->capture_default_str();
  command->add_flag("--json", flags->json, "Print the results as JSON");
  return [flags] { return RunDemo(*flags); };
}

}  // namespace triaxial
