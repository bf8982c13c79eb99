#include "apps/bench.h"

namespace triaxial {

Command AddBench(CLI::App* app) {
  CLI::App* bench = app->add_subcommand("bench", "Measure kernels, models and servers on this machine");
  bench->require_subcommand(1);
  const std::vector<std::pair<std::string, Command>> commands = {
      {"decode", AddBenchDecode(bench)}, {"prefill", AddBenchPrefill(bench)}, {"codec", AddBenchCodec(bench)},
      {"model", AddBenchModel(bench)},   {"serve", AddBenchServe(bench)},     {"plot", AddBenchPlot(bench)},
  };
  return [bench, commands]() -> Status {
    for (const auto& [name, run] : commands) {
      if (bench->got_subcommand(name)) return run();
    }
    return OkStatus();
  };
}

}  // namespace triaxial
