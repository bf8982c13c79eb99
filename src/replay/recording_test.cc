#include "replay/recording.h"

#include <gtest/gtest.h>

#include "io/checkpoint_testing.h"
#include "replay/recording_readers.h"
#include "text/tokenizer.h"

namespace triaxial {
namespace {

constexpr char kMooncake[] = "tests/data/traces/mooncake_conversation_60.jsonl";
constexpr char kAzure[] = "tests/data/traces/azure2023_conv_40.csv";
constexpr char kAgents[] = "models/pocket-agent/episodes/heldout.jsonl";

RecordingOptions PocketAgent() {
  RecordingOptions options;
  options.tokenizer_directory = "models/pocket-agent";
  options.config = *LoadModelConfig("models/pocket-agent");
  options.preprocessor = *LoadPreprocessorConfig("models/pocket-agent");
  return options;
}

Result<Recording> Load(const std::string& text) {
  const TempDir dir;
  dir.Write("trace", text);
  return LoadRecording({dir.File("trace")}, PocketAgent());
}

struct RequestTokens {
  std::vector<uint8_t> tags;
  std::vector<ContentId> contents;
};

RequestTokens TokensOf(const Recording& recording, const RecordedRequest& request, int64_t number = 0,
                       int64_t repetition = 0) {
  std::vector<KvToken> filled;
  FillTokens(recording, request, number, repetition, &filled);
  RequestTokens tokens;
  for (const KvToken& token : filled) {
    tokens.tags.push_back(token.tag);
    tokens.contents.push_back(token.content);
  }
  return tokens;
}

// Leading tokens with equal identities.
size_t SharedPrefix(const RequestTokens& a, const RequestTokens& b) {
  return static_cast<size_t>(
      std::mismatch(a.contents.begin(), a.contents.end(), b.contents.begin(), b.contents.end()).first -
      a.contents.begin());
}

TEST(Recording, ReadsMooncakesTrace) {
  const auto recording = LoadRecording({kMooncake}, {});
  ASSERT_TRUE(recording.ok()) << recording.status().message();
  ASSERT_EQ(recording->trace.size(), 60u);
  EXPECT_TRUE(recording->agents.empty());
  const RecordedRequest& first = recording->trace[0].steps[0];
  EXPECT_EQ(first.prompt_tokens, 6758);
  EXPECT_EQ(first.output_tokens, 500);
  EXPECT_EQ(first.blocks.size(), 14u);
  EXPECT_EQ(first.arrival, 0);
  EXPECT_EQ(recording->common_blocks, std::vector<int64_t>{0});
  for (size_t i = 1; i < 60; ++i) {
    EXPECT_GE(recording->trace[i].steps[0].arrival, recording->trace[i - 1].steps[0].arrival);
  }
  EXPECT_GT(recording->trace_seconds, recording->trace.back().steps[0].arrival);
}

TEST(Recording, EqualHashIdsAreEqualTokens) {
  const auto recording = LoadRecording({kMooncake}, {});
  ASSERT_TRUE(recording.ok());
  const RequestTokens a = TokensOf(*recording, recording->trace[0].steps[0], 0);
  const RequestTokens b = TokensOf(*recording, recording->trace[1].steps[0], 1);
  EXPECT_EQ(SharedPrefix(a, b), 512u);  // ids 0, 1, ... and 0, 14, ...
  const RequestTokens again = TokensOf(*recording, recording->trace[0].steps[0], 7);
  EXPECT_EQ(SharedPrefix(a, again), 6758u) << "the prompt is the same, the answers are not";
  const RequestTokens round = TokensOf(*recording, recording->trace[0].steps[0], 60, 1);
  EXPECT_EQ(SharedPrefix(a, round), 512u) << "another repetition shares the common block only";
}

TEST(Recording, IdsOfDifferentFilesAreDifferent) {
  const auto recording = LoadRecording({kMooncake, kMooncake}, {});
  ASSERT_TRUE(recording.ok());
  ASSERT_EQ(recording->trace.size(), 120u);
  EXPECT_NE(recording->trace[0].steps[0].blocks[0] == 0, recording->trace[119].steps[0].blocks[0] == 0);
}

TEST(Recording, ReadsAzuresTrace) {
  const auto recording = LoadRecording({kAzure}, {});
  ASSERT_TRUE(recording.ok()) << recording.status().message();
  ASSERT_EQ(recording->trace.size(), 40u);
  const RecordedRequest& second = recording->trace[1].steps[0];
  EXPECT_NEAR(second.arrival, 4.3145790, 1e-6);  // 18:15:46.6805900 to 18:15:50.9951690
  EXPECT_EQ(second.prompt_tokens, 396);
  EXPECT_EQ(second.output_tokens, 109);
  const RequestTokens a = TokensOf(*recording, second, 1);
  const RequestTokens b = TokensOf(*recording, second, 2);
  EXPECT_EQ(SharedPrefix(a, b), 0u) << "the trace says nothing of shared prefixes";
}

TEST(Recording, TagsOfATraceAreSystemThenTurns) {
  Recording recording;
  recording.mix = {.system_tokens = 4,
                   .turn = {{Modal::kText, Semantic::kUser, 2}, {Modal::kImage, Semantic::kObs, 3}}};
  RecordedRequest request;
  request.prompt_tokens = 16;  // 4 of system, 5 of turn 0, 5 of turn 1, 2 of turn 2
  request.output_tokens = 2;
  const auto name = [](uint8_t tag) { return Name(Tag::FromIndex(tag)); };
  const RequestTokens tokens = TokensOf(recording, request);
  EXPECT_EQ(name(tokens.tags[0]), "m2/text/inst");
  EXPECT_EQ(name(tokens.tags[3]), "m2/text/inst");
  EXPECT_EQ(name(tokens.tags[4]), "m2/text/user");
  EXPECT_EQ(name(tokens.tags[6]), "m2/image/obs");
  EXPECT_EQ(name(tokens.tags[9]), "m1/text/user");
  EXPECT_EQ(name(tokens.tags[15]), "current/text/user");
  EXPECT_EQ(name(tokens.tags[16]), "current/text/assistant");
  EXPECT_EQ(tokens.tags.size(), 18u);
}

TEST(Recording, EveryAssistantMessageIsAStep) {
  const auto recording = LoadRecording({kAgents}, PocketAgent());
  ASSERT_TRUE(recording.ok()) << recording.status().message();
  ASSERT_EQ(recording->agents.size(), 14u);
  const RecordedSession& session = recording->agents[0];
  ASSERT_GT(session.steps.size(), 1u);
  size_t pictures = 0;
  for (size_t s = 0; s < session.steps.size(); ++s) {
    const RecordedRequest& step = session.steps[s];
    EXPECT_GT(step.output_tokens, 0);
    EXPECT_EQ(static_cast<int32_t>(step.rendered->tokens.size()), step.prompt_tokens + step.output_tokens);
    EXPECT_GT(step.rendered->system_tokens, 0);
    pictures = std::max(pictures, step.rendered->pictures.size());
    if (s == 0) continue;
    const RequestTokens before = TokensOf(*recording, session.steps[s - 1]);
    const RequestTokens now = TokensOf(*recording, step);
    EXPECT_GE(SharedPrefix(before, now), static_cast<size_t>(step.rendered->system_tokens));
  }
  // The template drops the thoughts of earlier turns, so a prompt may be shorter than the one before; but the
  // conversation has grown, and its first message is where it was.
  EXPECT_GT(session.steps.back().prompt_tokens, session.steps[0].prompt_tokens);
  const RequestTokens first = TokensOf(*recording, session.steps[0]);
  EXPECT_GE(SharedPrefix(first, TokensOf(*recording, session.steps.back())),
            static_cast<size_t>(session.steps[0].prompt_tokens) - 8);
  EXPECT_GT(pictures, 0u);
}

// Requests as an agent with a sliding window sends them: steps of one session, whose answers are what the
// next request shows.
TEST(Recording, RequestsThatFollowEachOtherAreOneSession) {
  const auto request = [](const std::string& id, const std::string& turns) {
    return R"({"id": ")" + id + R"(", "request": {"messages": [{"role": "user", "content": "go"})" + turns +
           "]}}\n";
  };
  const std::string answer =
      R"(, {"role": "assistant", "content": "open the window"}, {"role": "user", "content": "on"})";
  const std::string later =
      R"(, {"role": "assistant", "content": "close it"}, {"role": "user", "content": "on"})";
  const std::string conversation =
      R"({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]})"
      "\n";
  const auto recording = Load(request("one", "") + request("two", answer) + request("three", later) +
                              conversation + request("four", ""));
  ASSERT_TRUE(recording.ok()) << recording.status().message();
  ASSERT_EQ(recording->agents.size(), 3u);
  EXPECT_EQ(recording->agents[0].id, "one");
  EXPECT_EQ(recording->agents[2].id, "four");
  const std::vector<RecordedRequest>& steps = recording->agents[0].steps;
  ASSERT_EQ(steps.size(), 3u);
  const auto tokenizer = Tokenizer::Load("models/pocket-agent");
  const auto answer_of = [&](const RecordedRequest& step) {
    return tokenizer->Decode({step.rendered->tokens.end() - step.output_tokens, step.rendered->tokens.end()},
                             true);
  };
  EXPECT_NE(answer_of(steps[0]).find("open the window"), std::string::npos) << answer_of(steps[0]);
  EXPECT_NE(answer_of(steps[1]).find("close it"), std::string::npos) << answer_of(steps[1]);
  EXPECT_GE(steps[2].output_tokens, 1);
  EXPECT_LT(steps[2].output_tokens, steps[1].output_tokens) << "nobody says what was answered";
  EXPECT_EQ(recording->agents[2].steps.size(), 1u);
}

// What `serve --record` writes holds pictures as data: URLs.
TEST(Recording, PicturesMayBeInTheLine) {
  const std::string tiny =
      "iVBORw0KGgoAAAANSUhEUgAAAEAAAABACAAAAACPAi4CAAAAG0lEQVR42u3BgQAAAADDoPlT3+"
      "AEVQEAAAB8AxBAAAG9PLePAAAAAElFTkSuQmCC";
  const std::string text =
      R"({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,)" +
      tiny + R"("}}]}, {"role": "assistant", "content": "b"}]})";
  const auto recording = Load(text);
  ASSERT_TRUE(recording.ok()) << recording.status().message();
  EXPECT_EQ(recording->agents.at(0).steps.at(0).rendered->pictures.size(), 1u);
}

TEST(Recording, AnotherRoundSharesTheSystemPrompt) {
  const auto recording = LoadRecording({kAgents}, PocketAgent());
  ASSERT_TRUE(recording.ok());
  const RecordedRequest& step = recording->agents[0].steps.back();
  const RequestTokens first = TokensOf(*recording, step, 0, 0);
  const RequestTokens second = TokensOf(*recording, step, 1, 1);
  EXPECT_EQ(SharedPrefix(first, second), static_cast<size_t>(step.rendered->system_tokens));
  for (size_t i = static_cast<size_t>(step.rendered->system_tokens); i < first.contents.size(); ++i) {
    ASSERT_NE(first.contents[i], second.contents[i]) << i;
  }
}

TEST(Recording, HostileTracesAreRefused) {
  const std::pair<const char*, const char*> cases[] = {
      {"", "is no trace"},
      {"hello\n", "is no trace"},
      {"{\n", "line 1"},
      {"{\"timestamp\": 0, \"input_length\": 5, \"output_length\": 1}\n{\"timestamp\": 0,\n", "line 2"},
      {"{}\n", "timestamp"},
      {"{\"timestamp\": -1, \"input_length\": 5, \"output_length\": 1}", "timestamp"},
      {"{\"timestamp\": 0, \"input_length\": -5, \"output_length\": 1}", "input_length"},
      {"{\"timestamp\": 0, \"input_length\": 0, \"output_length\": 1}", "input_length"},
      {"{\"timestamp\": 0, \"input_length\": 5.5, \"output_length\": 1}", "input_length"},
      {"{\"timestamp\": 0, \"input_length\": 99999999999999, \"output_length\": 1}", "input_length"},
      {"{\"timestamp\": 0, \"input_length\": 5, \"output_length\": 1e300}", "output_length"},
      {"{\"timestamp\": 0, \"input_length\": 5, \"output_length\": 1, \"hash_ids\": 7}", "hash_ids"},
      {"{\"timestamp\": 0, \"input_length\": 5, \"output_length\": 1, \"hash_ids\": [-7]}", "hash_ids"},
      {"{\"timestamp\": 0, \"input_length\": 5, \"output_length\": 1, \"hash_ids\": [1e40]}", "hash_ids"},
      {"{\"timestamp\": 0, \"input_length\": 5, \"output_length\": 1}\n"
       "{\"timestamp\": 9e15, \"input_length\": 5, \"output_length\": 1}",
       "more than a year"},
      {"TIMESTAMP,ContextTokens,GeneratedTokens\n", "no request"},
      {"TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,374\n", "line 2"},
      {"TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,-374,44\n", "line 2"},
      {"TIMESTAMP,ContextTokens,GeneratedTokens\n2023-13-16 18:15:46.68,374,44\n", "line 2"},
      {"TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,374,99999999999999999999\n",
       "line 2"},
      {"TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.68,374,44,1\n", "line 2"},
      {"{\"messages\": 7}\n", "messages"},
      {"{\"request\": {\"messages\": 7}}\n", "line 1 has no list of messages"},
      {"{\"messages\": []}\n", "line 1"},
      {"{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}]}\n", "no conversation"},
      {"{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}, {\"role\": \"pope\", \"content\": "
       "\"b\"}]}\n",
       "messages[1]"},
      {"{\"messages\": [{\"role\": \"user\", \"content\": [{\"type\": \"image_url\", \"image_url\": "
       "\"no/such.png\"}]},"
       " {\"role\": \"assistant\", \"content\": \"b\"}]}\n",
       "no/such.png"},
  };
  for (const auto& [text, part] : cases) {
    const auto recording = Load(text);
    ASSERT_FALSE(recording.ok()) << text;
    EXPECT_NE(recording.status().message().find(part), std::string::npos)
        << text << " yields: " << recording.status().message();
  }
}

TEST(Recording, AnswersOfNothingCountAsOneTokenAndDisorderIsSorted) {
  const auto recording = Load(
      "{\"timestamp\": 5000, \"input_length\": 700, \"output_length\": 0, \"hash_ids\": [1]}\r\n\n"
      "{\"timestamp\": 2000, \"input_length\": 3, \"output_length\": 9, \"hash_ids\": [1, 2, 3]}\n");
  ASSERT_TRUE(recording.ok()) << recording.status().message();
  ASSERT_EQ(recording->trace.size(), 2u);
  EXPECT_EQ(recording->trace[0].steps[0].output_tokens, 9);
  EXPECT_EQ(recording->trace[1].steps[0].arrival, 3);
  EXPECT_EQ(recording->trace[1].steps[0].output_tokens, 1);
  // Fewer ids than the length asks for: the rest is shared with nobody. More: the rest is ignored.
  EXPECT_EQ(SharedPrefix(TokensOf(*recording, recording->trace[1].steps[0], 1),
                         TokensOf(*recording, recording->trace[1].steps[0], 2)),
            512u);
  EXPECT_EQ(TokensOf(*recording, recording->trace[0].steps[0]).contents.size(), 12u);
}

TEST(Recording, ReadsATagMix) {
  const TempDir dir;
  dir.Write("mix.json", R"({"system_tokens": 9, "turn": [{"tag": "image/obs", "tokens": 7}]})");
  const auto mix = LoadTagMix(dir.File("mix.json"));
  ASSERT_TRUE(mix.ok()) << mix.status().message();
  EXPECT_EQ(mix->system_tokens, 9);
  ASSERT_EQ(mix->turn.size(), 1u);
  EXPECT_EQ(mix->turn[0].modal, Modal::kImage);
  for (const char* bad : {"[]", "{}", R"({"system_tokens": 9, "turn": []})",
                          R"({"system_tokens": -1, "turn": [{"tag": "text/obs", "tokens": 7}]})",
                          R"({"system_tokens": 9, "turn": [{"tag": "text/noise", "tokens": 7}]})",
                          R"({"system_tokens": 9, "turn": [{"tag": "obs", "tokens": 7}]})",
                          R"({"system_tokens": 9, "turn": [{"tag": "text/obs", "tokens": 0}]})"}) {
    dir.Write("mix.json", bad);
    EXPECT_FALSE(LoadTagMix(dir.File("mix.json")).ok()) << bad;
  }
}

}  // namespace
}  // namespace triaxial
