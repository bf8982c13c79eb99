#include "apps/demo_trajectory.h"

#include <gtest/gtest.h>

#include "base/file.h"

namespace triaxial {
namespace {

Json Call(const char* name, Json arguments) {
  return {
      {"content", nullptr},
      {"tool_calls",
       Json::array({{{"id", "x"}, {"function", {{"name", name}, {"arguments", std::move(arguments)}}}}})}};
}

TEST(SameAnswer, ComparesArgumentsAsValuesWhateverTheirOrderOrForm) {
  EXPECT_TRUE(SameAnswer(Call("click", R"({"u": 4, "v": 5})"), Call("click", R"({"v":5,"u":4})")));
  EXPECT_TRUE(SameAnswer(Call("click", R"({"u": 4})"), Call("click", {{"u", 4}})));
  EXPECT_FALSE(SameAnswer(Call("click", R"({"u": 4})"), Call("click", R"({"u": 5})")));
  EXPECT_FALSE(SameAnswer(Call("click", R"({"u": 4})"), Call("click", R"({"u": "4"})")));
  EXPECT_FALSE(SameAnswer(Call("click", R"({"u": 4})"), Call("click", R"({"u": 4, "v": 5})")));
  EXPECT_FALSE(SameAnswer(Call("click", "{}"), Call("type", "{}")));
}

TEST(SameAnswer, ArgumentsThatAreNotJsonAreNeverRight) {
  EXPECT_FALSE(SameAnswer(Call("click", "{\"u\": "), Call("click", "{\"u\": ")));
}

TEST(SameAnswer, WithoutCallsTheContentDecides) {
  const Json text = {{"content", "total: Dmitri noted"}, {"reasoning_content", "a"}};
  EXPECT_TRUE(SameAnswer({{"content", "total: Dmitri noted"}, {"reasoning_content", "b"}}, text));
  EXPECT_FALSE(SameAnswer({{"content", "total: Dmitri"}}, text));
  EXPECT_FALSE(SameAnswer(Call("click", "{}"), text));
  EXPECT_FALSE(SameAnswer(text, Call("click", "{}")));
}

TEST(Trajectories, TheRecordedOnesHaveTheirPicturesInline) {
  const auto loaded = LoadTrajectories("models/pocket-agent/episodes/heldout.jsonl", 0);
  ASSERT_TRUE(loaded.ok()) << loaded.status().message();
  ASSERT_EQ(loaded->size(), 14u);
  size_t steps = 0;
  for (const Trajectory& trajectory : *loaded) steps += trajectory.steps.size();
  EXPECT_EQ(steps, 212u);
  const Trajectory& first = loaded->front();
  EXPECT_EQ(first.id, "heldout-standard-000");
  const Json request = StepRequest(first, 1, "m", 10);
  EXPECT_EQ(request["messages"].size(), first.steps[1]);
  EXPECT_EQ(request["messages"].back()["role"], "tool");
  const std::string url = request["messages"][1]["content"][0]["image_url"]["url"];
  EXPECT_TRUE(url.starts_with("data:image/png;base64,iVBOR")) << url.substr(0, 60);
}

TEST(Trajectories, ErrorsNameFileAndLine) {
  const std::string path = testing::TempDir() + "/demo_trajectory_test.jsonl";
  const auto error = [&](const std::string& text) {
    EXPECT_TRUE(WriteFile(path, text).ok());
    const auto loaded = LoadTrajectories(path, 0);
    EXPECT_FALSE(loaded.ok());
    return loaded.ok() ? "" : loaded.status().message();
  };
  EXPECT_NE(error("{\"messages\": []}\n7\n").find(path + ", line 2 has no list of messages"),
            std::string::npos);
  EXPECT_NE(error("{\"messages\": [{\"content\": \"a\"}]}").find("messages[0] has no role"),
            std::string::npos);
  const std::string missing = error(
      R"({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "no.png"}}]}]})");
  EXPECT_NE(missing.find("line 1: messages[0]"), std::string::npos) << missing;
  EXPECT_NE(missing.find("no.png"), std::string::npos) << missing;
  EXPECT_NE(error("").find("holds no conversation"), std::string::npos);
}

}  // namespace
}  // namespace triaxial
