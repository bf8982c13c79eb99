// Text against references: token ids of the published tokenizers, prompts of the published chat templates.
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <sstream>

#include "base/file.h"
#include "base/json.h"
#include "text/chat_template.h"
#include "text/output_parser.h"
#include "text/token_tagger.h"
#include "text_qwen_tokenizer.h"

namespace triaxial {
namespace {

const std::string kFolder = "tests/data/text/";

Json Read(const std::string& name) {
  auto json = ReadJsonFile(kFolder + name);
  EXPECT_TRUE(json.ok()) << json.status().message();
  return std::move(json).value();
}

std::vector<Json> ReadLines(const std::string& name) {
  std::istringstream lines(ReadFile(kFolder + name, 64 << 20).value());
  std::vector<Json> out;
  for (std::string line; std::getline(lines, line);) out.push_back(ParseJson(line, name).value());
  return out;
}

std::shared_ptr<const ImagePatches> Grid(int h, int w) {
  auto patches = std::make_shared<ImagePatches>();
  patches->grid_h = h;
  patches->grid_w = w;
  return patches;
}

constexpr TemplateKind kKinds[] = {TemplateKind::kQwen3VlInstruct, TemplateKind::kQwen3VlThinking,
                                   TemplateKind::kQwen3Hybrid, TemplateKind::kQwen3Instruct2507,
                                   TemplateKind::kQwen3Thinking2507};

ChatTemplate Template(TemplateKind kind) {
  return std::move(ChatTemplate::Create(kind, QwenTokenizer())).value();
}

bool IsVl(TemplateKind kind) {
  return kind == TemplateKind::kQwen3VlInstruct || kind == TemplateKind::kQwen3VlThinking;
}

void ExpectCoverage(const Prompt& prompt) {
  int32_t at = 0;
  for (const TagSpan& span : prompt.spans) {
    ASSERT_EQ(span.begin, at);
    ASSERT_GT(span.end, span.begin);
    at = span.end;
  }
  ASSERT_EQ(at, static_cast<int32_t>(prompt.tokens.size()));
}

// How many tokens have the same turn, modality and role in both.
int64_t Agreement(const std::vector<TagSpan>& a, const std::vector<TagSpan>& b) {
  int64_t equal = 0;
  for (size_t i = 0, k = 0; i < a.size() && k < b.size();) {
    const int32_t end = std::min(a[i].end, b[k].end);
    if (a[i].turn == b[k].turn && a[i].modal == b[k].modal && a[i].semantic == b[k].semantic) {
      equal += end - std::max(a[i].begin, b[k].begin);
    }
    const bool next_a = a[i].end == end, next_b = b[k].end == end;
    i += next_a;
    k += next_b;
  }
  return equal;
}

TEST(TextGolden, TokenizerVectors) {
  const Json vectors = Read("tokenizer_vectors.json");
  EXPECT_EQ(vectors.size(), 43u);
  for (const Json& vector : vectors) {
    const auto text = vector["text"].get<std::string>();
    const auto special = vector["parse_special"].get<bool>() ? ParseSpecial::kAll : ParseSpecial::kNone;
    const auto expected = vector["ids"].get<std::vector<int32_t>>();
    EXPECT_EQ(QwenTokenizer().Encode(text, special), expected) << vector["id"];
    EXPECT_EQ(QwenTokenizer().Decode(expected, false), text) << vector["id"];
  }
}

TEST(TextGolden, TemplateVectors) {
  const Json vectors = Read("template_vectors.json");
  EXPECT_EQ(vectors.size(), 65u);
  const MarkupIds markup = FindMarkup(QwenTokenizer());
  for (const Json& vector : vectors) {
    const std::string name = vector["name"].get<std::string>() + " " + vector["template"].get<std::string>();
    const TemplateKind* kind = std::find_if(std::begin(kKinds), std::end(kKinds),
                                            [&](TemplateKind k) { return vector["template"] == Name(k); });
    ASSERT_NE(kind, std::end(kKinds)) << name;
    const Json& input = vector["input"];
    const auto conversation = ParseConversation(input["messages"], input.value("tools", Json()));
    ASSERT_TRUE(conversation.ok()) << name << ": " << conversation.status().message();
    TemplateOptions options;
    options.add_generation_prompt = input.value("add_generation_prompt", false);
    options.enable_thinking = input.value("enable_thinking", true);
    options.add_vision_id = input.value("add_vision_id", false);
    const ChatTemplate chat = Template(*kind);
    const auto text = chat.RenderText(*conversation, options);
    ASSERT_TRUE(text.ok()) << name << ": " << text.status().message();
    EXPECT_EQ(*text, vector["rendered"].get<std::string>()) << name;
    const std::vector<std::shared_ptr<const ImagePatches>> images(static_cast<size_t>(conversation->images()),
                                                                  Grid(2, 2));
    const auto prompt = chat.Render(*conversation, images, 2, options);
    ASSERT_TRUE(prompt.ok()) << name << ": " << prompt.status().message();
    EXPECT_EQ(prompt->tokens, vector["ids"].get<std::vector<int32_t>>()) << name;
    ExpectCoverage(*prompt);
    // What tokens alone cannot tell: a response that the user wrote out, and "Picture 1: ".
    if (vector["name"] == "user_tool_response_text" || options.add_vision_id) continue;
    EXPECT_EQ(Agreement(prompt->spans, ScanSpans(prompt->tokens, markup)),
              static_cast<int64_t>(prompt->tokens.size()))
        << name;
  }
}

TEST(TextGolden, PocketAgentPrompts) {
  const auto tokenizer = Tokenizer::Load("models/pocket-agent");
  ASSERT_TRUE(tokenizer.ok());
  const auto chat = ChatTemplate::Load("models/pocket-agent", *tokenizer);
  ASSERT_TRUE(chat.ok());
  const Json prompts = Read("pocket_prompts.json");
  EXPECT_EQ(prompts.size(), 12u);
  for (const Json& golden : prompts) {
    const auto conversation = ParseConversation(golden["messages"], golden["tools"]);
    ASSERT_TRUE(conversation.ok()) << conversation.status().message();
    const auto text = chat->RenderText(*conversation, {});
    ASSERT_TRUE(text.ok());
    EXPECT_EQ(*text, golden["prompt"].get<std::string>()) << golden["name"];
    std::vector<std::shared_ptr<const ImagePatches>> images;
    for (const Json& grid : golden["grids"]) images.push_back(Grid(grid[0], grid[1]));
    const auto prompt = chat->Render(*conversation, images, 2, {});
    ASSERT_TRUE(prompt.ok()) << prompt.status().message();
    EXPECT_EQ(prompt->tokens, golden["ids"].get<std::vector<int32_t>>()) << golden["name"];
    EXPECT_EQ(prompt->images.size(), images.size());
    ExpectCoverage(*prompt);
    const auto scanned = ScanSpans(prompt->tokens, FindMarkup(*tokenizer));
    EXPECT_EQ(Agreement(prompt->spans, scanned), static_cast<int64_t>(prompt->tokens.size()))
        << golden["name"];
  }
}

// Recorded runs of other agents: all of them parse, and their tags can be told from the tokens alone.
TEST(TextGolden, TrajectoriesRenderAndScanAlike) {
  std::vector<Conversation> conversations;
  for (const Json& record : ReadLines("trajectories.jsonl")) {
    auto conversation = ParseConversation(record["messages"], record.value("tools", Json()));
    ASSERT_TRUE(conversation.ok()) << record["id"] << ": " << conversation.status().message();
    conversations.push_back(std::move(conversation).value());
  }
  EXPECT_EQ(conversations.size(), 52u);
  for (const Json& record : ReadLines("osworld_shape_requests.jsonl")) {
    auto conversation = ParseConversation(record["request"]["messages"], Json());
    ASSERT_TRUE(conversation.ok()) << record["id"] << ": " << conversation.status().message();
    conversations.push_back(std::move(conversation).value());
  }
  EXPECT_EQ(conversations.size(), 59u);
  const MarkupIds markup = FindMarkup(QwenTokenizer());
  for (const TemplateKind kind : kKinds) {
    const ChatTemplate chat = Template(kind);
    int64_t tokens = 0, equal = 0;
    for (const Conversation& conversation : conversations) {
      if (conversation.images() > 0 && !IsVl(kind)) continue;
      const std::vector<std::shared_ptr<const ImagePatches>> images(
          static_cast<size_t>(conversation.images()), Grid(48, 64));
      const auto prompt = chat.Render(conversation, images, 2, {});
      ASSERT_TRUE(prompt.ok()) << prompt.status().message();
      ExpectCoverage(*prompt);
      tokens += static_cast<int64_t>(prompt->tokens.size());
      equal += Agreement(prompt->spans, ScanSpans(prompt->tokens, markup));
    }
    std::printf("%-20s %ld of %ld tokens tagged alike\n", std::string(Name(kind)).c_str(), equal, tokens);
    EXPECT_GT(static_cast<double>(equal), 0.999 * static_cast<double>(tokens));
  }
}

// An answer that was generated and parsed comes back in the next request as the very tokens that were
// generated, with the tags that they were given then: that is what makes the cache worth keeping.
TEST(TextGolden, AGeneratedAnswerComesBackAsItWas) {
  const ChatTemplate chat = Template(TemplateKind::kQwen3VlThinking);
  const MarkupIds markup = FindMarkup(QwenTokenizer());
  Conversation conversation;
  conversation.messages.resize(1);
  conversation.messages[0].content.push_back({ContentPart::Kind::kText, "Open the file"});
  const std::string output =
      "I should look first.\n\nThen open.\n</think>\n\nOpening it.\n<tool_call>\n{\"name\": \"open\", "
      "\"arguments\": {\"file\":  \"a b.txt\", \"n\": 1.50}}\n</tool_call>\n<tool_call>\n{\"name\": "
      "\"look\", "
      "\"arguments\": {}}\n</tool_call><|im_end|>";
  const auto first = chat.Render(conversation, {}, 2, {});
  ASSERT_TRUE(first.ok());
  OutputParser parser(QwenTokenizer(),
                      {.parse_reasoning = true, .starts_in_thought = true, .parse_tool_calls = true});
  GenerationTagger tagger(markup, /*starts_in_thought=*/true);
  std::vector<int32_t> expected = first->tokens;
  std::vector<Semantic> tags;
  Message answer;
  answer.role = Role::kAssistant;
  answer.reasoning_content.emplace();
  std::string content;
  const auto take = [&](const OutputDelta& delta) {
    content += delta.content;
    *answer.reasoning_content += delta.reasoning;
    answer.tool_calls.insert(answer.tool_calls.end(), delta.tool_calls.begin(), delta.tool_calls.end());
  };
  for (const int32_t token : QwenTokenizer().Encode(output, ParseSpecial::kAll)) {
    expected.push_back(token);
    tags.push_back(tagger.Next(token));
    take(parser.Push(token));
  }
  take(parser.Finish());
  answer.content.push_back({ContentPart::Kind::kText, content});
  conversation.messages.push_back(answer);
  conversation.messages.emplace_back().role = Role::kTool;

  const auto second = chat.Render(conversation, {}, 2, {});
  ASSERT_TRUE(second.ok());
  ASSERT_GT(second->tokens.size(), expected.size());
  const std::vector<int32_t> prefix(second->tokens.begin(),
                                    second->tokens.begin() + static_cast<std::ptrdiff_t>(expected.size()));
  EXPECT_EQ(QwenTokenizer().Decode(prefix, false), QwenTokenizer().Decode(expected, false));
  EXPECT_EQ(prefix, expected);
  // A newline that the model writes before a marker is known as scaffolding only afterwards.
  for (const TagSpan& span : second->spans) {
    for (int32_t i = span.begin; i < span.end; ++i) {
      const auto at = static_cast<size_t>(i) - first->tokens.size();
      if (i < static_cast<int32_t>(first->tokens.size()) || at >= tags.size()) continue;
      if (at + 1 < tags.size() && markup.IsNewline(expected[static_cast<size_t>(i)])) continue;
      EXPECT_EQ(span.semantic, tags[at]) << at;
    }
  }
}

TEST(TextGolden, TrajectoriesSurviveEncodingAndShowItsSpeed) {
  std::vector<std::string> texts;
  size_t bytes = 0;
  for (const Json& record : ReadLines("trajectories.jsonl")) {
    for (const Json& message : record["messages"]) {
      if (message["content"].is_string()) texts.push_back(message["content"]);
      if (message["content"].is_string()) bytes += texts.back().size();
    }
  }
  ASSERT_GT(bytes, 500000u);
  QwenTokenizer();
  const auto start = std::chrono::steady_clock::now();
  std::vector<std::vector<int32_t>> ids;
  for (const std::string& text : texts) ids.push_back(QwenTokenizer().Encode(text, ParseSpecial::kNone));
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
  size_t tokens = 0;
  for (size_t i = 0; i < texts.size(); ++i) {
    EXPECT_EQ(QwenTokenizer().Decode(ids[i], false), QwenTokenizer().Normalize(texts[i]));
    tokens += ids[i].size();
  }
  std::printf("%zu bytes, %zu tokens, %.1f MB/s\n", bytes, tokens,
              static_cast<double>(bytes) / 1e6 / elapsed.count());
}

TEST(TextGolden, AMegabyteOfOneLetterIsNotQuadratic) {
  const std::string text(1 << 20, 'a');
  const auto start = std::chrono::steady_clock::now();
  const auto ids = QwenTokenizer().Encode(text, ParseSpecial::kAll);
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
  EXPECT_EQ(QwenTokenizer().Decode(ids, false), text);
  EXPECT_LT(elapsed.count(), 20) << "takes a fraction of a second; a quadratic merge takes minutes";
}

}  // namespace
}  // namespace triaxial
