#include "serve/recorder.h"

#include <fcntl.h>
#include <fmt/format.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
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

int64_t Size(const Json& json) {
  return static_cast<int64_t>(json.dump(-1, ' ', false, Json::error_handler_t::replace).size());
}

const Json& Field(const Json& message, const char* name) {
  static const Json kNone;
  const auto found = message.is_object() ? message.find(name) : message.end();
  return message.is_object() && found != message.end() ? *found : kNone;
}

// What an assistant's message says, whether as text, as parts, or not at all.
std::string TextOf(const Json& message) {
  const Json& content = Field(message, "content");
  if (content.is_string()) return content.get<std::string>();
  std::string text;
  if (!content.is_array()) return text;
  for (const Json& part : content) {
    if (Field(part, "text").is_string()) text += part["text"].get_ref<const std::string&>();
  }
  return text;
}

bool SameCalls(const Json& a, const Json& b) {
  const size_t count = a.is_array() ? a.size() : 0;
  if (count != (b.is_array() ? b.size() : 0)) return false;
  for (size_t i = 0; i < count; ++i) {
    const Json &ours = Field(a[i], "function"), &theirs = Field(b[i], "function");
    if (Field(ours, "name") != Field(theirs, "name") ||
        Field(ours, "arguments") != Field(theirs, "arguments"))
      return false;
  }
  return true;
}

// Whether a client sent this message back. Of the assistant's, only what it said and called counts.
bool SameMessage(const Json& recorded, const Json& sent) {
  if (Field(recorded, "role") != Field(sent, "role")) return false;
  if (Field(sent, "role") != "assistant") return recorded == sent;
  return TextOf(recorded) == TextOf(sent) &&
         SameCalls(Field(recorded, "tool_calls"), Field(sent, "tool_calls"));
}

bool BeginsWith(const Json& messages, const Json& beginning) {
  return beginning.size() <= messages.size() &&
         std::equal(beginning.begin(), beginning.end(), messages.begin(), SameMessage);
}

}  // namespace

Result<std::unique_ptr<ConversationRecorder>> ConversationRecorder::Open(const std::string& path,
                                                                         int64_t max_bytes,
                                                                         std::chrono::nanoseconds rest) {
  // Not blocking: a pipe without a reader is refused, not waited for.
  const int fd = open(path.c_str(), O_RDWR | O_CREAT | O_APPEND | O_CLOEXEC | O_NONBLOCK, 0600);
  if (fd < 0) return InvalidArgument("cannot record to " + path + ": " + std::strerror(errno));
  const Result<int64_t> bytes = CheckFile(fd, path);
  if (!bytes.ok()) {
    close(fd);
    return bytes.status();
  }
  return std::unique_ptr<ConversationRecorder>(new ConversationRecorder(path, fd, *bytes, max_bytes, rest));
}

ConversationRecorder::~ConversationRecorder() {
  while (!held_.empty()) WriteOldest();
  close(fd_);
}

// The longest conversation that the messages go on from, taken out; an empty one if there is none.
ConversationRecorder::Held ConversationRecorder::TakeBeginning(const Json& messages, const Json& tools) {
  auto best = held_.end();
  for (auto it = held_.begin(); it != held_.end(); ++it) {
    if (best != held_.end() && it->messages.size() <= best->messages.size()) continue;
    if (it->tools == tools && BeginsWith(messages, it->messages)) best = it;
  }
  if (best == held_.end()) return {.messages = Json::array(), .tools = tools};
  Held held = std::move(*best);
  held_.erase(best);
  held_bytes_ -= held.bytes;
  return held;
}

void ConversationRecorder::Append(Json messages, Json answer, Json tools) {
  const auto now = std::chrono::steady_clock::now();
  const std::lock_guard lock(mutex_);
  if (stopped_) return;
  Held held = TakeBeginning(messages, tools);
  messages.push_back(std::move(answer));
  if (held.messages.empty()) held.bytes = Size(tools);
  for (size_t i = held.messages.size(); i < messages.size(); ++i) {
    held.bytes += Size(messages[i]) + 1;
    held.messages.push_back(std::move(messages[i]));
  }
  held.grew = now;
  held_bytes_ += held.bytes;
  held_.push_back(std::move(held));
  const auto must_go = [&] {
    return held_.size() > kMaxHeld || held_bytes_ > std::min(kMaxHeldBytes, max_bytes_ - bytes_) ||
           now - held_.front().grew >= rest_;
  };
  while (!held_.empty() && must_go()) WriteOldest();
}

void ConversationRecorder::WriteOldest() {
  Held held = std::move(held_.front());
  held_.pop_front();
  held_bytes_ -= held.bytes;
  if (stopped_) return;
  Json conversation = {{"messages", std::move(held.messages)}};
  if (!held.tools.is_null()) conversation["tools"] = std::move(held.tools);
  const std::string line = conversation.dump(-1, ' ', false, Json::error_handler_t::replace) + "\n";
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
