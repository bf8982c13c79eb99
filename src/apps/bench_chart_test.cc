#include "apps/bench_chart.h"

#include <gtest/gtest.h>

#include <regex>
#include <string>

namespace triaxial {
namespace {

// The places of all dots in an SVG.
std::vector<std::pair<double, double>> Dots(const std::string& svg) {
  std::vector<std::pair<double, double>> dots;
  const std::regex dot("<circle cx=\"([0-9.]+)\" cy=\"([0-9.]+)\"");
  for (std::sregex_iterator it(svg.begin(), svg.end(), dot), end; it != end; ++it)
    dots.emplace_back(std::stod((*it)[1]), std::stod((*it)[2]));
  return dots;
}

TEST(Chart, PlacesPointsByTheirValues) {
  const Chart linear{"t", "x", "y", false, false, true, {{"a", {{0, 0}, {5, 50}, {10, 100}}}}};
  const auto dots = Dots(ChartsSvg({linear}));
  ASSERT_EQ(dots.size(), 3u);
  EXPECT_NEAR(dots[1].first - dots[0].first, dots[2].first - dots[1].first, 0.02);
  EXPECT_NEAR(dots[0].second - dots[1].second, dots[1].second - dots[2].second, 0.02);
  EXPECT_GT(dots[0].second, dots[2].second);  // up is more

  const Chart log{"t", "x", "y", true, true, true, {{"a", {{1, 0.01}, {4, 0.1}, {16, 1}, {64, 0}}}}};
  const auto places = Dots(ChartsSvg({log}));
  ASSERT_EQ(places.size(), 3u);  // 0 has no place on a logarithmic axis
  EXPECT_NEAR(places[1].first - places[0].first, places[2].first - places[1].first, 0.02);
  EXPECT_NEAR(places[0].second - places[1].second, places[1].second - places[2].second, 0.02);
}

TEST(Chart, OneColourForANameInAllCharts) {
  const Chart one{"1", "x", "y", false, false, true, {{"a", {{1, 1}}}, {"b", {{1, 2}}}}};
  const Chart two{"2", "x", "y", false, false, true, {{"b", {{1, 2}}}}};
  const std::string svg = ChartsSvg({one, two});
  std::vector<std::string> colors;
  const std::regex line("<polyline[^>]*stroke=\"(#[0-9A-F]+)\"");
  for (std::sregex_iterator it(svg.begin(), svg.end(), line), end; it != end; ++it)
    colors.push_back((*it)[1]);
  ASSERT_EQ(colors.size(), 3u);
  EXPECT_NE(colors[0], colors[1]);
  EXPECT_EQ(colors[1], colors[2]);
}

TEST(Chart, NamesCannotBreakTheMarkup) {
  const std::string svg = ChartsSvg({{"a < b & c", "", "", false, false, true, {{"<script>", {{1, 1}}}}}});
  EXPECT_EQ(svg.find("<script"), std::string::npos);
  EXPECT_NE(svg.find("a &lt; b &amp; c"), std::string::npos);
}

}  // namespace
}  // namespace triaxial
