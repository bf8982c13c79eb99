#include "text/conversation.h"

#include <gtest/gtest.h>

#include <random>

namespace triaxial {
namespace {

Result<Conversation> Parse(std::string_view messages, std::string_view tools = "null") {
  const auto parsed_messages = ParseJson(messages, "messages"), parsed_tools = ParseJson(tools, "tools");
  EXPECT_TRUE(parsed_messages.ok() && parsed_tools.ok());
  return ParseConversation(*parsed_messages, *parsed_tools);
}

std::string ErrorOf(std::string_view messages, std::string_view tools = "null") {
  const auto result = Parse(messages, tools);
  EXPECT_FALSE(result.ok()) << messages;
  if (result.ok()) return "";
  EXPECT_EQ(result.status().code(), Code::kInvalidArgument);
  return result.status().message();
}

TEST(Conversation, ReadsEveryRoleAndFormOfContent) {
  const auto parsed = Parse(R"([
    {"role": "developer", "content": "S", "unknown": {"field": 1}},
    {"role": "user", "name": "ann", "content": [
      {"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "u1", "detail": "low"}},
      {"type": "image_url", "image_url": "u2"}, {"type": "image", "image": "u3"}, {"text": "b"}]},
    {"role": "assistant", "content": null, "reasoning_content": "r", "tool_calls": [
      {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{\"x\":1}"}},
      {"function": {"name": "g", "arguments": {"x": [1, 2.5, "é"]}}}, {"name": "h"}]},
    {"role": "tool", "tool_call_id": "c1", "content": "t"},
    {"role": "assistant", "content": "", "tool_calls": null, "function_call": {"name": "old", "arguments": "{}"}},
    {"role": "function", "name": "old", "content": ""},
    {"role": "assistant"}])");
  ASSERT_TRUE(parsed.ok()) << parsed.status().message();
  const auto& messages = parsed->messages;
  ASSERT_EQ(messages.size(), 7u);
  EXPECT_EQ(messages[0].role, Role::kSystem);
  EXPECT_EQ(messages[1].name, "ann");
  ASSERT_EQ(messages[1].content.size(), 5u);
  EXPECT_EQ(messages[1].content[0].text, "a");
  for (size_t i : {1u, 2u, 3u}) {
    EXPECT_EQ(messages[1].content[i].kind, ContentPart::Kind::kImage);
    EXPECT_EQ(messages[1].content[i].text, "u" + std::to_string(i));
  }
  EXPECT_EQ(messages[1].content[4].text, "b");
  EXPECT_EQ(parsed->images(), 3);
  EXPECT_TRUE(messages[2].content.empty());
  EXPECT_EQ(messages[2].reasoning_content, "r");
  ASSERT_EQ(messages[2].tool_calls.size(), 3u);
  EXPECT_EQ(messages[2].tool_calls[0].id, "c1");
  EXPECT_EQ(messages[2].tool_calls[0].arguments, "{\"x\":1}");  // verbatim
  EXPECT_EQ(messages[2].tool_calls[1].arguments, "{\"x\": [1, 2.5, \"é\"]}");
  EXPECT_EQ(messages[2].tool_calls[2].name, "h");
  EXPECT_EQ(messages[2].tool_calls[2].arguments, "{}");
  EXPECT_EQ(messages[3].role, Role::kTool);
  EXPECT_EQ(messages[3].tool_call_id, "c1");
  ASSERT_EQ(messages[4].tool_calls.size(), 1u);
  EXPECT_EQ(messages[4].tool_calls[0].name, "old");
  EXPECT_EQ(messages[5].role, Role::kTool);
  EXPECT_FALSE(messages[6].reasoning_content.has_value());
}

TEST(Conversation, ToolsArePrintedAsTheTemplatesDo) {
  const auto parsed = Parse(R"([{"role":"user","content":"x"}])",
                            R"([{"type":"function","function":{"name":"f","b":1,"a":[true,null]}}])");
  ASSERT_TRUE(parsed.ok());
  EXPECT_EQ(parsed->tools,
            std::vector<std::string>{
                R"({"type": "function", "function": {"name": "f", "b": 1, "a": [true, null]}})"});
}

TEST(Conversation, ErrorsNameTheField) {
  EXPECT_EQ(ErrorOf("[]"), "messages is missing, empty or not an array");
  EXPECT_EQ(ErrorOf("{}"), "messages is missing, empty or not an array");
  EXPECT_EQ(ErrorOf("[3]"), "messages[0] is not an object");
  EXPECT_EQ(ErrorOf(R"([{"content":"x"}])"), "messages[0].role is missing or not a string");
  EXPECT_EQ(
      ErrorOf(R"([{"role":"user","content":"x"},{"role":"robot","content":"x"}])"),
      "messages[1].role is 'robot'; system, developer, user, assistant, tool and function are supported");
  EXPECT_EQ(ErrorOf(R"([{"role":"user"}])"), "messages[0].content is missing");
  EXPECT_EQ(ErrorOf(R"([{"role":"user","content":5}])"),
            "messages[0].content is neither a string, null nor an array of parts");
  EXPECT_EQ(ErrorOf(R"([{"role":"user","content":["x"]}])"), "messages[0].content[0] is not an object");
  EXPECT_EQ(ErrorOf(R"([{"role":"user","content":[{}]}])"), "messages[0].content[0].type is missing");
  EXPECT_EQ(ErrorOf(R"([{"role":"user","content":[{"type":"audio"}]}])"),
            "messages[0].content[0].type is 'audio'; text, image_url and image are supported");
  EXPECT_EQ(ErrorOf(R"([{"role":"user","content":[{"type":"text","text":1}]}])"),
            "messages[0].content[0].text is missing or not a string");
  EXPECT_EQ(ErrorOf(R"([{"role":"user","content":[{"type":"image_url","image_url":{"uri":"x"}}]}])"),
            "messages[0].content[0].image_url is neither a string nor an object with the string url");
  EXPECT_EQ(ErrorOf(R"([{"role":"assistant","reasoning_content":5}])"),
            "messages[0].reasoning_content is not a string");
  EXPECT_EQ(ErrorOf(R"([{"role":"assistant","tool_calls":{}}])"), "messages[0].tool_calls is not an array");
  EXPECT_EQ(ErrorOf(R"([{"role":"assistant","tool_calls":[{"function":{}}]}])"),
            "messages[0].tool_calls[0].function.name is missing or not a string");
  EXPECT_EQ(ErrorOf(R"([{"role":"assistant","function_call":{"name":"f","arguments":[1]}}])"),
            "messages[0].function_call.arguments is neither a string nor an object");
  EXPECT_EQ(ErrorOf(R"([{"role":"tool","content":"","tool_call_id":7}])"),
            "messages[0].tool_call_id is not a string");
  EXPECT_EQ(ErrorOf(R"([{"role":"user","content":""}])", "5"), "tools is neither null nor an array");
  EXPECT_EQ(ErrorOf(R"([{"role":"user","content":""}])", "[5]"), "tools[0] is not an object");
  EXPECT_EQ(ErrorOf(R"([{"role":"user","content":""}])", R"([{"function":{}}])"),
            "tools[0].function has no string name");
}

// Any JSON of the right words in the wrong places is an answer or an error, never a crash.
TEST(Conversation, SurvivesAnyShape) {
  std::mt19937 random(1);
  const std::vector<std::string> keys = {
      "role",     "content", "type",          "text",       "image_url",         "url",      "name", "image",
      "function", "id",      "function_call", "tool_calls", "reasoning_content", "arguments"};
  const std::vector<std::string> words = {"user", "assistant", "tool", "system",
                                          "text", "image_url", "x",    ""};
  const auto make = [&](const auto& self, int depth) -> Json {
    switch (random() % (depth > 5 ? 4 : 8)) {
      case 0:
        return nullptr;
      case 1:
        return static_cast<int>(random() % 3);
      case 2:
      case 3:
        return words[random() % words.size()];
      case 4: {
        Json array = Json::array();
        for (unsigned i = random() % 3; i > 0; --i) array.push_back(self(self, depth + 1));
        return array;
      }
      default: {
        Json object = Json::object();
        for (unsigned i = random() % 6; i > 0; --i)
          object[keys[random() % keys.size()]] = self(self, depth + 1);
        return object;
      }
    }
  };
  int accepted = 0;
  for (int i = 0; i < 20000; ++i) {
    Json messages = Json::array();
    messages.push_back(
        {{"role", words[random() % 4]}, {"content", make(make, 0)}, {"tool_calls", make(make, 2)}});
    messages.push_back(make(make, 0));
    if (i % 2 == 0) messages.erase(1);
    const auto result = ParseConversation(messages, make(make, 3));
    accepted += result.ok();
    if (!result.ok()) {
      EXPECT_FALSE(result.status().message().empty());
    }
  }
  EXPECT_GT(accepted, 100);
}

}  // namespace
}  // namespace triaxial
