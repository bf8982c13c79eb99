// Rewrites a checkpoint so that its function stays and its KV cache becomes hard to quantize
// (calib/hard_checkpoint.h).
#include "calib/hard_checkpoint.h"

#include <fmt/core.h>

#include <CLI/CLI.hpp>
#include <sstream>
#include <string>

namespace {

// "1,2/3,4": channels of two layers. CLI11 reports what is no number.
std::vector<std::vector<int>> ParseChannels(const std::string& text) {
  std::vector<std::vector<int>> layers;
  std::stringstream in(text);
  for (std::string layer; std::getline(in, layer, '/');) {
    layers.emplace_back();
    std::stringstream names(layer);
    for (std::string name; std::getline(names, name, ',');) {
      int channel = -1;
      if (!CLI::detail::lexical_cast(name, channel))
        throw CLI::ValidationError("--key-channels", "no number: " + name);
      layers.back().push_back(channel);
    }
  }
  return layers;
}

}  // namespace

int main(int argc, char** argv) {
  triaxial::Hardening hardening;
  std::string from = "models/pocket-agent";
  std::string to;
  CLI::App app{"Makes a checkpoint whose KV cache is hard to quantize and whose function is unchanged"};
  app.add_option("--model", from, "Checkpoint directory")->capture_default_str();
  app.add_option("--output", to, "Directory to write")->required();
  app.add_option("--key-scale", hardening.key_scale,
                 "Power of two that chosen key channels are multiplied by")
      ->capture_default_str();
  app.add_option("--key-pairs", hardening.key_pairs, "RoPE pairs of key channels chosen in each layer")
      ->capture_default_str();
  app.add_option_function<std::string>(
      "--key-channels", [&](const std::string& text) { hardening.key_channels = ParseChannels(text); },
      "Instead of --key-pairs and the seed: channels below half a head, by layer, such as 1,2/3,4");
  app.add_option("--value-scale", hardening.value_scale, "Likewise for value channels; 1 leaves them")
      ->capture_default_str();
  app.add_option("--value-channels", hardening.value_channels,
                 "Value channels chosen in each layer and KV head")
      ->capture_default_str();
  app.add_flag("--dense-values", hardening.dense_values,
               "Scale as many directions drawn at random instead of value channels");
  app.add_option("--seed", hardening.seed, "Of the choice")->capture_default_str();
  CLI11_PARSE(app, argc, argv);
  const triaxial::Status status = triaxial::HardenCheckpoint(from, to, hardening);
  if (!status.ok()) fmt::print(stderr, "hard_checkpoint: {}\n", status.message());
  return status.ok() ? 0 : 1;
}
