#include "serve/retry.h"

#include <algorithm>
#include <cmath>

namespace triaxial {

void RetryEstimate::Observe(const RequestStats& stats) {
  constexpr double kWeight = 0.125;
  const double seconds = std::max(1e-6, stats.total_seconds - stats.queue_seconds);
  double before = recent_.load();
  while (
      !recent_.compare_exchange_weak(before, before > 0 ? before + kWeight * (seconds - before) : seconds)) {
  }
}

int RetryEstimate::Seconds(const EngineSnapshot& snapshot) const {
  const double drained = snapshot.waiting * recent_.load() / std::max(1, snapshot.running);
  return static_cast<int>(std::ceil(std::clamp(drained, 1.0, 60.0)));
}

}  // namespace triaxial
