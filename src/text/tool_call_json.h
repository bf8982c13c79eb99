// The JSON that models write between <tool_call> and </tool_call>.
#ifndef TRIAXIAL_TEXT_TOOL_CALL_JSON_H_
#define TRIAXIAL_TEXT_TOOL_CALL_JSON_H_

#include <optional>
#include <string_view>

#include "text/conversation.h"

namespace triaxial {

// {"name": "N", "arguments": {...}} with any whitespace around it. Arguments keep the bytes that the model
// wrote, so that the next request renders to the same tokens; without arguments they are "{}". nullopt if the
// text is anything else.
std::optional<ToolCall> ParseToolCallJson(std::string_view text);

}  // namespace triaxial

#endif  // TRIAXIAL_TEXT_TOOL_CALL_JSON_H_
