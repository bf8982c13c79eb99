// Curves over simulated time: a bounded number of equal intervals, whatever the length of the run.
#ifndef TRIAXIAL_REPLAY_TIME_SERIES_H_
#define TRIAXIAL_REPLAY_TIME_SERIES_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <vector>

#include "kv/format.h"

namespace triaxial {

// What held during a span of time (means by seconds), and what happened in it (sums).
struct Sample {
  double running = 0;
  double waiting = 0;
  std::array<double, kFormats>
      bytes{};  // of complete blocks by format, those kept for later requests included
  double tail_bytes = 0;
  double price = 0;

  double generated = 0;  // tokens
  double prefilled = 0;
  double looked_up = 0;  // prompt tokens sought among cached blocks, and those found
  double found = 0;
  double demotions = 0;
  double preemptions = 0;
};

class TimeSeries {
 public:
  struct Point {
    double seconds = 0;  // covered by samples; less than the interval at the end and where nothing ran
    Sample sample;       // of the first five fields the integral over time
  };
  // At most `points` (even), each of `interval()` seconds; the interval doubles whenever they do not suffice.
  explicit TimeSeries(size_t points, double interval = 1e-3) : limit_(points), interval_(interval) {}

  // Adds a sample that held for [begin, begin + seconds); its events count where it begins. A longer sample
  // is cut at the intervals.
  void Add(double begin, double seconds, const Sample& sample);

  double interval() const { return interval_; }
  const std::vector<Point>& points() const { return points_; }  // from time 0

 private:
  void Reach(double time);

  size_t limit_;
  double interval_;
  std::vector<Point> points_;
};

}  // namespace triaxial

#endif  // TRIAXIAL_REPLAY_TIME_SERIES_H_
