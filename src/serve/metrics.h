// Prometheus metrics under the field's names, with the prefix triaxial_.
#ifndef TRIAXIAL_SERVE_METRICS_H_
#define TRIAXIAL_SERVE_METRICS_H_

#include <memory>
#include <string>

#include "engine/engine.h"
#include "engine/request.h"

namespace triaxial {

// Thread-safe.
class Metrics {
 public:
  explicit Metrics(const std::string& model_name);
  ~Metrics();
  void ObserveFinished(const RequestStats& stats, FinishReason reason);
  void CountRefused(Code code);
  // The text exposition format, with the gauges taken from `snapshot`.
  std::string Render(const EngineSnapshot& snapshot);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace triaxial

#endif  // TRIAXIAL_SERVE_METRICS_H_
