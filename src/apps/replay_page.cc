#include "apps/replay_page.h"

#include "apps/replay_report_html.h"
#include "base/check.h"

namespace triaxial {

std::string ReplayPage(const Json& about, const std::vector<PolicyRun>& runs) {
  Json data = ReportJson(runs);
  data["about"] = about;
  for (int f = 0; f < kFormats; ++f) data["formats"].push_back(std::string(Name(static_cast<Format>(f))));
  for (size_t i = 0; i < runs.size(); ++i) {
    data["policies"][i]["description"] = runs[i].policy.description;
    data["policies"][i]["series"] = SeriesJson(runs[i].result.series);
  }
  // Inside a script element, so that no name of a file or policy can close it.
  std::string json = data.dump(-1, ' ', false, Json::error_handler_t::replace);
  for (size_t at = json.find('<'); at != std::string::npos; at = json.find('<', at))
    json.replace(at, 1, "\\u003c");
  std::string page = kReplayReportHtml;
  constexpr std::string_view kSlot = "__DATA__";
  const size_t slot = page.find(kSlot);
  CHECK(slot != std::string::npos);
  return page.replace(slot, kSlot.size(), json);
}

}  // namespace triaxial
