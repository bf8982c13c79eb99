// What `triaxial calibrate --codec-out` does first, alone and with the choices that experiments need.
#include <fmt/core.h>

#include <CLI/CLI.hpp>
#include <string>

#include "calib/codec_fit.h"

namespace triaxial {
namespace {

struct Flags {
  std::string model = "models/pocket-agent";
  std::string conversations;
  std::string output;
  CodecFitOptions fit;
};

Status Run(const Flags& flags) {
  ASSIGN_OR_RETURN(const Trajectories conversations, Trajectories::Open({flags.conversations}));
  ASSIGN_OR_RETURN(const ServedModel model, LoadServedModel(flags.model, ""));
  ASSIGN_OR_RETURN(const KvCalibration calibration, FitCodec(model, conversations, flags.fit));
  return SaveKvCalibration(flags.output, calibration, model.config.text.head_dim);
}

int Main(int argc, char** argv) {
  Flags flags;
  CLI::App app{"Fits kv_calibration.json of a checkpoint on recorded conversations"};
  app.add_option("--model", flags.model, "checkpoint directory")->capture_default_str();
  app.add_option("--conversations", flags.conversations,
                 "JSON lines {\"messages\", \"tools\"}, image paths relative to the file")
      ->required();
  app.add_option("--output", flags.output, "file to write")->required();
  app.add_option("--fit", flags.fit.factor_conversations, "conversations for the factors")
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  app.add_option("--clip", flags.fit.level_conversations,
                 "further conversations for clips and gains; 0 keeps them at 1")
      ->check(CLI::Range(0, 1 << 20))
      ->capture_default_str();
  app.add_flag("!--no-value-equalization", flags.fit.equalize_values, "Leave the value channels as they are");
  CLI11_PARSE(app, argc, argv);
  flags.fit.notice = [](const std::string& line) {
    fmt::print("{}\n", line);
    std::fflush(stdout);
  };
  const Status status = Run(flags);
  if (!status.ok()) fmt::print(stderr, "fit_kv_calibration: {}\n", status.message());
  return status.ok() ? 0 : 1;
}

}  // namespace
}  // namespace triaxial

int main(int argc, char** argv) { return triaxial::Main(argc, argv); }
