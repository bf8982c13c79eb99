#include "apps/bench_workload.h"

#include <gtest/gtest.h>

#include <filesystem>

#include "apps/bench_screenshot.h"
#include "base/file.h"
#include "base/json.h"
#include "io/image.h"
#include "serve/base64.h"

namespace triaxial {
namespace {

Json Body(const BenchWorkload& workload, const BenchSession& session, size_t step) {
  return Json::parse(StepBody(session, session.steps[step], "some \"model\"", workload.fixed_length()));
}

TEST(BenchWorkload, FixedLengthsAreExactAndDiffer) {
  auto workload = MakeWorkload("1024/2048", {}).value();
  const BenchSession first = workload->Make(0), second = workload->Make(1);
  ASSERT_EQ(first.steps.size(), 1u);
  EXPECT_EQ(StepTarget(first.steps[0]), "/v1/completions");
  const Json body = Body(*workload, first, 0);
  EXPECT_EQ(body["prompt"].size(), 1024u);
  EXPECT_EQ(body["max_tokens"], 2048);
  EXPECT_EQ(body["ignore_eos"], true);
  EXPECT_EQ(body["stream"], true);
  EXPECT_EQ(body["model"], "some \"model\"");
  EXPECT_NE(first.steps[0].prompt, second.steps[0].prompt);
  EXPECT_EQ(first.steps[0].prompt, workload->Make(0).steps[0].prompt);
}

TEST(BenchWorkload, OsworldStepsExtendTheConversation) {
  auto workload = MakeWorkload("osworld", {}).value();
  const BenchSession session = workload->Make(3);
  ASSERT_EQ(session.steps.size(), 8u);
  Json before = Body(*workload, session, 0);
  EXPECT_EQ(before["messages"].size(), 2u);
  EXPECT_EQ(before["max_tokens"], 300);
  for (size_t s = 1; s < session.steps.size(); ++s) {
    const Json body = Body(*workload, session, s);
    const Json &old_messages = before["messages"], &messages = body["messages"];
    ASSERT_EQ(messages.size(), old_messages.size() + 2);
    for (size_t m = 0; m < old_messages.size(); ++m) EXPECT_EQ(messages[m], old_messages[m]);
    EXPECT_EQ(messages[messages.size() - 2]["role"], "assistant");
    EXPECT_EQ(messages.back()["role"], "user");
    before = body;
  }
  const BenchSession other = workload->Make(4);
  EXPECT_EQ(*other.steps[0].messages[0], *session.steps[0].messages[0]);
  EXPECT_NE(*other.steps[0].messages[1], *session.steps[0].messages[1]);
}

TEST(BenchWorkload, ScreenshotsAreJpegOfTheirSizeAndDiffer) {
  const std::string first = DrawScreenshot(640, 400, 1);
  const Result<ImageSize> size = ReadImageSize(first, {});
  ASSERT_TRUE(size.ok()) << size.status().message();
  EXPECT_EQ(size->width, 640);
  EXPECT_EQ(size->height, 400);
  EXPECT_NE(first, DrawScreenshot(640, 400, 2));
  EXPECT_TRUE(DecodeImage(first, {}).ok());
}

TEST(BenchWorkload, RecordedRequestsAreOneSession) {
  BenchWorkloadOptions options;
  options.max_tokens = 20;
  options.images = "tests/data/trajectories";
  auto workload = MakeWorkload("tests/data/text/osworld_shape_requests.jsonl", options).value();
  EXPECT_EQ(workload->name(), "osworld_shape_requests");
  EXPECT_EQ(workload->sessions(), 1);
  const BenchSession session = workload->Make(0);
  ASSERT_EQ(session.steps.size(), 7u);
  EXPECT_EQ(Body(*workload, session, 0)["messages"].size(), 2u);
  EXPECT_GT(Body(*workload, session, 6)["messages"].size(), 6u);
  EXPECT_FALSE(Body(*workload, session, 0).contains("ignore_eos"));
}

TEST(BenchWorkload, RecordedConversationsAreAskedAnswerByAnswer) {
  auto workload = MakeWorkload("models/pocket-agent/episodes/heldout.jsonl", {}).value();
  EXPECT_EQ(workload->sessions(), 14);
  const BenchSession session = workload->Make(0);
  ASSERT_GT(session.steps.size(), 1u);
  for (size_t s = 0; s < session.steps.size(); ++s)
    EXPECT_NE(Body(*workload, session, s)["messages"].back()["role"], "assistant");
  EXPECT_TRUE(Body(*workload, session, 0).contains("tools"));
  EXPECT_EQ(workload->Make(14).steps.size(), session.steps.size());
}

TEST(BenchWorkload, NamesThatAreNone) {
  EXPECT_EQ(MakeWorkload("no/such/file.jsonl", {}).status().code(), Code::kNotFound);
  EXPECT_EQ(MakeWorkload("0/5", {}).status().code(), Code::kNotFound);
  EXPECT_FALSE(MakeWorkload("5/", {}).ok());
}

}  // namespace
}  // namespace triaxial
