#include "text/conversation.h"

#include <utility>

namespace triaxial {
namespace {

// Where in the request a value stands, for error messages.
std::string At(const std::string& array, size_t index) { return array + "[" + std::to_string(index) + "]"; }

// A string from a client, shortened for an error message.
std::string Quoted(const std::string& text) {
  constexpr size_t kMax = 40;
  if (text.size() <= kMax) return "'" + text + "'";
  size_t end = kMax;
  while (end > 0 && (static_cast<unsigned char>(text[end]) & 0xC0) == 0x80) --end;  // not inside a character
  return "'" + text.substr(0, end) + "...'";
}

// The member `key`, or null if it is absent or null.
const Json* Find(const Json& object, const char* key) {
  const auto it = object.find(key);
  return it == object.end() || it->is_null() ? nullptr : &*it;
}

// Reads an optional string.
Status ReadString(const Json& object, const char* key, const std::string& where, std::string* out) {
  const Json* value = Find(object, key);
  if (value == nullptr) return OkStatus();
  if (!value->is_string()) return InvalidArgument(where + "." + key + " is not a string");
  *out = value->get<std::string>();
  return OkStatus();
}

Result<Role> ParseRole(const Json& message, const std::string& where) {
  const Json* role = Find(message, "role");
  if (role == nullptr || !role->is_string())
    return InvalidArgument(where + ".role is missing or not a string");
  const std::string& name = role->get_ref<const std::string&>();
  if (name == "system" || name == "developer") return Role::kSystem;
  if (name == "user") return Role::kUser;
  if (name == "assistant") return Role::kAssistant;
  if (name == "tool" || name == "function") return Role::kTool;
  return InvalidArgument(where + ".role is " + Quoted(name) +
                         "; system, developer, user, assistant, tool and function are supported");
}

Result<ContentPart> ParsePart(const Json& part, const std::string& where) {
  if (!part.is_object()) return InvalidArgument(where + " is not an object");
  std::string type;
  RETURN_IF_ERROR(ReadString(part, "type", where, &type));
  if (type.empty()) {  // the templates go by the key as well
    for (const char* key : {"text", "image_url", "image"}) {
      if (part.contains(key)) type = key;
    }
    if (type.empty()) return InvalidArgument(where + ".type is missing");
  }
  const Json* value =
      type == "text" || type == "image_url" || type == "image" ? Find(part, type.c_str()) : nullptr;
  if (type == "text") {
    if (value == nullptr || !value->is_string()) {
      return InvalidArgument(where + ".text is missing or not a string");
    }
    return ContentPart{ContentPart::Kind::kText, value->get<std::string>()};
  }
  if (type == "image_url" || type == "image") {
    if (value != nullptr && value->is_object()) value = Find(*value, "url");
    if (value == nullptr || !value->is_string()) {
      return InvalidArgument(where + "." + type + " is neither a string nor an object with the string url");
    }
    return ContentPart{ContentPart::Kind::kImage, value->get<std::string>()};
  }
  return InvalidArgument(where + ".type is " + Quoted(type) + "; text, image_url and image are supported");
}

Status ParseContent(const Json& message, const std::string& where, Message* out) {
  const std::string here = where + ".content";
  if (!message.contains("content") && out->role != Role::kAssistant) {
    return InvalidArgument(here + " is missing");
  }
  const Json* content = Find(message, "content");
  if (content == nullptr) return OkStatus();
  if (content->is_string()) {
    if (const auto& text = content->get_ref<const std::string&>(); !text.empty()) {
      out->content.push_back({ContentPart::Kind::kText, text});
    }
    return OkStatus();
  }
  if (!content->is_array()) return InvalidArgument(here + " is neither a string, null nor an array of parts");
  for (size_t i = 0; i < content->size(); ++i) {
    ASSIGN_OR_RETURN(ContentPart part, ParsePart((*content)[i], At(here, i)));
    out->content.push_back(std::move(part));
  }
  return OkStatus();
}

// A function's name and arguments.
Result<ToolCall> ParseFunction(const Json& function, const std::string& where) {
  if (!function.is_object()) return InvalidArgument(where + " is not an object");
  ToolCall call;
  const Json* name = Find(function, "name");
  if (name == nullptr || !name->is_string()) {
    return InvalidArgument(where + ".name is missing or not a string");
  }
  call.name = name->get<std::string>();
  const Json* arguments = Find(function, "arguments");
  if (arguments == nullptr) {
    call.arguments = "{}";
  } else if (arguments->is_string()) {
    call.arguments = arguments->get<std::string>();
  } else if (arguments->is_object()) {
    call.arguments = DumpJsonLikePython(*arguments);
  } else {
    return InvalidArgument(where + ".arguments is neither a string nor an object");
  }
  return call;
}

Status ParseToolCalls(const Json& message, const std::string& where, Message* out) {
  if (const Json* calls = Find(message, "tool_calls"); calls != nullptr) {
    const std::string here = where + ".tool_calls";
    if (!calls->is_array()) return InvalidArgument(here + " is not an array");
    for (size_t i = 0; i < calls->size(); ++i) {
      const Json& entry = (*calls)[i];
      if (!entry.is_object()) return InvalidArgument(At(here, i) + " is not an object");
      const Json* function = Find(entry, "function");
      ASSIGN_OR_RETURN(ToolCall call, function != nullptr
                                          ? ParseFunction(*function, At(here, i) + ".function")
                                          : ParseFunction(entry, At(here, i)));
      RETURN_IF_ERROR(ReadString(entry, "id", At(here, i), &call.id));
      out->tool_calls.push_back(std::move(call));
    }
  }
  // The form of 2023; clients that migrate send both.
  if (const Json* old = Find(message, "function_call"); old != nullptr && out->tool_calls.empty()) {
    ASSIGN_OR_RETURN(ToolCall call, ParseFunction(*old, where + ".function_call"));
    out->tool_calls.push_back(std::move(call));
  }
  return OkStatus();
}

Result<Message> ParseMessage(const Json& json, const std::string& where) {
  if (!json.is_object()) return InvalidArgument(where + " is not an object");
  Message message;
  ASSIGN_OR_RETURN(message.role, ParseRole(json, where));
  RETURN_IF_ERROR(ParseContent(json, where, &message));
  RETURN_IF_ERROR(ReadString(json, "name", where, &message.name));
  if (message.role == Role::kAssistant) {
    if (Find(json, "reasoning_content") != nullptr) {
      message.reasoning_content.emplace();
      RETURN_IF_ERROR(ReadString(json, "reasoning_content", where, &*message.reasoning_content));
    }
    RETURN_IF_ERROR(ParseToolCalls(json, where, &message));
  }
  if (message.role == Role::kTool) {
    RETURN_IF_ERROR(ReadString(json, "tool_call_id", where, &message.tool_call_id));
  }
  return message;
}

}  // namespace

int Conversation::images() const {
  int images = 0;
  for (const Message& message : messages) {
    for (const ContentPart& part : message.content) images += part.kind == ContentPart::Kind::kImage;
  }
  return images;
}

Result<Conversation> ParseConversation(const Json& messages, const Json& tools) {
  if (!messages.is_array() || messages.empty()) {
    return InvalidArgument("messages is missing, empty or not an array");
  }
  Conversation conversation;
  for (size_t i = 0; i < messages.size(); ++i) {
    ASSIGN_OR_RETURN(Message message, ParseMessage(messages[i], At("messages", i)));
    conversation.messages.push_back(std::move(message));
  }
  if (tools.is_null()) return conversation;
  if (!tools.is_array()) return InvalidArgument("tools is neither null nor an array");
  for (size_t i = 0; i < tools.size(); ++i) {
    if (!tools[i].is_object()) return InvalidArgument(At("tools", i) + " is not an object");
    if (const Json* function = Find(tools[i], "function"); function != nullptr) {
      const Json* name = function->is_object() ? Find(*function, "name") : nullptr;
      if (name == nullptr || !name->is_string()) {
        return InvalidArgument(At("tools", i) + ".function has no string name");
      }
    }
    conversation.tools.push_back(DumpJsonLikePython(tools[i]));
  }
  return conversation;
}

}  // namespace triaxial
