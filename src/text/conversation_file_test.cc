#include "text/conversation_file.h"

#include <gtest/gtest.h>

#include "base/temp_dir_testing.h"

namespace triaxial {
namespace {

constexpr char kThree[] =
    "{\"id\": \"first\", \"messages\": [{\"role\": \"user\", \"content\": \"a\"}], \"tools\": []}\r\n"
    "\n"
    "  \t\n"
    "{\"id\": \"second\", \"request\": {\"model\": \"m\", \"messages\": [{\"role\": \"user\", \"content\": "
    "\"b\"}]}}\n"
    "[{\"role\": \"user\", \"content\": \"c\"}]";  // no newline at the end

class ConversationFileTest : public testing::Test {
 protected:
  std::string Write(const std::string& text) {
    directory_.Write("chats.jsonl", text);
    return path_;
  }
  // The error of the first line that cannot be read.
  std::string ErrorOf(const std::string& text) {
    const auto file = ConversationFile::Open(Write(text));
    if (!file.ok()) return file.status().message();
    for (size_t i = 0; i < file->size(); ++i) {
      const auto line = file->Read(i);
      if (!line.ok()) return line.status().message();
      const auto conversation = line->Parse();
      if (!conversation.ok()) return conversation.status().message();
    }
    return "";
  }

  const TempDir directory_;
  const std::string path_ = directory_.File("chats.jsonl");
};

TEST_F(ConversationFileTest, ReadsEveryFormOfALine) {
  const auto file = ConversationFile::Open(Write(kThree));
  ASSERT_TRUE(file.ok()) << file.status().message();
  ASSERT_EQ(file->size(), 3u);
  const auto lines = file->ReadAll();
  ASSERT_TRUE(lines.ok()) << lines.status().message();
  EXPECT_EQ((*lines)[0].id, "first");
  EXPECT_FALSE((*lines)[0].is_request);
  EXPECT_TRUE((*lines)[0].tools.is_array());
  EXPECT_EQ((*lines)[1].id, "second");
  EXPECT_TRUE((*lines)[1].is_request);
  EXPECT_EQ((*lines)[2].id, path_ + ", line 5") << "blank lines count";
  EXPECT_TRUE((*lines)[2].tools.is_null());
  const char* contents[] = {"a", "b", "c"};
  for (size_t i = 0; i < 3; ++i) {
    EXPECT_EQ((*lines)[i].images, directory_.path());
    const auto conversation = (*lines)[i].Parse();
    ASSERT_TRUE(conversation.ok()) << conversation.status().message();
    EXPECT_EQ(conversation->messages.at(0).content.at(0).text, contents[i]);
  }
  EXPECT_EQ(file->ReadAll(2)->size(), 2u);
  EXPECT_EQ(file->ReadAll(9)->size(), 3u);
  EXPECT_EQ(ConversationFile::Open(path_, "/pictures")->Read(0)->images, "/pictures");
}

TEST_F(ConversationFileTest, ErrorsNameFileAndLine) {
  EXPECT_EQ(ErrorOf(std::string(kThree) + "\n{\"messages\": \n").find(path_ + ", line 6"), 0u);
  for (const char* none :
       {"7", "{}", "{\"messages\": 7}", "{\"request\": 7}", "{\"request\": {}}", "\"messages\""}) {
    const std::string error = ErrorOf("\n" + std::string(none));
    EXPECT_EQ(error.find(path_ + ", line 2 has no list of messages"), 0u) << none << " yields: " << error;
  }
  const std::string error = ErrorOf(R"({"messages": [{"role": "pope", "content": "a"}]})");
  EXPECT_EQ(error.find(path_ + ", line 1: messages[0]"), 0u) << error;
  EXPECT_NE(ErrorOf("").find(path_ + " holds no conversation"), std::string::npos);
  EXPECT_NE(ErrorOf(" \n\r\n").find("holds no conversation"), std::string::npos);
  EXPECT_EQ(ConversationFile::Open(directory_.File("none")).status().code(), Code::kNotFound);
  EXPECT_EQ(ConversationFile::Open(directory_.path()).status().code(), Code::kNotFound);
}

TEST_F(ConversationFileTest, AFileThatShrinksMeanwhileIsAnError) {
  const auto file = ConversationFile::Open(Write(kThree));
  ASSERT_TRUE(file.ok());
  Write("{}\n");
  EXPECT_EQ(file->Read(2).status().code(), Code::kDataLoss);
}

TEST_F(ConversationFileTest, OneConversationMayHaveAFileToItself) {
  Write("{\n  \"messages\": [\n    {\"role\": \"user\", \"content\": \"a\"}\n  ]\n}\n");
  const auto whole = LoadConversation(path_, 0);
  ASSERT_TRUE(whole.ok()) << whole.status().message();
  EXPECT_EQ(whole->messages.size(), 1u);
  EXPECT_EQ(whole->images, directory_.path());
  EXPECT_FALSE(LoadConversation(path_, 1).ok());
}

TEST_F(ConversationFileTest, OneOfManyIsChosenByItsLine) {
  Write(kThree);
  EXPECT_EQ(LoadConversation(path_, 1)->id, "first");
  EXPECT_EQ(LoadConversation(path_, 4)->id, "second");
  EXPECT_EQ(LoadConversation(path_, 5)->messages[0]["content"], "c");
  EXPECT_EQ(LoadConversation(path_, 0).status().message(),
            path_ + " holds more than one conversation; choose one with --line");
  for (const int none : {2, 3, 6, 7, 100}) {
    const auto line = LoadConversation(path_, none);
    ASSERT_FALSE(line.ok()) << none;
    EXPECT_EQ(line.status().message(),
              path_ + ", line " + std::to_string(none) + " is empty or does not exist");
  }
  Write("");
  EXPECT_FALSE(LoadConversation(path_, 0).ok());
  EXPECT_FALSE(LoadConversation(path_, 1).ok());
  EXPECT_EQ(LoadConversation(directory_.File("none"), 0).status().code(), Code::kNotFound);
}

}  // namespace
}  // namespace triaxial
