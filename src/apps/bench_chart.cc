#include "apps/bench_chart.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdio>
#include <limits>

namespace triaxial {
namespace {

// Okabe and Ito's palette, which colour-blind readers tell apart too.
constexpr std::array<const char*, 8> kColors = {"#0072B2", "#D55E00", "#009E73", "#CC79A7",
                                                "#E69F00", "#56B4E9", "#000000", "#8C6D1F"};
constexpr double kWidth = 400, kHeight = 250;                       // of a chart's axes
constexpr double kLeft = 64, kRight = 24, kTop = 34, kBottom = 52;  // around them
constexpr double kLegend = 30;

std::string Escape(const std::string& text) {
  std::string out;
  for (const char c : text) {
    if (c == '<')
      out += "&lt;";
    else if (c == '&')
      out += "&amp;";
    else
      out += c;
  }
  return out;
}

std::string Number(double x) {
  char buffer[32];
  std::snprintf(buffer, sizeof(buffer), "%.2f", x);
  return buffer;
}

// "0.25", "40", "50k"; "16k" for 16384, as contexts are written.
std::string TickLabel(double x) {
  const bool binary = x >= 1024 && std::fmod(x, 1024) == 0, kilo = binary || std::abs(x) >= 10000;
  char buffer[32];
  std::snprintf(buffer, sizeof(buffer), "%.4g%s", x / (binary ? 1024 : kilo ? 1000 : 1), kilo ? "k" : "");
  return buffer;
}

struct Axis {
  bool log = false;
  double low = 0, high = 1;
  std::vector<double> ticks;

  // 0 to 1.
  double Place(double value) const {
    if (!log) return (value - low) / (high - low);
    return (std::log(value) - std::log(low)) / (std::log(high) - std::log(low));
  }
};

Axis LinearAxis(double most) {
  Axis axis;
  if (!(most > 0)) most = 1;
  const double power = std::pow(10, std::floor(std::log10(most)));
  double step = power;
  for (const double factor : {0.2, 0.5, 1.0, 2.0}) {
    step = factor * power;
    if (most / step <= 5.5) break;
  }
  for (int i = 0; i * step < most + 0.999 * step; ++i) axis.ticks.push_back(i * step);
  axis.high = axis.ticks.back();
  return axis;
}

// Ticks at the values themselves if they are few (batch sizes, contexts), else at powers of ten.
Axis LogAxis(std::vector<double> values, bool at_values) {
  Axis axis;
  axis.log = true;
  std::sort(values.begin(), values.end());
  values.erase(std::unique(values.begin(), values.end()), values.end());
  if (values.empty()) values = {1, 10};
  if (at_values && values.size() <= 10) {
    axis.ticks = values;
    axis.low = values.front() / 1.15;
    axis.high = values.back() * 1.15;
    return axis;
  }
  axis.low = std::pow(10, std::floor(std::log10(values.front())));
  axis.high = std::pow(10, std::ceil(std::log10(values.back()) + 1e-9));
  for (double tick = axis.low; tick <= axis.high * 1.001; tick *= 10) axis.ticks.push_back(tick);
  return axis;
}

std::string TextAt(double x, double y, const std::string& text, const char* anchor,
                   const std::string& more = "") {
  return "<text x=\"" + Number(x) + "\" y=\"" + Number(y) + "\" text-anchor=\"" + anchor + "\"" + more + ">" +
         Escape(text) + "</text>\n";
}

std::string Line(double x1, double y1, double x2, double y2, const char* color) {
  return "<line x1=\"" + Number(x1) + "\" y1=\"" + Number(y1) + "\" x2=\"" + Number(x2) + "\" y2=\"" +
         Number(y2) + "\" stroke=\"" + color + "\"/>\n";
}

std::string Draw(const Chart& chart, double x0, double y0, const std::vector<std::string>& names) {
  std::vector<double> xs, ys;
  const auto shown = [&](const std::pair<double, double>& p) {
    return (!chart.log_x || p.first > 0) && (!chart.log_y || p.second > 0);
  };
  for (const ChartSeries& series : chart.series) {
    for (const auto& point : series.points) {
      if (!shown(point)) continue;
      xs.push_back(point.first);
      ys.push_back(point.second);
    }
  }
  const auto most = [](const std::vector<double>& v) {
    return v.empty() ? 1 : *std::max_element(v.begin(), v.end());
  };
  const Axis x_axis = chart.log_x ? LogAxis(xs, true) : LinearAxis(most(xs));
  const Axis y_axis = chart.log_y ? LogAxis(ys, false) : LinearAxis(most(ys));
  const auto x_of = [&](double x) { return x0 + kWidth * x_axis.Place(x); };
  const auto y_of = [&](double y) { return y0 + kHeight * (1 - y_axis.Place(y)); };
  std::string svg = TextAt(x0, y0 - 12, chart.title, "start", " font-weight=\"bold\"");
  for (const double tick : y_axis.ticks) {
    svg += Line(x0, y_of(tick), x0 + kWidth, y_of(tick), "#e3e3e3");
    svg += TextAt(x0 - 8, y_of(tick) + 4, TickLabel(tick), "end");
  }
  for (const double tick : x_axis.ticks) {
    svg += Line(x_of(tick), y0 + kHeight, x_of(tick), y0 + kHeight + 5, "#555555");
    svg += TextAt(x_of(tick), y0 + kHeight + 19, TickLabel(tick), "middle");
  }
  svg += Line(x0, y0 + kHeight, x0 + kWidth, y0 + kHeight, "#555555");
  svg += TextAt(x0 + kWidth / 2, y0 + kHeight + 40, chart.x_label, "middle");
  const std::string turn =
      " transform=\"rotate(-90 " + Number(x0 - 48) + " " + Number(y0 + kHeight / 2) + ")\"";
  svg += TextAt(x0 - 48, y0 + kHeight / 2, chart.y_label, "middle", turn);
  for (const ChartSeries& series : chart.series) {
    const auto index =
        static_cast<size_t>(std::find(names.begin(), names.end(), series.name) - names.begin());
    const std::string color = kColors[index % kColors.size()];
    std::string path, dots;
    for (const auto& point : series.points) {
      if (!shown(point)) continue;
      const std::string x = Number(x_of(point.first)), y = Number(y_of(point.second));
      path += (path.empty() ? "" : " ") + x + "," + y;
      dots += "<circle cx=\"" + x + "\" cy=\"" + y + "\" r=\"3.5\" fill=\"" + color + "\"><title>" +
              Escape(series.name) + ": " + TickLabel(point.second) + "</title></circle>\n";
    }
    svg += "<polyline points=\"" + path + "\" fill=\"none\" stroke=\"" + color + "\" stroke-width=\"2\"/>\n";
    if (chart.marks) svg += dots;
  }
  return svg;
}

}  // namespace

std::string ChartsSvg(const std::vector<Chart>& charts) {
  std::vector<std::string> names;
  for (const Chart& chart : charts) {
    for (const ChartSeries& series : chart.series) {
      if (std::find(names.begin(), names.end(), series.name) == names.end()) names.push_back(series.name);
    }
  }
  const double each = kLeft + kWidth + kRight, height = kLegend + kTop + kHeight + kBottom;
  const double width = each * static_cast<double>(std::max<size_t>(1, charts.size()));
  std::string svg = "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 " + Number(width) + " " +
                    Number(height) + "\" width=\"" + Number(width) +
                    "\" font-family=\"sans-serif\" font-size=\"12\" fill=\"#222222\">\n" +
                    "<rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n";
  double at = kLeft;
  for (size_t i = 0; i < names.size(); ++i) {
    svg += "<rect x=\"" + Number(at) + "\" y=\"12\" width=\"18\" height=\"5\" fill=\"" +
           kColors[i % kColors.size()] + "\"/>\n" + TextAt(at + 24, 19, names[i], "start");
    at += 44 + 7.5 * static_cast<double>(names[i].size());
  }
  for (size_t i = 0; i < charts.size(); ++i)
    svg += Draw(charts[i], each * static_cast<double>(i) + kLeft, kLegend + kTop, names);
  return svg + "</svg>\n";
}

}  // namespace triaxial
