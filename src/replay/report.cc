#include "replay/report.h"

#include <cmath>
#include <functional>

namespace triaxial {
namespace {

// Six significant digits: enough for a curve, and a page of them stays small.
double Rounded(double value) {
  if (value == 0 || !std::isfinite(value)) return 0;
  const double scale = std::pow(10.0, 5 - std::floor(std::log10(std::fabs(value))));
  return std::round(value * scale) / scale;
}

Json PolicyJson(const PolicyRun& run) {
  const SimulationResult& r = run.result;
  const double seconds = r.seconds > 0 ? r.seconds : 1;
  Json json = {{"name", run.policy.name},
               {"effective_bits", r.effective_bits},
               {"capacity_tokens", r.capacity_tokens},
               {"rounding_loss", r.rounding_loss},
               {"hit_rate", r.hit_rate},
               {"demotions", r.demotions},
               {"preemptions", r.preemptions},
               {"throughput", static_cast<double>(r.generated_tokens) / seconds},
               {"ttft_p50", Percentile(r.ttft, 0.5)},
               {"ttft_p99", Percentile(r.ttft, 0.99)},
               {"predicted_loss", r.predicted_loss ? Json(*r.predicted_loss) : Json(nullptr)},
               {"tpot_p50", Percentile(r.tpot, 0.5)},
               {"tpot_p99", Percentile(r.tpot, 0.99)},
               {"block_bits", r.block_bits},
               {"tail_share", r.tail_share},
               {"filled", r.filled ? Json(*r.filled) : Json(nullptr)},
               {"mean_running", r.mean_running},
               {"peak_running", r.peak_running},
               {"peak_usage", r.peak_usage},
               {"peak_tokens", r.peak_tokens},
               {"evictions", r.evictions},
               {"compactions", r.compactions},
               {"requests", r.requests},
               {"finished", r.finished},
               {"refused", r.refused},
               {"failed", r.failed},
               {"prompt_tokens", r.prompt_tokens},
               {"prefilled_tokens", r.prefilled_tokens},
               {"generated_tokens", r.generated_tokens},
               {"steps", r.steps},
               {"seconds", r.seconds},
               {"wall_seconds", run.wall_seconds}};
  for (int f = 0; f < kFormats; ++f) {
    json["share_of_tokens"][std::string(Name(static_cast<Format>(f)))] =
        r.share_of_tokens[static_cast<size_t>(f)];
  }
  for (int c = 0; c < kCauses; ++c) {
    json["demotions_by_cause"][std::string(Name(static_cast<Cause>(c)))] =
        r.demotions_by_cause[static_cast<size_t>(c)];
  }
  return json;
}

}  // namespace

Json ReportJson(const std::vector<PolicyRun>& runs) {
  Json policies = Json::array();
  for (const PolicyRun& run : runs) policies.push_back(PolicyJson(run));
  return {{"policies", std::move(policies)}};
}

Json SeriesJson(const TimeSeries& series) {
  const auto curve = [&](const std::function<double(const Sample&)>& value, bool rate) {
    Json values = Json::array();
    for (const TimeSeries::Point& point : series.points()) {
      const double by = rate ? series.interval() : point.seconds;
      values.push_back(by > 0 ? Rounded(value(point.sample) / by) : 0.0);
    }
    return values;
  };
  Json json = {{"interval", series.interval()}};
  json["running"] = curve([](const Sample& s) { return s.running; }, false);
  json["waiting"] = curve([](const Sample& s) { return s.waiting; }, false);
  for (int f = 0; f < kFormats; ++f) {
    const auto index = static_cast<size_t>(f);
    json["bytes"][std::string(Name(static_cast<Format>(f)))] =
        curve([index](const Sample& s) { return s.bytes[index]; }, false);
  }
  json["bytes"]["tails"] = curve([](const Sample& s) { return s.tail_bytes; }, false);
  json["price"] = curve([](const Sample& s) { return s.price; }, false);
  json["generated"] = curve([](const Sample& s) { return s.generated; }, true);
  json["prefilled"] = curve([](const Sample& s) { return s.prefilled; }, true);
  json["demotions"] = curve([](const Sample& s) { return s.demotions; }, true);
  json["preemptions"] = curve([](const Sample& s) { return s.preemptions; }, true);
  Json hits = Json::array();
  for (const TimeSeries::Point& point : series.points()) {
    const double looked_up = point.sample.looked_up;
    hits.push_back(looked_up > 0 ? Json(Rounded(point.sample.found / looked_up)) : Json(nullptr));
  }
  json["hit_rate"] = std::move(hits);
  return json;
}

}  // namespace triaxial
