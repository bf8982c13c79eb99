#include "replay/time_series.h"

#include <algorithm>

namespace triaxial {
namespace {

// The state of `from`, for so many seconds.
void AddState(const Sample& from, double seconds, Sample* to) {
  to->running += from.running * seconds;
  to->waiting += from.waiting * seconds;
  for (size_t f = 0; f < from.bytes.size(); ++f) to->bytes[f] += from.bytes[f] * seconds;
  to->tail_bytes += from.tail_bytes * seconds;
  to->price += from.price * seconds;
}

void AddEvents(const Sample& from, Sample* to) {
  to->generated += from.generated;
  to->prefilled += from.prefilled;
  to->looked_up += from.looked_up;
  to->found += from.found;
  to->demotions += from.demotions;
  to->preemptions += from.preemptions;
}

}  // namespace

// Makes a point for `time`, merging points until it has one.
void TimeSeries::Reach(double time) {
  while (time >= interval_ * static_cast<double>(limit_)) {
    for (size_t i = 0; i < points_.size(); ++i) {
      const Point from = points_[i];
      Point& to = points_[i / 2];
      if (i % 2 == 0) to = Point{};
      to.seconds += from.seconds;
      AddState(from.sample, 1, &to.sample);
      AddEvents(from.sample, &to.sample);
    }
    points_.resize((points_.size() + 1) / 2);
    interval_ *= 2;
  }
  const auto index = static_cast<size_t>(time / interval_);
  if (index >= points_.size()) points_.resize(index + 1);
}

void TimeSeries::Add(double begin, double seconds, const Sample& sample) {
  Reach(begin + seconds);
  const auto at = [this](double time) {
    return std::min(static_cast<size_t>(time / interval_), points_.size() - 1);
  };
  AddEvents(sample, &points_[at(begin)].sample);
  const double end = begin + seconds;
  for (size_t i = at(begin); i <= at(end); ++i) {
    const double from = std::max(begin, interval_ * static_cast<double>(i));
    const double to = std::min(end, interval_ * static_cast<double>(i + 1));
    if (to <= from) continue;
    points_[i].seconds += to - from;
    AddState(sample, to - from, &points_[i].sample);
  }
}

}  // namespace triaxial
