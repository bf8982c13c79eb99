// Line charts as SVG, for results in documents.
#ifndef TRIAXIAL_APPS_BENCH_CHART_H_
#define TRIAXIAL_APPS_BENCH_CHART_H_

#include <string>
#include <utility>
#include <vector>

namespace triaxial {

struct ChartSeries {
  std::string name;
  std::vector<std::pair<double, double>> points;  // x ascending
};

// One pair of axes. Values on a logarithmic axis must be positive; others are left out.
struct Chart {
  std::string title;
  std::string x_label, y_label;
  bool log_x = false, log_y = false;  // a linear axis begins at 0
  bool marks = true;                  // a dot at each point
  std::vector<ChartSeries> series;
};

// Charts side by side under a legend; a series has the colour of its name's first appearance everywhere.
std::string ChartsSvg(const std::vector<Chart>& charts);

}  // namespace triaxial

#endif  // TRIAXIAL_APPS_BENCH_CHART_H_
