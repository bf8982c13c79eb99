// Finished chat conversations, kept in a file of conversations (text/conversation_file.h) that `triaxial
// tag`, `calibrate`, `eval` and `replay` read.
#ifndef TRIAXIAL_SERVE_RECORDER_H_
#define TRIAXIAL_SERVE_RECORDER_H_

#include <chrono>
#include <cstdint>
#include <list>
#include <memory>
#include <mutex>
#include <string>

#include "base/json.h"
#include "base/status.h"

namespace triaxial {

// An agent sends its growing conversation again at every step. So a conversation is held back, and takes the
// place of the one that it goes on from, until it has not grown for a while, until those held back become too
// many, or until the recorder ends: the file has it once, as long as it got. Thread-safe.
class ConversationRecorder {
 public:
  static constexpr std::chrono::minutes kRest{10};
  static constexpr int64_t kMaxHeldBytes = int64_t{64} << 20;
  static constexpr size_t kMaxHeld = 256;

  // Appends to `path`, a regular file that only its owner may read (mode 0600, also if it was there), up to
  // `max_bytes` in all. A conversation that has not grown for `rest` is written with the next chat. Errors:
  // it cannot be opened, is no regular file, or does not end with a full line.
  static Result<std::unique_ptr<ConversationRecorder>> Open(const std::string& path, int64_t max_bytes,
                                                            std::chrono::nanoseconds rest = kRest);
  ConversationRecorder(const ConversationRecorder&) = delete;
  ConversationRecorder& operator=(const ConversationRecorder&) = delete;
  ~ConversationRecorder();  // writes what is held back

  // A chat request's messages and tools (may be null), and the answer. They go on from a conversation with
  // equal tools whose messages they begin with; thoughts in the answers are no part of that comparison, since
  // most clients do not send them back: the file keeps them. At the first conversation that has no room, and
  // when the file cannot be written, recording stops for good with a warning.
  void Append(Json messages, Json answer, Json tools);

 private:
  struct Held {
    Json messages;
    Json tools;
    int64_t bytes = 0;  // about what its line takes
    std::chrono::steady_clock::time_point grew;
  };

  ConversationRecorder(std::string path, int fd, int64_t bytes, int64_t max_bytes,
                       std::chrono::nanoseconds rest)
      : path_(std::move(path)), fd_(fd), max_bytes_(max_bytes), rest_(rest), bytes_(bytes) {}
  Held TakeBeginning(const Json& messages, const Json& tools);
  void WriteOldest();

  const std::string path_;
  const int fd_;
  const int64_t max_bytes_;
  const std::chrono::nanoseconds rest_;
  std::mutex mutex_;      // guards all below, and the order of lines
  int64_t bytes_;         // in the file
  std::list<Held> held_;  // the one that grew last is last
  int64_t held_bytes_ = 0;
  bool stopped_ = false;
};

}  // namespace triaxial

#endif  // TRIAXIAL_SERVE_RECORDER_H_
