#include <cstdio>

#include "apps/commands.h"
#include "base/log.h"

int main(int argc, char** argv) {
  CLI::App app(
      "triaxial: agentic multimodal LLM serving with a KV cache that stores each block at the precision it "
      "deserves");
  app.set_version_flag("--version", TRIAXIAL_VERSION);
  app.require_subcommand(1);
  app.fallthrough(false);
  bool verbose = false;
  app.add_flag("-v,--verbose", verbose, "Log more");
  const std::pair<const char*, triaxial::Command> commands[] = {
      {"serve", triaxial::AddServe(&app)},   {"generate", triaxial::AddGenerate(&app)},
      {"tag", triaxial::AddTag(&app)},       {"inspect", triaxial::AddInspect(&app)},
      {"policy", triaxial::AddPolicy(&app)}, {"demo", triaxial::AddDemo(&app)},
      {"bench", triaxial::AddBench(&app)},   {"calibrate", triaxial::AddCalibrate(&app)},
      {"eval", triaxial::AddEval(&app)},     {"replay", triaxial::AddReplay(&app)},
  };
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return app.exit(error);
  }
  triaxial::InitLogging(verbose);
  for (const auto& [name, run] : commands) {
    if (!app.got_subcommand(name)) continue;
    const triaxial::Status status = run();
    if (!status.ok()) {
      std::fprintf(stderr, "triaxial %s: %s\n", name, status.message().c_str());
      return 1;
    }
  }
  return 0;
}
