// When requests arrive: a trace's by its clock, a conversation's next step when the answer before has come
// and the agent has thought.
#ifndef TRIAXIAL_REPLAY_ARRIVALS_H_
#define TRIAXIAL_REPLAY_ARRIVALS_H_

#include <cstdint>
#include <optional>
#include <queue>
#include <vector>

#include "replay/recording.h"

namespace triaxial {

struct ArrivalOptions {
  int64_t requests = 0;  // in all; 0: the recording once, or one conversation for each agent if they are more
  int agents = 8;        // conversations at a time
  double speedup = 1;    // of a trace's clock
  double think_seconds = 2;  // from an answer to the conversation's next request
};

struct Arrival {
  double time = 0;
  int64_t number = 0;  // from 0, in order of arrival
  const RecordedRequest* request = nullptr;
  int64_t repetition = 0;
  int64_t conversation = -1;  // its number among those begun; -1: of a trace
  size_t step = 0;
};

class Arrivals {
 public:
  // `recording` must outlive it and hold a request.
  Arrivals(const Recording* recording, const ArrivalOptions& options);

  int64_t total() const { return total_; }
  // When the next request arrives; nullopt: none, or none before an answer has come.
  std::optional<double> NextTime() const;
  Arrival Take();
  // The answer to `arrival` is complete, or was refused: its conversation goes on.
  void Answered(const Arrival& arrival, double time);

 private:
  struct Pending {
    double time;
    int64_t conversation;
    size_t step;
    bool operator>(const Pending& other) const {
      return time != other.time ? time > other.time : conversation > other.conversation;
    }
  };
  const RecordedSession& SessionOf(int64_t conversation) const;
  void BeginConversation(double time);
  std::optional<double> NextOfTrace() const;

  const Recording* recording_;
  ArrivalOptions options_;
  int64_t total_ = 0;
  int64_t conversations_ = 0;  // that may begin in all
  int64_t taken_ = 0;
  int64_t taken_of_trace_ = 0;
  int64_t of_trace_ = 0;  // the most requests to take of it
  int64_t begun_ = 0;
  std::priority_queue<Pending, std::vector<Pending>, std::greater<>> pending_;
};

}  // namespace triaxial

#endif  // TRIAXIAL_REPLAY_ARRIVALS_H_
