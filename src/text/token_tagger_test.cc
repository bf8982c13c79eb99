#include "text/token_tagger.h"

#include <gtest/gtest.h>

#include <random>

namespace triaxial {
namespace {

const Tokenizer& Pocket() {
  static const Tokenizer* tokenizer =
      new Tokenizer(std::move(Tokenizer::Load("models/pocket-agent")).value());
  return *tokenizer;
}

const char* Letter(Semantic semantic) {
  static const char* kLetters[] = {"i", "u", "a", "r", "t", "o", "."};
  return kLetters[static_cast<int>(semantic)];
}

// One letter per token, and the turn where it changes.
std::string Scan(const std::string& text) {
  const std::vector<int32_t> tokens = Pocket().Encode(text, ParseSpecial::kAll);
  std::string out;
  int32_t at = 0, turn = 0;
  for (const TagSpan& span : ScanSpans(tokens, FindMarkup(Pocket()))) {
    EXPECT_EQ(span.begin, at);
    EXPECT_GT(span.end, span.begin);
    EXPECT_EQ(span.message, -1);
    at = span.end;
    if (span.turn != turn) out += std::to_string(turn = span.turn);
    for (int32_t i = span.begin; i < span.end; ++i) {
      out += span.modal == Modal::kImage ? "I" : Letter(span.semantic);
    }
  }
  EXPECT_EQ(at, static_cast<int32_t>(tokens.size()));
  return out;
}

TEST(ScanSpans, RawTextIsTheUsers) {
  EXPECT_EQ(Scan(""), "");
  EXPECT_EQ(Scan("x\n\ny"), "uuu");
}

TEST(ScanSpans, FollowsTheMarkup) {
  EXPECT_EQ(Scan("<|im_start|>system\nx<tool_call><|im_end|>\n"), "...ii..");
  EXPECT_EQ(Scan("<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n<think>\nx\n</think>\n\nx"
                 "\n<tool_call>\nx\n</tool_call><|im_end|>\n"),
            "...u.."
            "...."
            ".r..."
            "a.."
            ".t.."
            "..");
  EXPECT_EQ(Scan("<|im_start|>user\nx<|im_end|>\n<|im_start|>user\n<tool_response>\nx\n</tool_response>\n"
                 "<tool_response>\n<|vision_start|><|image_pad|><|image_pad|><|vision_end|>\n</tool_response>"
                 "<|im_end|>\n<|im_start|>user\nx"),
            "...u..1.....o......II.....2...u");
  EXPECT_EQ(Scan("<|im_start|>user"), "..");
  EXPECT_EQ(Scan("<|im_start|>"), ".");
  EXPECT_EQ(Scan("x<|im_end|>\nx"), "u..u");
}

TEST(ScanSpans, AThoughtMayTalkAboutCalls) {
  EXPECT_EQ(Scan("<|im_start|>assistant\n<think>\nx<tool_call>x</tool_call>x</think>\n\nx"),
            "....."
            "r.r.r"
            "..a");
}

TEST(ScanSpans, CoversAnyTokens) {
  std::mt19937 random(1);
  const MarkupIds markup = FindMarkup(Pocket());
  for (int i = 0; i < 3000; ++i) {
    std::vector<int32_t> tokens(random() % 40);
    for (int32_t& token : tokens) {
      token = random() % 2 == 0 ? static_cast<int32_t>(2000 + random() % 26)
                                : static_cast<int32_t>(random() % 2000);
      if (random() % 20 == 0) token = static_cast<int32_t>(random());
    }
    // A vocabulary without markup must not take -1 for it.
    for (const MarkupIds& ids : {markup, MarkupIds()}) {
      int32_t at = 0;
      for (const TagSpan& span : ScanSpans(tokens, ids)) {
        ASSERT_EQ(span.begin, at);
        ASSERT_GT(span.end, span.begin);
        at = span.end;
        if (ids.im_start < 0) {
          ASSERT_EQ(span.semantic, Semantic::kUser);
        }
      }
      ASSERT_EQ(at, static_cast<int32_t>(tokens.size()));
    }
  }
}

TEST(GenerationTagger, TellsThoughtsCallsAndAnswersApart) {
  const auto tag = [](const std::string& text, bool starts_in_thought) {
    GenerationTagger tagger(FindMarkup(Pocket()), starts_in_thought);
    std::string out;
    for (const int32_t token : Pocket().Encode(text, ParseSpecial::kAll)) out += Letter(tagger.Next(token));
    return out;
  };
  EXPECT_EQ(tag("x\n</think>\n\nx\n<tool_call>\nx\n</tool_call><|im_end|>", true), "rr..aa..tt..");
  EXPECT_EQ(tag("x<think>\nx</think>x", false), "a..r.a");
  EXPECT_EQ(tag("x<tool_call>x", true), "r.r");
  EXPECT_EQ(tag("<tool_call>x<think>x</tool_call>x", false), ".t.t.a");
}

}  // namespace
}  // namespace triaxial
