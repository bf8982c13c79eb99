#include "serve/request_log.h"

#include <fmt/format.h>

namespace triaxial {

std::string FinishedLine(std::string_view id, std::string_view tenant, std::string_view finish,
                         const RequestStats& stats) {
  const auto mib = [](int64_t bytes) { return static_cast<double>(bytes) / (1 << 20); };
  std::string line = fmt::format("{}{} {}: {} + {} tokens ({} cached)", id,
                                 tenant.empty() ? "" : fmt::format(" of {}", tenant), finish,
                                 stats.prompt_tokens, stats.completion_tokens, stats.cached_tokens);
  if (stats.kv.total_bytes() > 0) {
    std::string formats;
    for (int f = 0; f < kFormats; ++f) {
      const int64_t bytes = stats.kv.bytes[static_cast<size_t>(f)];
      if (bytes == 0) continue;
      formats +=
          fmt::format("{}{} {:.2f}", formats.empty() ? "" : ", ", Name(static_cast<Format>(f)), mib(bytes));
    }
    line += fmt::format(", KV {:.2f} MiB ({})", mib(stats.kv.total_bytes()), formats);
  }
  if (stats.demotions > 0) line += fmt::format(", {} demoted", stats.demotions);
  if (stats.completion_tokens > 0) line += fmt::format(", TTFT {:.3f} s", stats.ttft_seconds);
  const double decoding = stats.total_seconds - stats.ttft_seconds;
  if (stats.completion_tokens > 1 && decoding > 0)
    line += fmt::format(", {:.1f} tokens/s", (stats.completion_tokens - 1) / decoding);
  return line;
}

}  // namespace triaxial
