// Rewrites a checkpoint so that its function stays and its KV cache becomes hard to quantize
// (calib/hard_checkpoint.h).
#include "calib/hard_checkpoint.h"

#include <fmt/core.h>

#include <CLI/CLI.hpp>
#include <string>

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
  app.add_option("--value-scale", hardening.value_scale, "Likewise for value channels; 1 leaves them")
      ->capture_default_str();
  app.add_option("--value-channels", hardening.value_channels,
                 "Value channels chosen in each layer and KV head")
      ->capture_default_str();
  app.add_option("--seed", hardening.seed, "Of the choice")->capture_default_str();
  CLI11_PARSE(app, argc, argv);
  const triaxial::Status status = triaxial::HardenCheckpoint(from, to, hardening);
  if (!status.ok()) fmt::print(stderr, "hard_checkpoint: {}\n", status.message());
  return status.ok() ? 0 : 1;
}
