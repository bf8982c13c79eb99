// The subcommands of `triaxial`. Each registers its options with CLI11 and yields a Status when run.
#ifndef TRIAXIAL_APPS_COMMANDS_H_
#define TRIAXIAL_APPS_COMMANDS_H_

#include <CLI/CLI.hpp>
#include <functional>
#include <memory>
#include <string>

#include "base/status.h"
#include "engine/engine.h"
#include "model/model.h"
#include "serve/served_model.h"

namespace triaxial {

using Command = std::function<Status()>;

Command AddServe(CLI::App* app);
Command AddGenerate(CLI::App* app);
Command AddTag(CLI::App* app);
Command AddInspect(CLI::App* app);
Command AddDemo(CLI::App* app);
Command AddEval(CLI::App* app);
Command AddCalibrate(CLI::App* app);
Command AddReplay(CLI::App* app);
// Have subcommands of their own.
Command AddPolicy(CLI::App* app);
Command AddBench(CLI::App* app);

// Options of every command that reads a checkpoint or runs the engine.
struct ModelFlags {
  std::string model;
  std::string tokenizer;
  std::string device = "auto";
  std::string load_format = "auto";
  std::string dtype = "bf16";
  std::string kv_policy;  // "": see PolicyOf
  std::string kv_codec = "rotated";
  std::string kv_memory;
  int max_model_len = 0;
  int max_num_seqs = 64;
  int max_num_batched_tokens = 0;
  int threads = 0;
  double kv_budget_bits = 0;
  std::string kv_host_bytes = "0";
  std::string kv_disk_dir;
  std::string kv_disk_bytes = "16G";
  int max_queued = 256;
};
Precision PrecisionOf(const std::string& dtype);
void AddCheckpointFlags(CLI::App* app, ModelFlags* flags);  // --model, --tokenizer
void AddPolicyFlags(CLI::App* app, ModelFlags* flags);      // --kv-policy, --kv-codec
// The policy by name or file: --kv-policy; if it is not given, the checkpoint's own kv_policy.json (for the
// codec rotated), else paper.
std::string PolicyOf(const ModelFlags& flags);
void AddEngineFlags(CLI::App* app, ModelFlags* flags);  // how it computes, and with how much memory
void AddServerFlags(CLI::App* app, ModelFlags* flags);  // what idle sessions and the queue may take

// Loads weights and starts the engine; says what it does on stderr.
Result<std::unique_ptr<Engine>> StartEngine(const ModelFlags& flags, const ServedModel& model);

}  // namespace triaxial

#endif  // TRIAXIAL_APPS_COMMANDS_H_
