#include "replay/arrivals.h"

#include <algorithm>
#include <limits>

#include "base/check.h"

namespace triaxial {

Arrivals::Arrivals(const Recording* recording, const ArrivalOptions& options)
    : recording_(recording), options_(options) {
  const auto recorded = static_cast<int64_t>(recording->agents.size());
  const auto trace = static_cast<int64_t>(recording->trace.size());
  CHECK(recorded + trace > 0 && options.agents > 0 && options.speedup > 0);
  constexpr int64_t kMany = std::numeric_limits<int64_t>::max();
  total_ = options.requests;
  of_trace_ = trace > 0 ? kMany : 0;
  conversations_ = recorded > 0 ? kMany : 0;
  if (options.requests == 0) {
    of_trace_ = trace;
    conversations_ = recorded > 0 ? std::max<int64_t>(recorded, options.agents) : 0;
    total_ = trace;
    for (int64_t c = 0; c < conversations_; ++c) total_ += static_cast<int64_t>(SessionOf(c).steps.size());
  }
  // Agents begin one after the other, so that they do not march in step.
  for (int a = 0; a < options.agents; ++a) BeginConversation(options.think_seconds * a / options.agents);
}

const RecordedSession& Arrivals::SessionOf(int64_t conversation) const {
  return recording_->agents[static_cast<size_t>(conversation) % recording_->agents.size()];
}

void Arrivals::BeginConversation(double time) {
  if (begun_ < conversations_) pending_.push({time, begun_++, 0});
}

std::optional<double> Arrivals::NextOfTrace() const {
  if (taken_of_trace_ >= of_trace_) return std::nullopt;
  const auto trace = static_cast<int64_t>(recording_->trace.size());
  const auto& request = recording_->trace[static_cast<size_t>(taken_of_trace_ % trace)].steps[0];
  const auto round = static_cast<double>(taken_of_trace_ / trace);
  return (request.arrival + round * recording_->trace_seconds) / options_.speedup;
}

std::optional<double> Arrivals::NextTime() const {
  if (taken_ >= total_) return std::nullopt;
  std::optional<double> next = NextOfTrace();
  if (!pending_.empty() && (!next || pending_.top().time < *next)) next = pending_.top().time;
  return next;
}

Arrival Arrivals::Take() {
  Arrival arrival;
  const std::optional<double> next = NextTime();
  CHECK(next.has_value());
  arrival.time = *next;
  arrival.number = taken_++;
  if (!pending_.empty() && pending_.top().time == *next) {
    const Pending pending = pending_.top();
    pending_.pop();
    arrival.conversation = pending.conversation;
    arrival.step = pending.step;
    arrival.repetition = pending.conversation / static_cast<int64_t>(recording_->agents.size());
    arrival.request = &SessionOf(pending.conversation).steps[pending.step];
    return arrival;
  }
  const auto trace = static_cast<int64_t>(recording_->trace.size());
  arrival.request = &recording_->trace[static_cast<size_t>(taken_of_trace_ % trace)].steps[0];
  arrival.repetition = taken_of_trace_++ / trace;
  return arrival;
}

void Arrivals::Answered(const Arrival& arrival, double time) {
  if (arrival.conversation < 0) return;
  const double next = time + options_.think_seconds;
  if (arrival.step + 1 < SessionOf(arrival.conversation).steps.size()) {
    pending_.push({next, arrival.conversation, arrival.step + 1});
  } else {
    BeginConversation(next);
  }
}

}  // namespace triaxial
