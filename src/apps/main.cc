#include <cstdio>
#include <string>
#include <vector>

#include "apps/commands.h"
#include "base/log.h"

namespace {

// What was wrong on the command line, in one sentence on stderr; help and version go to stdout.
int ReportUsage(const CLI::App& app, const CLI::ParseError& error) {
  if (error.get_exit_code() == 0) return app.exit(error);
  const CLI::App* command = &app;
  std::string name = "triaxial";
  while (!command->get_subcommands().empty()) {
    command = command->get_subcommands().front();
    name += " " + command->get_name();
  }
  std::string message = error.what();
  const std::vector<std::string> unknown = command->remaining();
  const bool wants_command = command->get_require_subcommand_min() > 0;
  if (wants_command) {
    message = unknown.empty() ? "a command is missing" : "there is no command '" + unknown.front() + "'";
  }
  std::fprintf(stderr, "%s: %s; see '%s --help'\n", name.c_str(), message.c_str(), name.c_str());
  return 2;
}

}  // namespace

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
    return ReportUsage(app, error);
  }
  triaxial::InitLogging(verbose);
  for (const auto& [name, run] : commands) {
    if (!app.got_subcommand(name)) continue;
    triaxial::Status status;
    try {
      status = run();
    } catch (const std::exception&
                 error) {  // memory and devices; whatever a command can put right, it does itself
      status = triaxial::Internal(error.what());
    }
    if (!status.ok()) {
      std::fprintf(stderr, "triaxial %s: %s\n", name, status.message().c_str());
      return 1;
    }
  }
  return 0;
}
