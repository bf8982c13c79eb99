// `triaxial bench plot`: pictures of what the other subcommands wrote.
#include <cstdio>
#include <filesystem>
#include <map>

#include "apps/bench.h"
#include "apps/bench_chart.h"
#include "base/file.h"
#include "base/json.h"

namespace triaxial {
namespace {

// The series of a name, made at its first use; series keep that order.
ChartSeries& SeriesOf(Chart* chart, const std::string& name) {
  for (ChartSeries& series : chart->series) {
    if (series.name == name) return series;
  }
  chart->series.push_back({name, {}});
  return chart->series.back();
}

Chart& ChartOf(std::vector<Chart>* charts, const Chart& wanted) {
  for (Chart& chart : *charts) {
    if (chart.title == wanted.title) return chart;
  }
  charts->push_back(wanted);
  return charts->back();
}

using Pictures = std::vector<std::pair<std::string, std::vector<Chart>>>;  // by what the file's name ends in

Pictures ServePictures(const Json& runs) {
  std::vector<Chart> speed, first_token, token, running;
  std::map<std::string, int> most;  // streams of a chart
  const auto title_of = [](const Json& run) {
    return run.at("workload").get<std::string>() + ", KV memory " + run.at("kv_memory").get<std::string>();
  };
  for (const Json& run : runs) {
    if (run.contains("error")) continue;
    const std::string title = title_of(run), policy = run.at("policy").get<std::string>();
    const auto level = run.at("concurrency").get<double>();
    most[title] = std::max(most[title], static_cast<int>(level));
    const auto add = [&](std::vector<Chart>* charts, const char* label, bool log_y, double value) {
      Chart& chart = ChartOf(charts, {title, "concurrent conversations", label, true, log_y, true, {}});
      SeriesOf(&chart, policy).points.emplace_back(level, value);
    };
    add(&speed, "output tokens/s", false, run.at("output_tokens_per_s").get<double>());
    if (run.at("ttft_s").at("count") != 0)
      add(&first_token, "s to the first token (median)", true, run["ttft_s"]["p50"]);
    if (run.at("tpot_s").at("count") != 0)
      add(&token, "ms a token after it (median)", false, 1e3 * run["tpot_s"]["p50"].get<double>());
  }
  for (const Json& run : runs) {
    if (run.contains("error")) continue;
    const std::string title = title_of(run);
    if (run["concurrency"] != most[title]) continue;
    Chart& chart = ChartOf(&running, {title + ", " + std::to_string(most[title]) + " conversations",
                                      "s",
                                      "requests running",
                                      false,
                                      false,
                                      false,
                                      {}});
    ChartSeries& series = SeriesOf(&chart, run["policy"]);
    const Json& over_time = run.at("series");
    for (size_t i = 0; i < over_time.at("seconds").size(); ++i)
      series.points.emplace_back(over_time["seconds"][i].get<double>(),
                                 over_time.at("running").at(i).get<double>());
  }
  return {{"throughput", speed}, {"ttft", first_token}, {"tpot", token}, {"running", running}};
}

Pictures AttentionPictures(const Json& results, bool decode) {
  std::vector<Chart> charts;
  for (const Json& result : results) {
    const std::string title = "group " + result.at("group").dump() + ", batch " + result.at("batch").dump();
    Chart& chart = ChartOf(&charts, {title,
                                     decode ? "tokens in the cache" : "tokens before the chunk",
                                     decode ? "ns per KV token and layer" : "ms per layer",
                                     decode,
                                     false,
                                     true,
                                     {}});
    SeriesOf(&chart, result.at("format"))
        .points.emplace_back(result.at(decode ? "context" : "prefix").get<double>(),
                             result.at(decode ? "ns_per_token" : "ms").get<double>());
  }
  return {{decode ? "decode" : "prefill", charts}};
}

Status Plot(const std::string& file, const std::string& out) {
  ASSIGN_OR_RETURN(const Json report, ReadJsonFile(file));
  Pictures pictures;
  try {
    if (report.contains("runs")) pictures = ServePictures(report["runs"]);
    if (report.contains("decode")) pictures = AttentionPictures(report["decode"], true);
    if (report.contains("prefill")) pictures = AttentionPictures(report["prefill"], false);
  } catch (const Json::exception& error) {
    return InvalidArgument(file +
                           " is not what triaxial bench serve, decode or prefill writes: " + error.what());
  }
  if (pictures.empty())
    return InvalidArgument(file + " holds no results of triaxial bench serve, decode or prefill");
  const std::string stem = std::filesystem::path(file).stem().string();
  for (const auto& [what, charts] : pictures) {
    if (charts.empty()) continue;
    const std::string name = stem == what ? stem : stem + "-" + what;
    const std::string path = (std::filesystem::path(out) / (name + ".svg")).string();
    RETURN_IF_ERROR(WriteFile(path, ChartsSvg(charts)));
    std::puts(path.c_str());
  }
  return OkStatus();
}

}  // namespace

Command AddBenchPlot(CLI::App* bench) {
  struct Flags {
    std::string file, out = "docs/plots";
  };
  auto flags = std::make_shared<Flags>();
  CLI::App* command = bench->add_subcommand("plot", "Draw results of serve, decode or prefill as SVG");
  command->add_option("FILE", flags->file, "What --json wrote")->required();
  command->add_option("--out", flags->out, "Directory for the pictures")->capture_default_str();
  return [flags] { return Plot(flags->file, flags->out); };
}

}  // namespace triaxial
