#include "serve/recorder.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <string_view>
#include <utility>

#include "base/log.h"

namespace triaxial {
namespace {

bool WriteAll(int fd, std::string_view bytes) {
  while (!bytes.empty()) {
    const ssize_t n = write(fd, bytes.data(), bytes.size());
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return false;
    bytes.remove_prefix(static_cast<size_t>(n));
  }
  return true;
}

// Size of the file, once it is sure that lines may be appended to it.
Result<int64_t> CheckFile(int fd, const std::string& path) {
  const auto failed = [&] { return Internal("cannot record to " + path + ": " + std::strerror(errno)); };
  struct stat info;
  if (fstat(fd, &info) != 0) return failed();
  if (!S_ISREG(info.st_mode))
    return InvalidArgument("cannot record to " + path + ": it is not a regular file");
  if (fchmod(fd, 0600) != 0) return failed();
  char last = '\n';
  if (info.st_size > 0 && pread(fd, &last, 1, info.st_size - 1) != 1) return failed();
  if (last != '\n') {
    return InvalidArgument("cannot record to " + path +
                           ": it does not end with a full line; is it a file of conversations?");
  }
  return static_cast<int64_t>(info.st_size);
}

}  // namespace

Result<std::unique_ptr<ConversationRecorder>> ConversationRecorder::Open(const std::string& path,
                                                                         int64_t max_bytes) {
  // Not blocking: a pipe without a reader is refused, not waited for.
  const int fd = open(path.c_str(), O_RDWR | O_CREAT | O_APPEND | O_CLOEXEC | O_NONBLOCK, 0600);
  if (fd < 0) return InvalidArgument("cannot record to " + path + ": " + std::strerror(errno));
  const Result<int64_t> bytes = CheckFile(fd, path);
  if (!bytes.ok()) {
    close(fd);
    return bytes.status();
  }
  return std::unique_ptr<ConversationRecorder>(new ConversationRecorder(path, fd, *bytes, max_bytes));
}

ConversationRecorder::~ConversationRecorder() { close(fd_); }

void ConversationRecorder::Append(Json messages, Json answer, Json tools) {
  messages.push_back(std::move(answer));
  Json conversation = {{"messages", std::move(messages)}};
  if (!tools.is_null()) conversation["tools"] = std::move(tools);
  const std::string line = conversation.dump(-1, ' ', false, Json::error_handler_t::replace) + "\n";
  const std::lock_guard lock(mutex_);
  if (stopped_) return;
  const auto size = static_cast<int64_t>(line.size());
  if (size > max_bytes_ - bytes_) {
    stopped_ = true;
    return spdlog::warn("recording has ended: {} has {} of at most {} bytes and no room for another {}",
                        path_, bytes_, max_bytes_, size);
  }
  if (!WriteAll(fd_, line)) {
    stopped_ = true;
    spdlog::warn("recording has ended: cannot write to {}: {}", path_, std::strerror(errno));
    // Half a line would spoil the file for its readers.
    if (ftruncate(fd_, bytes_) != 0) spdlog::warn("the last line of {} is cut short", path_);
    return;
  }
  bytes_ += size;
}

}  // namespace triaxial
