// Tables and colours for people; plain text when the output is not a terminal or NO_COLOR is set.
#ifndef TRIAXIAL_APPS_TERMINAL_H_
#define TRIAXIAL_APPS_TERMINAL_H_

#include <chrono>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "kv/format.h"
#include "kv/tag.h"

namespace triaxial {

// `text` in the colour that stands for a format or a semantic wherever TriAxial shows one.
std::string Paint(Format format, std::string_view text);
std::string Paint(Semantic semantic, std::string_view text);
std::string Bold(std::string_view text);
// Whether stdout takes colours; ForceColor(false) turns them off.
bool UseColor();

// Columns are aligned by their visible width; the first row is the header. Numbers should be given
// right-aligned by `right`.
class Table {
 public:
  explicit Table(std::vector<std::string> header, std::vector<bool> right = {});
  void Add(std::vector<std::string> row);
  void Print() const;  // to stdout

 private:
  std::vector<std::vector<std::string>> rows_;
  std::vector<bool> right_;
};

// A bar with the time that is left, on stderr; on a terminal it is redrawn in place, elsewhere a line appears
// at every tenth of the work.
class ProgressBar {
 public:
  explicit ProgressBar(std::string what);
  ~ProgressBar() { Clear(); }
  void Update(double fraction);
  void Clear();  // before something else is printed

 private:
  std::string what_;
  std::chrono::steady_clock::time_point start_;
  double first_ = -1;  // fraction that was done at the start
  int shown_ = -1;
  bool drawn_ = false;
};

std::string Bytes(double bytes);  // "1.5 MiB"
std::string Fixed(double value, int decimals);
std::string Count(int64_t value);  // "12,345"

// "4096", "512M", "1.5GiB": bytes; -1 if malformed. Suffixes are powers of 1024.
int64_t ParseBytes(const std::string& text);

}  // namespace triaxial

#endif  // TRIAXIAL_APPS_TERMINAL_H_
