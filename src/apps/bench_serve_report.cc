#include "apps/bench_serve_report.h"

#include <algorithm>
#include <cstdio>
#include <set>
#include <tuple>

#include "apps/terminal.h"

namespace triaxial {
namespace {

Json SpreadJson(const std::vector<double>& values) {
  const BenchSpread s = SpreadOf(values);
  return {{"count", values.size()}, {"mean", s.mean}, {"p50", s.p50},
          {"p90", s.p90},           {"p99", s.p99},   {"max", s.max}};
}

// Mean and largest value of a gauge; null where the server has none.
Json GaugeJson(const std::vector<BenchGauges>& gauges, double BenchGauges::*field) {
  double sum = 0, most = 0;
  int count = 0;
  for (const BenchGauges& g : gauges) {
    if (g.*field < 0) continue;
    sum += g.*field;
    most = std::max(most, g.*field);
    ++count;
  }
  if (count == 0) return nullptr;
  return {{"mean", sum / count}, {"max", most}};
}

// How much a counter grew; null where the server has none.
Json GrowthJson(const std::vector<BenchGauges>& gauges, double BenchGauges::*field) {
  if (gauges.empty() || gauges.back().*field < 0) return nullptr;
  return gauges.back().*field - std::max(0.0, gauges.front().*field);
}

// Share of the engine's time in which it was not in the model.
Json HostShareJson(const std::vector<BenchGauges>& gauges) {
  const Json model = GrowthJson(gauges, &BenchGauges::model_seconds),
             host = GrowthJson(gauges, &BenchGauges::host_seconds);
  if (model.is_null() || host.is_null()) return nullptr;
  const double sum = model.get<double>() + host.get<double>();
  return sum > 0 ? Json(host.get<double>() / sum) : Json(nullptr);
}

// The cache's own account of itself. Capacity is the tokens that would fill the arena at the mix it holds.
Json KvJson(const BenchWindow& window) {
  double tokens = 0, usage = 0, bits = 0, bytes = 0, most = 0;
  for (const BenchGauges& g : window.gauges) {
    if (g.kv_tokens <= 0 || g.kv_usage <= 0) continue;
    tokens += g.kv_tokens;
    usage += g.kv_usage;
    bytes += std::max(0.0, g.kv_bytes);
    bits += g.effective_bits * g.kv_tokens;
    most = std::max(most, g.kv_tokens + std::max(0.0, g.cached_tokens));
  }
  Json json = {{"request_bits", window.request_bits}};
  if (tokens <= 0) return json;
  json["effective_bits"] = bits / tokens;
  json["bytes_per_token"] = bytes / tokens;
  json["capacity_tokens"] = tokens / usage;
  json["most_tokens_held"] = most;
  return json;
}

// At most this many points of each series, evenly spaced.
Json SeriesJson(const std::vector<BenchGauges>& gauges) {
  constexpr size_t kMost = 240;
  Json json = {{"seconds", Json::array()},
               {"running", Json::array()},
               {"waiting", Json::array()},
               {"kv_usage", Json::array()}};
  const size_t stride = std::max<size_t>(1, (gauges.size() + kMost - 1) / kMost);
  const auto rounded = [](double x) { return std::round(x * 1000) / 1000; };
  for (size_t i = 0; i < gauges.size(); i += stride) {
    json["seconds"].push_back(rounded(gauges[i].seconds));
    json["running"].push_back(gauges[i].running);
    json["waiting"].push_back(gauges[i].waiting);
    json["kv_usage"].push_back(rounded(gauges[i].kv_usage));
  }
  return json;
}

// A percentile of a SpreadJson; nothing where nothing was seen.
std::string Milliseconds(const Json& spread, const char* percentile) {
  if (spread["count"] == 0) return "";
  const auto seconds = spread[percentile].get<double>();
  return Fixed(1e3 * seconds, seconds < 0.1 ? 1 : 0);
}

double NumberOr(const Json& json, const char* field, double otherwise) {
  const auto it = json.find(field);
  return it != json.end() && it->is_number() ? it->get<double>() : otherwise;
}

}  // namespace

Json BenchRunJson(const BenchPoint& point, const BenchWindow& window) {
  const double seconds = std::max(window.seconds, 1e-9);
  return {{"policy", point.policy},
          {"kv_memory", point.kv_memory},
          {"workload", point.workload},
          {"concurrency", point.concurrency},
          {"seconds", window.seconds},
          {"requests", window.requests},
          {"refused", window.refused},
          {"output_tokens", window.output_tokens},
          {"output_tokens_per_s", window.output_tokens / seconds},
          {"server_output_tokens", GrowthJson(window.gauges, &BenchGauges::generated)},
          {"prompt_tokens", window.prompt_tokens},
          {"cached_tokens", window.cached_tokens},
          {"prompt_tokens_per_s", static_cast<double>(window.prompt_tokens) / seconds},
          {"ttft_s", SpreadJson(window.ttft)},
          {"tpot_s", SpreadJson(window.tpot)},
          {"running", GaugeJson(window.gauges, &BenchGauges::running)},
          {"waiting", GaugeJson(window.gauges, &BenchGauges::waiting)},
          {"kv", KvJson(window)},
          {"preemptions", GrowthJson(window.gauges, &BenchGauges::preemptions)},
          {"demotions", GrowthJson(window.gauges, &BenchGauges::demotions)},
          {"host_share", HostShareJson(window.gauges)},
          {"client_busy", window.client_busy},
          {"series", SeriesJson(window.gauges)}};
}

void PrintServeReport(const Json& runs) {
  std::set<std::pair<std::string, std::string>> printed;
  for (const Json& first : runs) {
    const std::string workload = first["workload"].get<std::string>(),
                      memory = first["kv_memory"].get<std::string>();
    if (!printed.insert({workload, memory}).second) continue;
    std::printf("\n%s, KV memory %s\n", Bold(workload).c_str(), memory.c_str());
    Table table({"clients", "policy", "tokens/s", "ratio", "TTFT p50 ms", "p99", "TPOT p50 ms", "p99",
                 "running", "bits", "capacity", "ratio", "prompt cached", "requests", "preempted"},
                {true, false, true, true, true, true, true, true, true, true, true, true, true, true, true});
    std::set<int> levels;
    for (const Json& run : runs) {
      if (run["workload"] == workload && run["kv_memory"] == memory)
        levels.insert(run["concurrency"].get<int>());
    }
    for (const int level : levels) {
      double base = 0, base_capacity = 0;
      for (const Json& run : runs) {
        if (run["workload"] != workload || run["kv_memory"] != memory || run["concurrency"] != level)
          continue;
        if (run.contains("error")) {
          table.Add({std::to_string(level), run["policy"].get<std::string>(), "failed"});
          continue;
        }
        const double speed = run["output_tokens_per_s"].get<double>();
        const double capacity = NumberOr(run["kv"], "capacity_tokens", 0);
        if (base == 0) base = speed, base_capacity = capacity;
        const auto prompt = run["prompt_tokens"].get<double>();
        const Json &ttft = run["ttft_s"], &tpot = run["tpot_s"];
        table.Add({std::to_string(level), run["policy"].get<std::string>(), Fixed(speed, 1),
                   base > 0 ? Fixed(speed / base, 2) + "x" : "", Milliseconds(ttft, "p50"),
                   Milliseconds(ttft, "p99"), Milliseconds(tpot, "p50"), Milliseconds(tpot, "p99"),
                   run["running"].is_null() ? "" : Fixed(run["running"]["mean"], 1),
                   Fixed(NumberOr(run["kv"], "effective_bits", run["kv"]["request_bits"]), 2),
                   capacity > 0 ? Count(static_cast<int64_t>(capacity)) : "",
                   base_capacity > 0 ? Fixed(capacity / base_capacity, 2) + "x" : "",
                   prompt > 0 ? Fixed(100 * run["cached_tokens"].get<double>() / prompt, 0) + "%" : "",
                   std::to_string(run["requests"].get<int64_t>()),
                   run["preemptions"].is_null() ? "" : Fixed(run["preemptions"], 0)});
      }
    }
    table.Print();
  }
}

}  // namespace triaxial
