// When a client that was refused for a full queue should come again.
#ifndef TRIAXIAL_SERVE_RETRY_H_
#define TRIAXIAL_SERVE_RETRY_H_

#include <atomic>

#include "engine/engine.h"
#include "engine/request.h"

namespace triaxial {

// Thread-safe.
class RetryEstimate {
 public:
  // Of a request that was answered to its end.
  void Observe(const RequestStats& stats);
  // How long the queue takes to drain at the recent speed: from 1 to 60 seconds.
  int Seconds(const EngineSnapshot& snapshot) const;

 private:
  std::atomic<double> recent_{0};  // running mean of the seconds that requests run; 0: none ended yet
};

}  // namespace triaxial

#endif  // TRIAXIAL_SERVE_RETRY_H_
