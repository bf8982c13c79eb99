#include "serve/recorder.h"

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/stat.h>

#include <fstream>
#include <thread>
#include <vector>

#include "base/file.h"
#include "base/temp_dir_testing.h"

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

TEST_F(RecorderTest, EndsAtItsLimitWithWholeLines) {
  const auto recorder = ConversationRecorder::Open(path_, 200);
  ASSERT_TRUE(recorder.ok());
  Chat(recorder->get(), "a");
  const std::string first = Contents();
  Chat(recorder->get(), std::string(200, 'x'));
  Chat(recorder->get(), "b");  // would fit, but recording has ended
  EXPECT_EQ(Contents(), first);
}

TEST_F(RecorderTest, LinesOfManyThreadsStayWhole) {
  const auto recorder = ConversationRecorder::Open(path_, 1 << 20);
  ASSERT_TRUE(recorder.ok());
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] {
      for (int i = 0; i < 25; ++i) Chat(recorder->get(), std::string(1000, 'x'));
    });
  }
  for (std::thread& thread : threads) thread.join();
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
