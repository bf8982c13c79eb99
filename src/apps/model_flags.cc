#include <filesystem>

#include "apps/checkpoint_identity.h"
#include "apps/commands.h"
#include "apps/terminal.h"
#include "base/log.h"
#include "base/parallel.h"
#include "kv/policy.h"

namespace triaxial {
namespace {

// The pocket agent of the repository: seen from the current directory, else from the binary
// (build/release/triaxial).
std::string DefaultModel() {
  const std::filesystem::path relative = "models/pocket-agent";
  std::error_code error;
  if (std::filesystem::exists(relative / "config.json", error)) return relative.string();
  const std::filesystem::path binary = std::filesystem::read_symlink("/proc/self/exe", error);
  const std::filesystem::path beside = (binary.parent_path() / "../.." / relative).lexically_normal();
  return std::filesystem::exists(beside / "config.json", error) ? beside.string() : relative.string();
}

std::string PolicyNames() {
  std::string names;
  for (const std::string_view name : BuiltinPolicies())
    names += std::string(names.empty() ? "" : ", ") + std::string(name);
  return names;
}

// Bytes of an option's value.
Result<int64_t> BytesOf(const char* option, const std::string& value) {
  const int64_t bytes = ParseBytes(value);
  if (bytes < 0) {
    return InvalidArgument(std::string(option) + " " + value +
                           " is not a size; give bytes, or a number with K, M, G or T");
  }
  return bytes;
}

}  // namespace

void AddCheckpointFlags(CLI::App* app, ModelFlags* flags) {
  flags->model = DefaultModel();
  app->add_option("--model", flags->model, "Hugging Face checkpoint directory")->capture_default_str();
  app->add_option("--tokenizer", flags->tokenizer,
                  "Directory with tokenizer.json and chat template, if not the model's");
}

void AddPolicyFlags(CLI::App* app, ModelFlags* flags) {
  app->add_option("--kv-policy", flags->kv_policy,
                  "Which format each tag deserves: " + PolicyNames() +
                      ", or a JSON file (default: kv_policy.json of the checkpoint, calibrated for the codec "
                      "rotated; without one, paper)");
  app->add_option("--kv-codec", flags->kv_codec, "How blocks are quantized")
      ->check(CLI::IsMember({"rotated", "paper"}))
      ->capture_default_str();
}

std::string PolicyOf(const ModelFlags& flags) {
  if (!flags.kv_policy.empty()) return flags.kv_policy;
  const std::string own = flags.model + "/kv_policy.json";
  std::error_code ignored;
  return flags.kv_codec == "rotated" && std::filesystem::exists(own, ignored) ? own : "paper";
}

void AddEngineFlags(CLI::App* app, ModelFlags* flags) {
  app->add_option("--device", flags->device,
                  "Where the model computes; auto: on the GPU if there is one and --dtype is not f32")
      ->check(CLI::IsMember({"auto", "cpu", "cuda"}))
      ->capture_default_str();
  app->add_option("--load-format", flags->load_format, "'dummy' makes random weights of config.json's shapes")
      ->check(CLI::IsMember({"auto", "dummy"}))
      ->capture_default_str();
  app->add_option("--dtype", flags->dtype,
                  "Arithmetic: bf16; fp8: weights and inputs of the decoder's products in "
                  "8 bits, on a GPU; f32: the reference, on the CPU")
      ->check(CLI::IsMember({"bf16", "fp8", "f32"}))
      ->capture_default_str();
  app->add_option(
      "--kv-memory", flags->kv_memory,
      "Bytes of the KV cache, e.g. 512M or 4G (default: a quarter of the machine's memory at most)");
  app->add_option("--kv-budget-bits", flags->kv_budget_bits,
                  "Effective bits that a priced policy spends at rest (default: the policy's own)")
      ->check(CLI::Range(0.0, 16.0));
  app->add_option("--max-model-len", flags->max_model_len,
                  "Longest sequence in tokens (default: the model's)")
      ->check(CLI::Range(0, 1 << 24));
  app->add_option("--max-num-seqs", flags->max_num_seqs, "Sequences decoded together")
      ->check(CLI::Range(1, 4096))
      ->capture_default_str();
  app->add_option("--max-num-batched-tokens", flags->max_num_batched_tokens,
                  "Tokens of one step, decode and prefill together (default: 512, on a GPU 2048)")
      ->check(CLI::Range(0, 65536));
  app->add_option("--threads", flags->threads, "Compute threads (default: all cores)")
      ->check(CLI::Range(0, 1024));
}

void AddServerFlags(CLI::App* app, ModelFlags* flags) {
  app->add_option("--kv-host-bytes", flags->kv_host_bytes,
                  "Host memory in which KV blocks of idle sessions sleep, e.g. 4G; 0 for none")
      ->capture_default_str();
  CLI::Option* directory = app->add_option(
      "--kv-disk-dir", flags->kv_disk_dir,
      "Directory of files in which they sleep then, found again after a restart (default: none)");
  app->add_option("--kv-disk-bytes", flags->kv_disk_bytes, "Most that these files may take")
      ->needs(directory)
      ->capture_default_str();
  app->add_option("--max-queued", flags->max_queued,
                  "Waiting requests; more are refused with 429 and Retry-After")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
}

Precision PrecisionOf(const std::string& dtype) {
  return dtype == "f32" ? Precision::kF32 : dtype == "fp8" ? Precision::kFp8 : Precision::kBf16;
}

Result<std::unique_ptr<Engine>> StartEngine(const ModelFlags& flags, const ServedModel& model) {
  SetComputeThreads(flags.threads);
  EngineOptions options;
  ASSIGN_OR_RETURN(options.policy, LoadPolicy(PolicyOf(flags)));
  if (!flags.kv_memory.empty()) {
    ASSIGN_OR_RETURN(options.kv_memory, BytesOf("--kv-memory", flags.kv_memory));
    if (options.kv_memory == 0) return InvalidArgument("--kv-memory is 0; leave it out to let it be chosen");
  }
  if (flags.kv_budget_bits > 0 && !options.policy.priced) {
    return InvalidArgument("--kv-budget-bits needs a policy with a distortion table; '" +
                           options.policy.name + "' says fixed formats");
  }
  options.kv_budget_bits = flags.kv_budget_bits;
  ASSIGN_OR_RETURN(options.store.host_bytes, BytesOf("--kv-host-bytes", flags.kv_host_bytes));
  options.store.disk_dir = flags.kv_disk_dir;
  if (!flags.kv_disk_dir.empty()) {
    ASSIGN_OR_RETURN(options.store.disk_bytes, BytesOf("--kv-disk-bytes", flags.kv_disk_bytes));
    if (options.store.disk_bytes == 0) {
      return InvalidArgument("--kv-disk-bytes is 0; leave out --kv-disk-dir to keep nothing on disk");
    }
    // Arithmetic in F32 makes other keys and values than BF16 does.
    ASSIGN_OR_RETURN(options.store.fingerprint, CheckpointIdentity(model.directory, flags.tokenizer));
    options.store.fingerprint += " " + flags.dtype + " " + flags.load_format;
  }
  options.max_queued = flags.max_queued;
  options.max_model_len = flags.max_model_len;
  options.max_running = flags.max_num_seqs;
  ModelOptions model_options;
  model_options.device = flags.device == "cpu"    ? Device::kCpu
                         : flags.device == "cuda" ? Device::kCuda
                                                  : Device::kAuto;
  model_options.precision = PrecisionOf(flags.dtype);
  model_options.dummy_weights = flags.load_format == "dummy";
  model_options.codec = flags.kv_codec == "paper" ? Codec::kPaper : Codec::kRotated;
  ASSIGN_OR_RETURN(std::unique_ptr<Model> loaded, Model::Load(model.directory, model_options));
  spdlog::info("loaded {} ({} parameters, {}, {})", model.directory, Count(loaded->parameters()), flags.dtype,
               loaded->on_gpu() ? "on the GPU" : fmt::format("{} threads", ComputeThreads()));
  options.max_step_tokens = flags.max_num_batched_tokens;
  if (options.max_step_tokens == 0) {
    options.max_step_tokens = std::max(loaded->on_gpu() ? 2048 : 512, options.max_running);
  }
  return Engine::Create(std::move(loaded), model.preprocessor, model.generation, model.markup, options);
}

}  // namespace triaxial
