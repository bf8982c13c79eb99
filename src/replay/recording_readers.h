// The readers behind LoadRecording. `text` is a whole file, `path` names it in errors.
#ifndef TRIAXIAL_REPLAY_RECORDING_READERS_H_
#define TRIAXIAL_REPLAY_RECORDING_READERS_H_

#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "replay/recording.h"

namespace triaxial {

// Bounds of what a file may claim: more is InvalidArgument.
inline constexpr int64_t kMaxRecordedTokens = int64_t{1} << 24;  // of a prompt or an answer
inline constexpr int64_t kMaxRecordedSeconds = 366 * 86400;      // between a trace's first and last request
inline constexpr int64_t kMaxHashId = int64_t{1} << 40;

// Calls `line(text, "PATH, line N")` for every line that is not blank; stops at the first error.
Status ForEachLine(std::string_view text, const std::string& path,
                   const std::function<Status(std::string_view line, const std::string& what)>& line);

// Both yield one session per request, sorted by arrival, from 0.
Result<std::vector<RecordedSession>> ReadMooncake(std::string_view text, const std::string& path);
Result<std::vector<RecordedSession>> ReadAzure(std::string_view text, const std::string& path);
inline constexpr std::string_view kAzureHeader = "TIMESTAMP,ContextTokens,GeneratedTokens";

// A file of conversations (text/conversation_file.h). Every assistant message but a leading one is a step,
// whose prompt is the conversation before it. Lines with requests are a step each, and one session where they
// follow each other: a request's answer is the last one that the next request shows; that of a session's last
// request is not known and counts as one token.
Result<std::vector<RecordedSession>> ReadConversations(const std::string& path,
                                                       const RecordingOptions& options);

}  // namespace triaxial

#endif  // TRIAXIAL_REPLAY_RECORDING_READERS_H_
