// A chat request's messages, independent of HTTP.
#ifndef TRIAXIAL_TEXT_CONVERSATION_H_
#define TRIAXIAL_TEXT_CONVERSATION_H_

#include <optional>
#include <string>
#include <vector>

#include "base/json.h"
#include "base/status.h"

namespace triaxial {

enum class Role { kSystem, kUser, kAssistant, kTool };

struct ContentPart {
  enum class Kind { kText, kImage } kind = Kind::kText;
  std::string
      text;  // kText: the text; kImage: the url exactly as given (a data: URL, or a path for local tools)
};

struct ToolCall {
  std::string id;
  std::string name;
  std::string arguments;  // JSON text: a string argument verbatim, an object as DumpJsonLikePython prints it
};

struct Message {
  Role role = Role::kUser;
  std::vector<ContentPart> content;  // empty for null or ""
  std::optional<std::string> reasoning_content;
  std::vector<ToolCall> tool_calls;  // assistant only
  std::string tool_call_id;          // tool only
  std::string name;
};

struct Conversation {
  std::vector<Message> messages;
  std::vector<std::string>
      tools;  // each tool as the template prints it: DumpJsonLikePython of the tool object

  // Number of image parts, in order of appearance.
  int images() const;
};

// From OpenAI's "messages" and "tools" values (tools may be null). Accepts: roles system, developer (=
// system), user, assistant, tool, function (= tool); content as string, null, or parts of type text,
// image_url ({"url"} or a string) and image; tool_calls with arguments as string or object, and the old
// function_call. Errors (InvalidArgument) name the message index and field, e.g. "messages[2].content[0].type
// is 'audio'; text, image_url and image are supported".
Result<Conversation> ParseConversation(const Json& messages, const Json& tools);

}  // namespace triaxial

#endif  // TRIAXIAL_TEXT_CONVERSATION_H_
