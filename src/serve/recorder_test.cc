#include "serve/recorder.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <algorithm>
#include <fstream>
#include <thread>
#include <vector>

#include "base/file.h"
#include "base/temp_dir_testing.h"
#include "text/conversation_file.h"

namespace triaxial {
namespace {

class RecorderTest : public testing::Test {
 protected:
  std::string Contents() const { return ReadFile(path_, 1 << 20).value(); }
  static void Chat(ConversationRecorder* recorder, const std::string& text, Json tools = nullptr) {
    recorder->Append(Json::array({{{"role", "user"}, {"content", text}}}),
                     {{"role", "assistant"}, {"content", "yes"}}, std::move(tools));
  }

  const TempDir directory_;
  const std::string path_ = directory_.File("chats.jsonl");
};

TEST_F(RecorderTest, AppendsOneLineForEachConversationAndOnlyItsOwnerReadsIt) {
  const mode_t before = umask(0);
  {
    const auto recorder = ConversationRecorder::Open(path_, 1 << 20);
    ASSERT_TRUE(recorder.ok()) << recorder.status().message();
    Chat(recorder->get(), "one\ntwo", Json::array({{{"type", "function"}}}));
  }
  chmod(path_.c_str(), 0644);
  {
    const auto recorder = ConversationRecorder::Open(path_, 1 << 20);  // goes on where it was
    ASSERT_TRUE(recorder.ok()) << recorder.status().message();
    Chat(recorder->get(), "three");
  }
  umask(before);
  EXPECT_EQ(
      Contents(),
      "{\"messages\":[{\"role\":\"user\",\"content\":\"one\\ntwo\"},{\"role\":\"assistant\",\"content\":"
      "\"yes\"}],\"tools\":[{\"type\":\"function\"}]}\n"
      "{\"messages\":[{\"role\":\"user\",\"content\":\"three\"},{\"role\":\"assistant\",\"content\":"
      "\"yes\"}]}\n");
  struct stat info;
  ASSERT_EQ(stat(path_.c_str(), &info), 0);
  EXPECT_EQ(info.st_mode & 0777, 0600u);
}

// As an agent's client sends them: all that was said so far, thoughts left out, calls with their fields in
// another order.
TEST_F(RecorderTest, AConversationIsOneLineAsLongAsItGot) {
  const Json question = {{"role", "user"}, {"content", "what time is it?"}};
  const Json call = {{"role", "assistant"},
                     {"content", nullptr},
                     {"reasoning_content", "I look."},
                     {"tool_calls", Json::array({{{"id", "call_1"},
                                                  {"type", "function"},
                                                  {"function", {{"name", "clock"}, {"arguments", "{}"}}}}})}};
  const Json sent_back = {{"role", "assistant"},
                          {"tool_calls", Json::array({{{"function", {{"arguments", "{}"}, {"name", "clock"}}},
                                                       {"id", "call_1"},
                                                       {"type", "function"}}})}};
  const Json result = {{"role", "tool"}, {"tool_call_id", "call_1"}, {"content", "noon"}};
  const Json answer = {{"role", "assistant"}, {"content", "It is noon."}};
  const Json tools = Json::array({{{"type", "function"}}});
  {
    const auto recorder = ConversationRecorder::Open(path_, 1 << 20);
    ASSERT_TRUE(recorder.ok());
    recorder.value()->Append(Json::array({question}), call, tools);
    recorder.value()->Append(Json::array({question}), {{"role", "assistant"}, {"content", "Why?"}}, nullptr);
    recorder.value()->Append(Json::array({question, sent_back, result}), answer, tools);
    EXPECT_EQ(Contents(), "") << "they may still grow";
  }
  const auto file = ConversationFile::Open(path_);
  ASSERT_TRUE(file.ok()) << file.status().message();
  const auto lines = file->ReadAll();
  ASSERT_TRUE(lines.ok()) << lines.status().message();
  ASSERT_EQ(lines->size(), 2u);
  EXPECT_EQ((*lines)[0].messages[1]["content"], "Why?") << "other tools, another conversation";
  EXPECT_EQ((*lines)[1].messages, Json::array({question, call, result, answer})) << "the thought is kept";
  EXPECT_EQ((*lines)[1].tools, tools);
}

TEST_F(RecorderTest, WhatIsSaidOtherwiseIsAnotherConversation) {
  const auto user = [](const char* text) { return Json{{"role", "user"}, {"content", text}}; };
  const auto assistant = [](const char* text) { return Json{{"role", "assistant"}, {"content", text}}; };
  {
    const auto recorder = ConversationRecorder::Open(path_, 1 << 20);
    ASSERT_TRUE(recorder.ok());
    recorder.value()->Append(Json::array({user("a")}), assistant("b"), nullptr);
    recorder.value()->Append(Json::array({user("a")}), assistant("b"), nullptr);  // asked again
    recorder.value()->Append(Json::array({user("a"), assistant("x"), user("c")}), assistant("d"), nullptr);
    recorder.value()->Append(Json::array({user("A"), assistant("b"), user("c")}), assistant("d"), nullptr);
    // The longest beginning grows.
    recorder.value()->Append(Json::array({user("a"), assistant("b"), user("c")}), assistant("d"), nullptr);
    recorder.value()->Append(Json::array({user("a"), assistant("b"), user("c"), assistant("d"), user("e")}),
                             assistant("f"), nullptr);
  }
  std::vector<size_t> lengths;
  const auto lines = ConversationFile::Open(path_)->ReadAll();
  ASSERT_TRUE(lines.ok()) << lines.status().message();
  for (const ConversationLine& line : *lines) lengths.push_back(line.messages.size());
  EXPECT_EQ(lengths, (std::vector<size_t>{2, 4, 4, 6}));
}

TEST_F(RecorderTest, WhatRestsOrIsTooMuchIsWritten) {
  const auto recorder = ConversationRecorder::Open(path_, 1 << 20, std::chrono::milliseconds(20));
  ASSERT_TRUE(recorder.ok());
  Chat(recorder->get(), "first");
  EXPECT_EQ(Contents(), "");
  std::this_thread::sleep_for(std::chrono::milliseconds(30));
  Chat(recorder->get(), "second");
  EXPECT_NE(Contents().find("first"), std::string::npos);
  EXPECT_EQ(Contents().find("second"), std::string::npos);

  const std::string many = directory_.File("many.jsonl");
  const auto others = ConversationRecorder::Open(many, 1 << 20);
  for (size_t i = 0; i <= ConversationRecorder::kMaxHeld; ++i) Chat(others->get(), std::to_string(i));
  const std::string text = ReadFile(many, 1 << 20).value();
  EXPECT_EQ(std::count(text.begin(), text.end(), '\n'), 1) << "the oldest one";
  EXPECT_NE(text.find("\"0\""), std::string::npos);
}

TEST_F(RecorderTest, EndsAtItsLimitWithWholeLines) {
  {
    const auto recorder = ConversationRecorder::Open(path_, 200);
    ASSERT_TRUE(recorder.ok());
    Chat(recorder->get(), "a");
    EXPECT_EQ(Contents(), "");
    Chat(recorder->get(), std::string(200, 'x'));
    Chat(recorder->get(), "b");  // would fit, but recording has ended
  }
  const auto file = ConversationFile::Open(path_);
  ASSERT_TRUE(file.ok());
  ASSERT_EQ(file->size(), 1u);
  EXPECT_EQ(file->Read(0)->messages[0]["content"], "a");
}

TEST_F(RecorderTest, LinesOfManyThreadsStayWhole) {
  auto recorder = ConversationRecorder::Open(path_, 1 << 20);
  ASSERT_TRUE(recorder.ok());
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] {
      for (int i = 0; i < 25; ++i) Chat(recorder->get(), std::string(1000, 'x'));
    });
  }
  for (std::thread& thread : threads) thread.join();
  recorder->reset();
  std::ifstream lines(path_);
  int count = 0;
  for (std::string line; std::getline(lines, line); ++count) ASSERT_TRUE(ParseJson(line, "line").ok());
  EXPECT_EQ(count, 100);
}

TEST_F(RecorderTest, RefusesWhatIsNoFileOfConversations) {
  const auto refused = [](const std::string& path, const char* mentions) {
    const auto recorder = ConversationRecorder::Open(path, 1 << 20);
    ASSERT_FALSE(recorder.ok()) << path;
    EXPECT_NE(recorder.status().message().find(path), std::string::npos) << recorder.status().message();
    EXPECT_NE(recorder.status().message().find(mentions), std::string::npos) << recorder.status().message();
  };
  refused(directory_.File("none/chats.jsonl"), "No such file");
  refused(directory_.path(), "directory");
  refused("/dev/null", "regular file");
  ASSERT_EQ(mkfifo(directory_.File("pipe").c_str(), 0600), 0);
  refused(directory_.File("pipe"), "regular file");
  std::ofstream(path_) << "half a line";
  refused(path_, "full line");
  EXPECT_EQ(Contents(), "half a line");
}

}  // namespace
}  // namespace triaxial
