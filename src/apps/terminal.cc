#include "apps/terminal.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>

namespace triaxial {
namespace {

std::string Colored(int color, std::string_view text) {
  if (!UseColor()) return std::string(text);
  return "\x1b[38;5;" + std::to_string(color) + "m" + std::string(text) + "\x1b[0m";
}

// Characters on the screen: escapes take none, UTF-8 sequences one.
size_t Width(const std::string& text) {
  size_t width = 0;
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] == '\x1b') {
      while (i < text.size() && text[i] != 'm') ++i;
    } else if ((static_cast<uint8_t>(text[i]) & 0xc0) != 0x80) {
      ++width;
    }
  }
  return width;
}

}  // namespace

bool UseColor() {
  static const bool use = isatty(STDOUT_FILENO) != 0 && std::getenv("NO_COLOR") == nullptr;
  return use;
}

std::string Paint(Format format, std::string_view text) {
  switch (format) {
    case Format::kK2V2:
      return Colored(39, text);
    case Format::kK4V2:
      return Colored(43, text);
    case Format::kK4V4:
      return Colored(214, text);
    case Format::kFp8:
      return Colored(209, text);
    case Format::kBf16:
      return Colored(203, text);
  }
  return std::string(text);
}

std::string Paint(Semantic semantic, std::string_view text) {
  constexpr int kColors[kSemantics] = {141, 81, 114, 245, 220, 75, 240};
  return Colored(kColors[static_cast<int>(semantic)], text);
}

std::string Bold(std::string_view text) {
  return UseColor() ? "\x1b[1m" + std::string(text) + "\x1b[0m" : std::string(text);
}

Table::Table(std::vector<std::string> header, std::vector<bool> right) : right_(std::move(right)) {
  for (std::string& cell : header) cell = Bold(cell);
  right_.resize(header.size(), false);
  rows_.push_back(std::move(header));
}

void Table::Add(std::vector<std::string> row) { rows_.push_back(std::move(row)); }

void Table::Print() const {
  std::vector<size_t> widths(right_.size(), 0);
  for (const auto& row : rows_) {
    for (size_t c = 0; c < row.size(); ++c) widths[c] = std::max(widths[c], Width(row[c]));
  }
  for (const auto& row : rows_) {
    std::string line;
    for (size_t c = 0; c < row.size(); ++c) {
      const std::string pad(widths[c] - Width(row[c]), ' ');
      const bool last = c + 1 == row.size();
      line += right_[c] ? pad + row[c] : row[c] + (last ? "" : pad);
      if (!last) line += "  ";
    }
    std::puts(line.c_str());
  }
}

ProgressBar::ProgressBar(std::string what)
    : what_(std::move(what)), start_(std::chrono::steady_clock::now()) {}

void ProgressBar::Update(double fraction) {
  constexpr int kCells = 30;
  static const bool terminal = isatty(STDERR_FILENO) != 0;
  if (first_ < 0) first_ = fraction;
  const int steps = terminal ? 1000 : 10;
  const int step = static_cast<int>(fraction * steps);
  if (step == shown_) return;
  shown_ = step;
  const std::chrono::duration<double> spent = std::chrono::steady_clock::now() - start_;
  std::string left;
  if (fraction - first_ > 0.01) {
    const auto seconds = static_cast<int>(spent.count() * (1 - fraction) / (fraction - first_) + 0.5);
    left = ", " + std::to_string(seconds / 60) + ":" + (seconds % 60 < 10 ? "0" : "") +
           std::to_string(seconds % 60) + " left";
  }
  const auto filled = static_cast<size_t>(std::min(1.0, fraction) * kCells);
  const std::string bar = "[" + std::string(filled, '#') + std::string(kCells - filled, '.') + "]";
  std::fprintf(stderr, "%s%s %s %3.0f%%%s%s", terminal ? "\r\x1b[2K" : "", what_.c_str(), bar.c_str(),
               100 * fraction, left.c_str(), terminal ? "" : "\n");
  std::fflush(stderr);
  drawn_ = terminal;
}

void ProgressBar::Clear() {
  if (drawn_) std::fputs("\r\x1b[2K", stderr);
  drawn_ = false;
  shown_ = -1;
}

std::string Fixed(double value, int decimals) {
  char buffer[64];
  std::snprintf(buffer, sizeof(buffer), "%.*f", decimals, value);
  return buffer;
}

std::string Bytes(double bytes) {
  constexpr const char* kUnits[] = {"B", "KiB", "MiB", "GiB", "TiB"};
  int unit = 0;
  while (bytes >= 1024 && unit < 4) {
    bytes /= 1024;
    ++unit;
  }
  return Fixed(bytes, unit == 0 ? 0 : 1) + " " + kUnits[unit];
}

std::string Count(int64_t value) {
  std::string digits = std::to_string(value < 0 ? -value : value);
  for (int i = static_cast<int>(digits.size()) - 3; i > 0; i -= 3) digits.insert(static_cast<size_t>(i), ",");
  return value < 0 ? "-" + digits : digits;
}

int64_t ParseBytes(const std::string& text) {
  char* end = nullptr;
  const double number = std::strtod(text.c_str(), &end);
  if (end == text.c_str() || !(number >= 0)) return -1;
  std::string suffix(end);
  while (!suffix.empty() && (suffix.back() == 'B' || suffix.back() == 'i')) suffix.pop_back();
  double factor = 1;
  if (suffix == "K" || suffix == "k")
    factor = 0x1p10;
  else if (suffix == "M")
    factor = 0x1p20;
  else if (suffix == "G")
    factor = 0x1p30;
  else if (suffix == "T")
    factor = 0x1p40;
  else if (!suffix.empty())
    return -1;
  const double bytes = number * factor;
  return bytes < 0x1p62 ? static_cast<int64_t>(bytes) : -1;
}

}  // namespace triaxial
