// Files of recorded conversations, as `serve --record` writes them and every command reads them: one JSON
// object a line, {"messages": [...], "tools": [...], "id": "..."} in OpenAI's form, {"request": {...}} with a
// chat request in it, or a bare list of messages. Blank lines are skipped.
#ifndef TRIAXIAL_TEXT_CONVERSATION_FILE_H_
#define TRIAXIAL_TEXT_CONVERSATION_FILE_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "base/json.h"
#include "base/status.h"
#include "text/conversation.h"

namespace triaxial {

// One line, not looked at beyond its outermost fields.
struct ConversationLine {
  std::string where;                         // "FILE, line 3": errors about it begin so
  std::string id;                            // `where` if the line says none
  std::string images;                        // directory to which paths of pictures are relative
  Json messages;                             // a list
  Json tools;                                // null if there are none
  bool is_request = false;                   // {"request": {...}}: its last message waits for an answer
  Status Error(const Status& status) const;  // the same, begun with `where`
  // Errors begin with `where` and name the message.
  Result<Conversation> Parse() const;
};

// InvalidArgument, begun with `where`, unless the text is such an object.
Result<ConversationLine> ParseConversationLine(std::string_view text, std::string where);

// Knows where the lines of a file are and reads them one at a time, however large the file is.
class ConversationFile {
 public:
  // `images` "": pictures are relative to the file. NotFound for a missing file, InvalidArgument if it holds
  // nothing or a line has more than 256 MiB.
  static Result<ConversationFile> Open(const std::string& path, const std::string& images = "");

  const std::string& images() const { return images_; }  // directory, as of its lines
  size_t size() const { return lines_.size(); }          // conversations
  std::string NameOf(size_t index) const;                // "FILE, line 3"
  // Errors name file and line.
  Result<ConversationLine> Read(size_t index) const;
  // The first `limit` (0: all).
  Result<std::vector<ConversationLine>> ReadAll(size_t limit = 0) const;

 private:
  struct Line {
    int64_t number;  // from 1
    int64_t offset;  // in bytes
    int64_t bytes;
  };
  std::string path_;
  std::string images_;
  std::vector<Line> lines_;
};

// One conversation: line `line` (from 1, blank ones count) of such a file; or, if `line` is 0, a file that
// holds nothing else, on as many lines as it likes. "-" is standard input. Errors as above.
Result<ConversationLine> LoadConversation(const std::string& path, int line);

}  // namespace triaxial

#endif  // TRIAXIAL_TEXT_CONVERSATION_FILE_H_
