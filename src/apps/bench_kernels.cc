#include "apps/bench_kernels.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>

namespace triaxial {

std::string FormatMix::Name() const {
  std::string name;
  for (int f = 0; f < kFormats; ++f) {
    const int part = percent[static_cast<size_t>(f)];
    if (part == 0) continue;
    name += (name.empty() ? "" : "+") + (part == 100 ? "" : std::to_string(part)) +
            std::string(triaxial::Name(static_cast<Format>(f)));
  }
  return name;
}

std::vector<Format> FormatMix::Spread(int64_t blocks) const {
  std::vector<Format> formats;
  std::array<double, kFormats> owed{};
  for (int64_t i = 0; i < blocks; ++i) {
    for (size_t f = 0; f < kFormats; ++f) owed[f] += percent[f] / 100.0;
    const auto most = static_cast<size_t>(std::max_element(owed.begin(), owed.end()) - owed.begin());
    owed[most] -= 1;
    formats.push_back(static_cast<Format>(most));
  }
  return formats;
}

Result<FormatMix> ParseFormatMix(const std::string& text) {
  FormatMix mix;
  int sum = 0;
  for (size_t begin = 0; begin <= text.size();) {
    const size_t end = std::min(text.find('+', begin), text.size());
    const std::string part = text.substr(begin, end - begin);
    begin = end + 1;
    // "75k2v2": digits, then a format; a format alone is all of it.
    char* rest = nullptr;
    const long percent = std::strtol(part.c_str(), &rest, 10);
    const int share = rest == part.c_str() ? 100 : static_cast<int>(std::clamp(percent, 0l, 1000l));
    const std::optional<Format> format = ParseFormat(rest);
    if (!format)
      return InvalidArgument("'" + text + "' is no mix of formats; give one, or parts such as 75k2v2+25k4v4");
    mix.percent[static_cast<size_t>(*format)] += share;
    sum += share;
  }
  if (sum != 100)
    return InvalidArgument("the parts of '" + text + "' make " + std::to_string(sum) + "%, not 100%");
  return mix;
}

int64_t LayerBytes(const KvGeometry& g, const std::vector<Format>& blocks) {
  int64_t bytes = 0;
  for (const Format f : blocks) bytes += int64_t{HeadBytes(g, f)} * g.num_kv_heads;
  return bytes;
}

std::string_view Name(CodecCase::Op op) {
  switch (op) {
    case CodecCase::Op::kAppend:
      return "append";
    case CodecCase::Op::kStore:
      return "store";
    case CodecCase::Op::kConvert:
      return "convert";
  }
  return "";
}

double AttentionError(const float* q, double scale, const std::vector<float>& keys,
                      const std::vector<float>& values, int head_dim, const float* out) {
  const auto d = static_cast<size_t>(head_dim);
  std::vector<double> scores;
  for (size_t t = 0; t < keys.size(); t += d) {
    double dot = 0;
    for (size_t c = 0; c < d; ++c) dot += double{q[c]} * keys[t + c];
    scores.push_back(scale * dot);
  }
  const double top = *std::max_element(scores.begin(), scores.end());
  std::vector<double> expected(d);
  double sum = 0;
  for (size_t t = 0; t < scores.size(); ++t) {
    const double weight = std::exp(scores[t] - top);
    sum += weight;
    for (size_t c = 0; c < d; ++c) expected[c] += weight * values[t * d + c];
  }
  double error = 0, size = 0;
  for (size_t c = 0; c < d; ++c) {
    error += std::pow(out[c] - expected[c] / sum, 2);
    size += std::pow(expected[c] / sum, 2);
  }
  return std::sqrt(error / size);
}

}  // namespace triaxial
