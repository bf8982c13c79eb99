#include "text/output_parser.h"

#include <gtest/gtest.h>

#include <random>

#include "text/stop_strings.h"
#include "text/tool_call_json.h"
#include "text/utf8.h"

namespace triaxial {
namespace {

const Tokenizer& Pocket() {
  static const Tokenizer* tokenizer =
      new Tokenizer(std::move(Tokenizer::Load("models/pocket-agent")).value());
  return *tokenizer;
}

// A whole message, written so that failures are readable.
struct Parsed {
  std::string content, reasoning;
  std::vector<std::string> calls;  // "name arguments"
  bool stopped = false;
  bool operator==(const Parsed&) const = default;
};
std::ostream& operator<<(std::ostream& out, const Parsed& parsed) {
  out << "{content '" << parsed.content << "', reasoning '" << parsed.reasoning << "'";
  for (const std::string& call : parsed.calls) out << ", call '" << call << "'";
  return out << (parsed.stopped ? ", stopped}" : "}");
}

Parsed ParseTokens(const std::vector<int32_t>& tokens, const OutputOptions& options) {
  OutputParser parser(Pocket(), options);
  Parsed parsed;
  const auto take = [&](const OutputDelta& delta) {
    EXPECT_EQ(delta.content, ToValidUtf8(delta.content));
    EXPECT_EQ(delta.reasoning, ToValidUtf8(delta.reasoning));
    parsed.content += delta.content;
    parsed.reasoning += delta.reasoning;
    for (const ToolCall& call : delta.tool_calls) parsed.calls.push_back(call.name + " " + call.arguments);
    parsed.stopped |= delta.stopped;
  };
  for (const int32_t token : tokens) take(parser.Push(token));
  take(parser.Finish());
  return parsed;
}

Parsed Parse(const std::string& text, const OutputOptions& options) {
  return ParseTokens(Pocket().Encode(text, ParseSpecial::kAll), options);
}

const OutputOptions kPlain,
    kThinking{.parse_reasoning = true, .starts_in_thought = true, .parse_tool_calls = true},
    kTools{.parse_tool_calls = true};

TEST(OutputParser, PlainTextPassesThrough) {
  EXPECT_EQ(Parse("\n Hello\n\n wörld \n<|im_end|>", kPlain), (Parsed{"\n Hello\n\n wörld \n", "", {}}));
  EXPECT_EQ(Parse("x<tool_call>\n{\"name\": \"f\"}\n</tool_call> <think>", kPlain),
            (Parsed{"x<tool_call>\n{\"name\": \"f\"}\n</tool_call> <think>", "", {}}));
  OutputOptions keep;
  keep.skip_special_tokens = false;
  EXPECT_EQ(Parse("a<|im_end|>", keep), (Parsed{"a<|im_end|>", "", {}}));
}

TEST(OutputParser, SplitsReasoning) {
  EXPECT_EQ(Parse("\nI think.\n</think>\n\nThe answer\n<|im_end|>", kThinking),
            (Parsed{"The answer\n", "I think.", {}}));
  EXPECT_EQ(Parse("cut off\n", kThinking), (Parsed{"", "cut off\n", {}}));
  EXPECT_EQ(Parse("a\n\nb</think>c", kThinking), (Parsed{"c", "a\n\nb", {}}));
  const OutputOptions hybrid{.parse_reasoning = true};
  EXPECT_EQ(Parse("\n<think>\nr\n</think>\n\nc", hybrid), (Parsed{"c", "r", {}}));
  EXPECT_EQ(Parse("no thought", hybrid), (Parsed{"no thought", "", {}}));
  EXPECT_EQ(Parse("lone </think> marker", hybrid), (Parsed{"lone </think> marker", "", {}}));
  // A thought may mention calls; they are not made.
  EXPECT_EQ(Parse("<tool_call>\n{\"name\": \"f\"}\n</tool_call></think>c", kThinking),
            (Parsed{"c", "<tool_call>\n{\"name\": \"f\"}\n</tool_call>", {}}));
  // Without parsing, thoughts stay in the content as they are, and calls in them are not made either.
  const OutputOptions raw{.starts_in_thought = true, .parse_tool_calls = true};
  EXPECT_EQ(
      Parse("r<tool_call>{\"name\":\"f\"}</tool_call>\n</think>\n\nc<tool_call>{\"name\":\"g\"}</tool_call>",
            raw),
      (Parsed{"r<tool_call>{\"name\":\"f\"}</tool_call>\n</think>\n\nc", "", {"g {}"}}));
}

TEST(OutputParser, TakesToolCalls) {
  EXPECT_EQ(Parse("t</think>\n\n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"x\":  "
                  "1.50e+2}}\n</tool_call><|im_end|>",
                  kThinking),
            (Parsed{"", "t", {"f {\"x\":  1.50e+2}"}}));
  EXPECT_EQ(Parse("Look:\n\n<tool_call>\n{\"name\": \"f\", \"arguments\": {}}\n</tool_call>\n<tool_call>\n"
                  "{\"arguments\": \"{}\", \"name\": \"g\"}\n</tool_call>\n\nBye ",
                  kTools),
            (Parsed{"Look:Bye ", "", {"f {}", "g {}"}}));
  EXPECT_EQ(Parse("<tool_call>{\"name\": \"f\"}</tool_call>\n\n", kTools), (Parsed{"", "", {"f {}"}}));
  // The closing tag may be missing: the next call, or the end, closes too.
  EXPECT_EQ(Parse("<tool_call>{\"name\": \"f\"}\n<tool_call>{\"name\": \"g\"}", kTools),
            (Parsed{"", "", {"f {}", "g {}"}}));
}

TEST(OutputParser, MalformedCallsBecomeContentWithTheirTags) {
  for (const std::string body : {"\n{\"name\": \"f\", \"arguments\": {\n", "{}", "[]", "{\"name\": 5}", "",
                                 "{\"name\": \"f\", \"arguments\": [1]}", "call f please", "\n{\"a\" 1}\n"}) {
    const std::string text = "a \n<tool_call>" + body + "</tool_call>\nb";
    EXPECT_EQ(Parse(text, kTools), (Parsed{text, "", {}}));
    const std::string unfinished = "a \n<tool_call>" + body;
    EXPECT_EQ(Parse(unfinished, kTools), (Parsed{unfinished, "", {}}));
  }
  EXPECT_EQ(Parse("<tool_call>oops</tool_call>\n<tool_call>{\"name\": \"g\"}</tool_call>", kTools),
            (Parsed{"<tool_call>oops</tool_call>", "", {"g {}"}}));
}

TEST(OutputParser, StopsAtStopStrings) {
  OutputOptions options = kThinking;
  options.stop = {"STOP", "\n\nObs"};
  EXPECT_EQ(Parse("r</think>abcSTOPdef", options), (Parsed{"abc", "r", {}, true}));
  EXPECT_EQ(Parse("reaSTOPson</think>x", options), (Parsed{"", "rea", {}, true}));
  EXPECT_EQ(Parse("r</think>abSTO", options), (Parsed{"abSTO", "r", {}, false}));
  EXPECT_EQ(Parse("r</think>ab\n\n\n\nObserve", options), (Parsed{"ab\n\n", "r", {}, true}));
  options.include_stop = true;
  EXPECT_EQ(Parse("r</think>abcSTOPdef", options), (Parsed{"abcSTOP", "r", {}, true}));
  OutputOptions raw = kTools;
  raw.stop = {"</tool_call>"};  // a marker can be a stop string; the call before it is whole
  EXPECT_EQ(Parse("a<tool_call>{\"name\": \"f\"}</tool_call>b", raw), (Parsed{"a", "", {"f {}"}, true}));
  raw.stop = {"_call>"};  // and what one leaves of a marker is text
  EXPECT_EQ(Parse("a<tool_call>{}", raw), (Parsed{"a<tool", "", {}, true}));
  raw.stop = {"", "é"};
  EXPECT_EQ(Parse("a\xC3", raw), (Parsed{"a\uFFFD", "", {}, false}));
  EXPECT_EQ(Parse("aébé", raw), (Parsed{"a", "", {}, true}));
}

TEST(OutputParser, NothingWaitsLongerThanItMust) {
  OutputOptions options;
  options.stop = {"xyz"};
  OutputParser parser(Pocket(), options);
  const auto push = [&](const std::string& text) {
    std::string out;
    for (const int32_t id : Pocket().Encode(text, ParseSpecial::kNone)) out += parser.Push(id).content;
    return out;
  };
  EXPECT_EQ(push("a"), "a");
  EXPECT_EQ(push("x"), "");
  EXPECT_EQ(push("y"), "");
  EXPECT_EQ(push("x"), "xy");
  EXPECT_EQ(push("b"), "xb");
}

TEST(StopStrings, FirstCompleteMatchWinsHoweverTheTextIsCut) {
  std::mt19937 random(1);
  for (int round = 0; round < 3000; ++round) {
    const auto word = [&](size_t longest) {
      std::string out(1 + random() % longest, ' ');
      for (char& c : out) c = static_cast<char>('a' + random() % 2);
      return out;
    };
    std::vector<std::string> strings(1 + random() % 3);
    for (std::string& string : strings) string = word(5);
    const std::string text = word(20);
    size_t first_end = std::string::npos, longest = 0;
    for (const std::string& string : strings) {
      const size_t at = text.find(string);
      if (at == std::string::npos) continue;
      const size_t end = at + string.size();
      if (end < first_end || (end == first_end && string.size() > longest)) longest = string.size();
      first_end = std::min(first_end, end);
    }
    StopStrings stops(strings);
    size_t found_end = std::string::npos, found_length = 0;
    for (size_t at = 0; at < text.size() && found_end == std::string::npos;) {
      const std::string piece = text.substr(at, 1 + random() % 4);
      const auto match = stops.Push(piece);
      if (match.found) {
        found_end = at + match.end;
        found_length = match.length;
      }
      at += piece.size();
    }
    ASSERT_EQ(found_end, first_end) << text;
    ASSERT_EQ(found_length, longest) << text;
  }
}

TEST(ToolCallJson, KeepsTheBytesOfArguments) {
  const auto arguments = [](std::string_view text) {
    const auto call = ParseToolCallJson(text);
    return call ? call->arguments : "none";
  };
  EXPECT_EQ(arguments(R"( {"name":"f", "arguments" :  {"a":"}\"\\", "b":[{},{"c":1}]}  , "x":1}  )"),
            R"({"a":"}\"\\", "b":[{},{"c":1}]})");
  EXPECT_EQ(arguments(R"({"\u0061rguments":{"k":1},"name":"f"})"), R"({"k":1})");
  EXPECT_EQ(arguments(R"({"name":"f","arguments":{"a":1},"arguments":{"a":2}})"), R"({"a":2})");
  EXPECT_EQ(arguments(R"({"name":"arguments","x":"arguments"})"), "{}");
  EXPECT_EQ(arguments("\xEF\xBB\xBF{\"name\":\"f\"}"), "none");
  EXPECT_EQ(arguments(std::string(1000, '[')), "none");
}

// What a model might write, and noise.
std::string RandomOutput(std::mt19937& random) {
  static const std::vector<std::string> kPieces = {"<tool_call>\n{\"name\": \"f\"}\n</tool_call>",
                                                   "<think>",
                                                   "</think>",
                                                   "<tool_call>",
                                                   "</tool_call>",
                                                   "{\"name\": \"f\", \"arguments\": {\"x\": \"é\"}}",
                                                   "{\"name\"",
                                                   "\n",
                                                   "\n\n",
                                                   " ",
                                                   "word",
                                                   "STOP",
                                                   "ST",
                                                   "é",
                                                   "\U0001F600",
                                                   "<|im_end|>",
                                                   "<tool_response>",
                                                   "}"};
  std::string text;
  for (unsigned i = random() % 25; i > 0; --i) text += kPieces[random() % kPieces.size()];
  return text;
}

// The same text in other tokens: ordinary ones cut into single bytes, here and there.
std::vector<int32_t> CutTokens(const std::vector<int32_t>& tokens, std::mt19937& random) {
  static const std::vector<int32_t>* bytes = [] {
    auto* ids = new std::vector<int32_t>(256, -1);
    for (int32_t id = 0; id < Pocket().vocab_size(); ++id) {
      const std::string_view text = Pocket().TokenBytes(id);
      if (text.size() == 1) (*ids)[static_cast<uint8_t>(text[0])] = id;
    }
    return ids;
  }();
  std::vector<int32_t> out;
  for (const int32_t token : tokens) {
    if (Pocket().IsAdded(token) || random() % 2 == 0) {
      out.push_back(token);
    } else {
      for (const char c : Pocket().TokenBytes(token)) out.push_back((*bytes)[static_cast<uint8_t>(c)]);
    }
  }
  return out;
}

TEST(OutputParser, TheCutOfTokensDoesNotMatter) {
  std::mt19937 random(2);
  int calls = 0, stops = 0;
  for (int round = 0; round < 5000; ++round) {
    const std::vector<int32_t> tokens = Pocket().Encode(RandomOutput(random), ParseSpecial::kAll);
    OutputOptions options;
    options.parse_reasoning = random() % 2 == 0;
    options.starts_in_thought = random() % 2 == 0;
    options.parse_tool_calls = random() % 2 == 0;
    options.include_stop = random() % 2 == 0;
    if (random() % 2 == 0) options.stop = {"STOP", "\n\nw", "call>"};
    const Parsed whole = ParseTokens(tokens, options);
    ASSERT_EQ(ParseTokens(CutTokens(tokens, random), options), whole);
    calls += !whole.calls.empty();
    stops += whole.stopped;
  }
  EXPECT_GT(calls, 50);
  EXPECT_GT(stops, 500);
}

TEST(OutputParser, AnyTokensGiveValidTextAndNoneIsLost) {
  std::mt19937 random(3);
  for (int round = 0; round < 2000; ++round) {
    std::vector<int32_t> tokens(random() % 40);
    for (int32_t& token : tokens) {
      token = static_cast<int32_t>(random() % 4 == 0 ? 2000 + random() % 40 : random() % 2000);
    }
    EXPECT_EQ(ParseTokens(tokens, kPlain), (Parsed{Pocket().Decode(tokens, true), "", {}}));
    (void)ParseTokens(tokens, kThinking);  // ParseTokens checks every piece
    (void)ParseTokens(tokens, kTools);
  }
}

}  // namespace
}  // namespace triaxial
