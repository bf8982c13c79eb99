// Finished chat conversations, kept in a file of JSON lines that `triaxial tag` and `calibrate` read.
#ifndef TRIAXIAL_SERVE_RECORDER_H_
#define TRIAXIAL_SERVE_RECORDER_H_

#include <cstdint>
#include <memory>
#include <mutex>
#include <string>

#include "base/json.h"
#include "base/status.h"

namespace triaxial {

// Thread-safe.
class ConversationRecorder {
 public:
  // Appends to `path`, a regular file that only its owner may read (mode 0600, also if it was there), up to
  // `max_bytes` in all. Errors: it cannot be opened, is no regular file, or does not end with a full line.
  static Result<std::unique_ptr<ConversationRecorder>> Open(const std::string& path, int64_t max_bytes);
  ConversationRecorder(const ConversationRecorder&) = delete;
  ConversationRecorder& operator=(const ConversationRecorder&) = delete;
  ~ConversationRecorder();

  // One line: {"messages": [...the request's, then the answer], "tools": [...]}; tools may be null. At the
  // first line that has no room, and when the file cannot be written, it stops for good with a warning.
  void Append(Json messages, Json answer, Json tools);

 private:
  ConversationRecorder(std::string path, int fd, int64_t bytes, int64_t max_bytes)
      : path_(std::move(path)), fd_(fd), max_bytes_(max_bytes), bytes_(bytes) {}

  const std::string path_;
  const int fd_;
  const int64_t max_bytes_;
  std::mutex mutex_;  // guards all below, and the order of lines
  int64_t bytes_;     // in the file
  bool stopped_ = false;
};

}  // namespace triaxial

#endif  // TRIAXIAL_SERVE_RECORDER_H_
