#include <cstdio>

#include "apps/commands.h"
#include "apps/terminal.h"
#include "base/json.h"
#include "io/model_config.h"
#include "io/safetensors.h"
#include "kv/calibration.h"

namespace triaxial {
namespace {

Json Describe(const ModelConfig& config, int64_t parameters, bool calibrated) {
  const TextConfig& t = config.text;
  Json json;
  json["architecture"] = config.architecture == Architecture::kQwen3Vl ? "qwen3_vl" : "qwen3";
  json["parameters"] = parameters;
  json["text"] = {{"hidden_size", t.hidden_size}, {"layers", t.num_layers},
                  {"heads", t.num_heads},         {"kv_heads", t.num_kv_heads},
                  {"head_dim", t.head_dim},       {"intermediate_size", t.intermediate_size},
                  {"vocab_size", t.vocab_size},   {"max_positions", t.max_position_embeddings},
                  {"rope_theta", t.rope_theta},   {"tied_embeddings", t.tie_word_embeddings}};
  if (config.vision) {
    const VisionConfig& v = *config.vision;
    json["vision"] = {{"depth", v.depth},
                      {"hidden_size", v.hidden_size},
                      {"heads", v.num_heads},
                      {"intermediate_size", v.intermediate_size},
                      {"patch_size", v.patch_size},
                      {"out_hidden_size", v.out_hidden_size},
                      {"deepstack", v.deepstack_visual_indexes}};
  }
  json["kv_calibrated"] = calibrated;
  json["kv_bytes_per_token"] = Json::object();
  for (const Codec codec : {Codec::kRotated, Codec::kPaper}) {
    const KvGeometry geometry = {t.num_layers, t.num_kv_heads, t.head_dim, codec};
    Json formats = Json::object();
    for (int f = kFormats - 1; f >= 0; --f) {
      const Format format = static_cast<Format>(f);
      formats[std::string(Name(format))] = BlockBytes(geometry, format) / kBlockTokens;
    }
    json["kv_bytes_per_token"][std::string(Name(codec))] = std::move(formats);
  }
  return json;
}

}  // namespace

Command AddInspect(CLI::App* app) {
  struct Flags {
    ModelFlags model;
    bool json = false, tensors = false;
  };
  auto flags = std::make_shared<Flags>();
  CLI::App* command =
      app->add_subcommand("inspect", "A checkpoint: shapes, parameters, KV bytes per token by format");
  AddCheckpointFlags(command, &flags->model);
  command->remove_option(command->get_option("--tokenizer"));  // it reads none
  command->add_option("--load-format", flags->model.load_format, "'dummy' reads config.json alone")
      ->check(CLI::IsMember({"auto", "dummy"}))
      ->capture_default_str();
  command->add_flag("--tensors", flags->tensors, "List every tensor");
  command->add_flag("--json", flags->json, "Print JSON");
  return [flags]() -> Status {
    const std::string& directory = flags->model.model;
    ASSIGN_OR_RETURN(const ModelConfig config, LoadModelConfig(directory));
    ASSIGN_OR_RETURN(
        const KvCalibration calibration,
        LoadKvCalibration(directory, config.text.num_layers, config.text.num_kv_heads, config.text.head_dim));
    int64_t parameters = 0, bytes = 0;
    Checkpoint checkpoint;
    if (flags->model.load_format != "dummy") {
      ASSIGN_OR_RETURN(checkpoint, Checkpoint::Open(directory));
      for (const auto& [name, tensor] : checkpoint.tensors()) {
        parameters += tensor.elements;
        bytes += tensor.elements * ByteSize(tensor.dtype);
      }
    }
    Json json = Describe(config, parameters, calibration.calibrated);
    if (flags->json) {
      if (flags->tensors) {
        for (const auto& [name, tensor] : checkpoint.tensors())
          json["tensors"][name] = {{"dtype", std::string(Name(tensor.dtype))}, {"shape", tensor.shape}};
      }
      std::puts(json.dump(2).c_str());
      return OkStatus();
    }
    const TextConfig& t = config.text;
    std::printf("%s: %s\n", Bold(directory).c_str(), json["architecture"].get<std::string>().c_str());
    if (parameters > 0) {
      std::printf("%s parameters in %zu tensors, %s\n", Count(parameters).c_str(),
                  checkpoint.tensors().size(), Bytes(static_cast<double>(bytes)).c_str());
    }
    std::printf(
        "text: %d layers, hidden %d, %d query heads on %d KV heads of %d, MLP %d, vocabulary %d%s, %s "
        "positions\n",
        t.num_layers, t.hidden_size, t.num_heads, t.num_kv_heads, t.head_dim, t.intermediate_size,
        t.vocab_size, t.tie_word_embeddings ? " (tied)" : "", Count(t.max_position_embeddings).c_str());
    if (config.vision) {
      const VisionConfig& v = *config.vision;
      std::printf("vision: %d layers, hidden %d, %d heads, MLP %d, patches of %d, merged by %d\n", v.depth,
                  v.hidden_size, v.num_heads, v.intermediate_size, v.patch_size, v.spatial_merge_size);
    }
    std::printf("KV calibration: %s\n\n",
                calibration.calibrated ? "kv_calibration.json"
                                       : "none (2-bit keys of the rotated codec are stored at 4 bits)");
    Table table({"format", "codec rotated", "bits", "codec paper", "bits"}, {false, true, true, true, true});
    for (int f = kFormats - 1; f >= 0; --f) {
      const Format format = static_cast<Format>(f);
      std::vector<std::string> row = {Paint(format, Name(format))};
      for (const Codec codec : {Codec::kRotated, Codec::kPaper}) {
        const KvGeometry geometry = {t.num_layers, t.num_kv_heads, t.head_dim, codec};
        row.push_back(Count(BlockBytes(geometry, format) / kBlockTokens) + " B/token");
        row.push_back(Fixed(EffectiveBits(geometry, format), 2));
      }
      table.Add(std::move(row));
    }
    table.Print();
    if (flags->tensors) {
      std::puts("");
      Table tensors({"tensor", "dtype", "shape"});
      for (const auto& [name, tensor] : checkpoint.tensors()) {
        std::string shape;
        for (const int64_t extent : tensor.shape)
          shape += (shape.empty() ? "" : " x ") + std::to_string(extent);
        tensors.Add({name, std::string(Name(tensor.dtype)), shape});
      }
      tensors.Print();
    }
    return OkStatus();
  };
}

}  // namespace triaxial
