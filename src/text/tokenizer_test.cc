#include "text/tokenizer.h"

#include <gtest/gtest.h>
#include <utf8proc.h>

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <random>
#include <thread>

#include "base/file.h"
#include "base/json.h"
#include "text/bpe.h"
#include "text/pre_tokenizer.h"
#include "text/utf8.h"

namespace triaxial {
namespace {

const Tokenizer& Pocket() {
  static const Tokenizer* tokenizer = [] {
    auto loaded = Tokenizer::Load("models/pocket-agent");
    if (!loaded.ok()) ADD_FAILURE() << loaded.status().message();
    return new Tokenizer(std::move(loaded).value());
  }();
  return *tokenizer;
}

std::string RandomBytes(std::mt19937& random, size_t size) {
  std::string bytes(size, ' ');
  for (char& c : bytes) c = static_cast<char>(random());
  return bytes;
}

// Characters that are hard on the steps before the merges: marks, Hangul, markup, spaces of all kinds.
std::string RandomText(std::mt19937& random, size_t characters) {
  static const std::vector<std::string> kAlphabet = {
      "a",      "Z",      "e",      "1",          " ",      "\n",          "\r\n",       "\t",
      "'s",     "'LL",    ".",      "<",          "é",      "\u0301",      "\u0323",     "\u0338",
      "\u1100", "\u1161", "\u11A8", "\uAC00",     "中",     "\u212B",      "\u2126",     "\u3000",
      "\u00A0", "\u180E", "\u0345", "\U0001F600", "\u017F", "<tool_call>", "<|im_end|>", "\uFB01"};
  std::string text;
  for (size_t i = 0; i < characters; ++i) text += kAlphabet[random() % kAlphabet.size()];
  return text;
}

std::string Utf8ProcNfc(const std::string& text) {
  utf8proc_uint8_t* out = nullptr;
  const auto size = utf8proc_map(reinterpret_cast<const utf8proc_uint8_t*>(text.data()),
                                 static_cast<utf8proc_ssize_t>(text.size()), &out,
                                 static_cast<utf8proc_option_t>(UTF8PROC_STABLE | UTF8PROC_COMPOSE));
  EXPECT_GE(size, 0);
  std::string result(reinterpret_cast<char*>(out), static_cast<size_t>(size));
  std::free(out);
  return result;
}

TEST(Utf8, ReplacesMaximalSubparts) {
  EXPECT_EQ(ToValidUtf8("abc"), "abc");
  EXPECT_EQ(ToValidUtf8("a\xFFz"), "a\uFFFDz");
  EXPECT_EQ(ToValidUtf8("\xE4\xB8z"), "\uFFFDz");                // a cut character is one replacement
  EXPECT_EQ(ToValidUtf8("\xC0\xAF"), "\uFFFD\uFFFD");            // overlong
  EXPECT_EQ(ToValidUtf8("\xED\xA0\x80"), "\uFFFD\uFFFD\uFFFD");  // a surrogate
  EXPECT_EQ(ToValidUtf8("\xF0\x9F\x98"), "\uFFFD");
  EXPECT_EQ(ToValidUtf8("\xF4\x90\x80\x80"), "\uFFFD\uFFFD\uFFFD\uFFFD");  // beyond U+10FFFF
}

TEST(Utf8, NfcIsThatOfTheLibrary) {
  EXPECT_EQ(ToNfc("e\u0301"), "é");
  EXPECT_EQ(ToNfc("\u212B"), "Å");
  EXPECT_EQ(ToNfc("<\u0338"), "\u226E");
  EXPECT_EQ(ToNfc("\u1100\u1161\u11A8"), "\uAC01");
  std::mt19937 random(1);
  for (int i = 0; i < 3000; ++i) {
    const std::string text = RandomText(random, 1 + random() % 40);
    ASSERT_EQ(ToNfc(text), Utf8ProcNfc(text));
  }
  for (uint32_t c = 0x80; c < 0x30000; ++c) {
    if (c >= 0xD800 && c < 0xE000) continue;
    utf8proc_uint8_t encoded[4];
    const auto length = utf8proc_encode_char(static_cast<utf8proc_int32_t>(c), encoded);
    const std::string character(reinterpret_cast<char*>(encoded), static_cast<size_t>(length));
    const std::string text = "a" + character + "\u0301" + character;
    ASSERT_EQ(ToNfc(text), Utf8ProcNfc(text)) << std::hex << c;
  }
}

TEST(Utf8, ManyMarksInTheWrongOrderAreNotQuadratic) {
  std::string text = "a", sorted = "a";
  constexpr int kMarks = 200000;  // an insertion sort would swap 4e10 times
  for (int i = 0; i < kMarks; ++i) text += "\u0304";
  for (int i = 0; i < kMarks; ++i) text += "\u0323";
  const std::string nfc = ToNfc(text);
  EXPECT_TRUE(nfc.starts_with("\u1EA1\u0323"));  // a with dot below, then the other dots
  EXPECT_TRUE(nfc.ends_with("\u0304\u0304"));
}

TEST(Utf8Stream, NeverEndsInsideACharacter) {
  std::mt19937 random(2);
  for (int i = 0; i < 2000; ++i) {
    const std::string bytes = i % 2 == 0 ? RandomBytes(random, random() % 20) : RandomText(random, 10);
    Utf8Stream stream;
    std::string out;
    for (size_t at = 0; at < bytes.size();) {
      const size_t n = 1 + random() % 3;
      const std::string piece = stream.Push(std::string_view(bytes).substr(at, n));
      EXPECT_EQ(piece, ToValidUtf8(piece));
      out += piece;
      at += n;
    }
    out += stream.Finish();
    EXPECT_EQ(out, ToValidUtf8(bytes));
  }
}

TEST(Utf8Stream, WaitsForTheRestOfACharacterAndNotLonger) {
  Utf8Stream stream;
  EXPECT_EQ(stream.Push("x\xF0\x9F"), "x");
  EXPECT_EQ(stream.Push("\x98"), "");
  EXPECT_EQ(stream.Push("\x80y"), "\U0001F600y");
  EXPECT_EQ(stream.Push("\xE4"), "");
  EXPECT_EQ(stream.Push("a"), "\uFFFDa");
  EXPECT_EQ(stream.Push("\xE4\xB8"), "");
  EXPECT_EQ(stream.Finish(), "\uFFFD");
  EXPECT_EQ(stream.Finish(), "");
}

// Merges by the definition: the pair of lowest rank, leftmost, until there is none.
std::vector<int32_t> MergeByDefinition(std::string_view text, const std::vector<Merge>& merges) {
  std::vector<int32_t> ids;
  for (const char c : text) ids.push_back(static_cast<uint8_t>(c));
  for (;;) {
    size_t best_rank = merges.size(), best = 0;
    for (size_t i = 0; i + 1 < ids.size(); ++i) {
      for (size_t rank = 0; rank < best_rank; ++rank) {
        if (merges[rank].left == ids[i] && merges[rank].right == ids[i + 1]) {
          best_rank = rank;
          best = i;
        }
      }
    }
    if (best_rank == merges.size()) return ids;
    ids[best] = merges[best_rank].result;
    ids.erase(ids.begin() + static_cast<std::ptrdiff_t>(best) + 1);
  }
}

TEST(Bpe, ShortAndLongPiecesFollowTheDefinition) {
  std::array<int32_t, 256> bytes;
  for (int i = 0; i < 256; ++i) bytes[static_cast<size_t>(i)] = i;
  std::mt19937 random(3);
  for (int round = 0; round < 200; ++round) {
    std::vector<Merge> merges;
    for (int i = 0; i < 12; ++i) {
      const auto pick = [&] {
        const auto n = static_cast<uint32_t>(2 + merges.size());
        const uint32_t k = random() % n;
        return k < 2 ? static_cast<int32_t>('a' + k) : static_cast<int32_t>(254 + k);
      };
      const Merge merge{pick(), pick(), 256 + i};
      if (std::none_of(merges.begin(), merges.end(),
                       [&](const Merge& m) { return m.left == merge.left && m.right == merge.right; })) {
        merges.push_back({merge.left, merge.right, static_cast<int32_t>(256 + merges.size())});
      }
    }
    const Bpe bpe(bytes, merges);
    for (const size_t size : {1u, 2u, 7u, 30u, 60u, 200u}) {
      std::string text(size, ' ');
      for (char& c : text) c = static_cast<char>('a' + random() % 2);
      std::vector<int32_t> ids;
      bpe.Append(text, &ids);
      ASSERT_EQ(ids, MergeByDefinition(text, merges)) << text;
    }
  }
}

// Patterns that exhaust stack and step limits: the text must come out whole, in little time.
TEST(PreTokenizer, LimitsOfTheRegexEngineLoseNothing) {
  for (const std::string pattern : {"(?:(a)|(b))+", "(?:a|aa)+[cd]", "x*", "[]\\s]\\S"}) {
    const auto compiled = PreTokenizer::Compile(pattern, "test");
    ASSERT_TRUE(compiled.ok()) << compiled.status().message();
    for (const std::string& text :
         {std::string(100000, 'a'), std::string(100000, 'a') + "cab", std::string()}) {
      PreTokenizer::Splitter splitter(*compiled, text);
      std::string joined;
      for (std::string_view piece; splitter.Next(&piece);) {
        ASSERT_FALSE(piece.empty());
        joined += piece;
      }
      EXPECT_EQ(joined, text);
    }
  }
}

// This pattern needs more stack than the machine code has; the interpreter does it.
TEST(PreTokenizer, TheInterpreterTakesOver) {
  const auto compiled = PreTokenizer::Compile("(?:(a)|(b))+", "test");
  ASSERT_TRUE(compiled.ok());
  const std::string text = std::string(50000, 'a') + "cab";
  PreTokenizer::Splitter splitter(*compiled, text);
  std::vector<size_t> sizes;
  for (std::string_view piece; splitter.Next(&piece);) sizes.push_back(piece.size());
  EXPECT_EQ(sizes, (std::vector<size_t>{50000, 1, 2}));
}

// \s is White_Space: PCRE2's own would take U+180E too and join it with the spaces.
TEST(PreTokenizer, SpacesAreThoseOfUnicode) {
  const auto compiled = PreTokenizer::Compile("\\s+|[^\\s]+", "test");
  ASSERT_TRUE(compiled.ok());
  PreTokenizer::Splitter splitter(*compiled, "a\u3000\u0085\n \u180E");
  std::vector<std::string> pieces;
  for (std::string_view piece; splitter.Next(&piece);) pieces.emplace_back(piece);
  EXPECT_EQ(pieces, (std::vector<std::string>{"a", "\u3000\u0085\n ", "\u180E"}));
}

TEST(Tokenizer, EncodesWhatItDecodes) {
  std::mt19937 random(4);
  for (int i = 0; i < 500; ++i) {
    const std::string text = RandomText(random, random() % 60);
    EXPECT_EQ(Pocket().Decode(Pocket().Encode(text, ParseSpecial::kNone), false), Pocket().Normalize(text));
  }
}

TEST(Tokenizer, RandomBytesBecomeTheirReplacement) {
  std::mt19937 random(5);
  for (int i = 0; i < 500; ++i) {
    const std::string bytes = RandomBytes(random, random() % 200);
    EXPECT_EQ(Pocket().Decode(Pocket().Encode(bytes, ParseSpecial::kAll), false), ToNfc(ToValidUtf8(bytes)));
  }
  EXPECT_EQ(Pocket().Encode("\xFF", ParseSpecial::kNone), Pocket().Encode("\uFFFD", ParseSpecial::kNone));
}

TEST(Tokenizer, AddedTokensAreFoundAsAsked) {
  const std::string text = "a<tool_call>b<|im_end|></tool_call><|im_end";
  const auto count = [&](ParseSpecial special) {
    int added = 0;
    for (const int32_t id : Pocket().Encode(text, special)) added += Pocket().IsAdded(id);
    return added;
  };
  EXPECT_EQ(count(ParseSpecial::kNone), 0);
  EXPECT_EQ(count(ParseSpecial::kMarkup), 2);
  EXPECT_EQ(count(ParseSpecial::kAll), 3);
  const int32_t im_end = Pocket().AddedId("<|im_end|>");
  ASSERT_GE(im_end, 0);
  EXPECT_TRUE(Pocket().IsSpecial(im_end));
  EXPECT_FALSE(Pocket().IsSpecial(Pocket().AddedId("<tool_call>")));
  EXPECT_EQ(Pocket().AddedId("<nothing>"), -1);
  EXPECT_EQ(Pocket().Decode(Pocket().Encode(text, ParseSpecial::kAll), true),
            "a<tool_call>b</tool_call><|im_end");
  EXPECT_EQ(Pocket().TokenBytes(im_end), "<|im_end|>");
  EXPECT_EQ(Pocket().TokenBytes(-1), "");
  EXPECT_EQ(Pocket().TokenBytes(1 << 30), "");
  EXPECT_FALSE(Pocket().IsAdded(-5));
}

TEST(Tokenizer, HostileLengthsStayFast) {
  // Each of them took minutes or failed in some tokenizer: no quadratic merge, no limit of the regex engine.
  const auto start = std::chrono::steady_clock::now();
  for (const std::string& unit : {std::string("a"), std::string(" "), std::string("\n"), std::string("\n "),
                                  std::string("!"), std::string("\u0301"), std::string("中")}) {
    std::string text;
    while (text.size() < (1 << 20)) text += unit;
    EXPECT_EQ(Pocket().Decode(Pocket().Encode(text, ParseSpecial::kAll), false), Pocket().Normalize(text));
    text += "x";
    EXPECT_EQ(Pocket().Decode(Pocket().Encode(text, ParseSpecial::kAll), false), Pocket().Normalize(text));
  }
  const std::chrono::duration<double> elapsed = std::chrono::steady_clock::now() - start;
  EXPECT_LT(elapsed.count(), 60) << "a hostile text of one megabyte may not take minutes";
}

TEST(Tokenizer, ManyThreadsShareOne) {
  std::mt19937 random(6);
  std::vector<std::string> texts;
  std::vector<std::vector<int32_t>> expected;
  for (int i = 0; i < 50; ++i) {
    texts.push_back(RandomText(random, 100));
    expected.push_back(Pocket().Encode(texts.back(), ParseSpecial::kAll));
  }
  std::vector<int> wrong(4, 0);
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&, t] {
      for (size_t i = 0; i < texts.size(); ++i) {
        wrong[static_cast<size_t>(t)] += Pocket().Encode(texts[i], ParseSpecial::kAll) != expected[i];
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  for (const int n : wrong) EXPECT_EQ(n, 0);
}

// The pocket agent's file with one change, and a word that the error must contain.
TEST(Tokenizer, ErrorsNameFileAndReason) {
  const Result<Json> good = ReadJsonFile("models/pocket-agent/tokenizer.json");
  ASSERT_TRUE(good.ok());
  const auto error_of = [&](const auto& change) {
    Json json = *good;
    change(json);
    const auto result = Tokenizer::FromJson(json.dump(), "dir/tokenizer.json");
    EXPECT_FALSE(result.ok());
    if (result.ok()) return std::string();
    EXPECT_NE(result.status().message().find("dir/tokenizer.json"), std::string::npos);
    return result.status().message();
  };
  const auto expect = [&](const std::string& word, const auto& change) {
    const std::string message = error_of(change);
    EXPECT_NE(message.find(word), std::string::npos) << message;
  };
  expect("normalizer", [](Json& j) { j["normalizer"]["type"] = "NFKC"; });
  expect("pre_tokenizer", [](Json& j) { j["pre_tokenizer"]["pretokenizers"][0]["behavior"] = "Removed"; });
  expect("pre_tokenizer", [](Json& j) { j["pre_tokenizer"] = 3; });
  expect("regular expression",
         [](Json& j) { j["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "(("; });
  expect("Unigram", [](Json& j) { j["model"]["type"] = "Unigram"; });
  expect("byte_fallback", [](Json& j) { j["model"]["byte_fallback"] = true; });
  expect("vocab", [](Json& j) { j["model"]["vocab"] = Json::array(); });
  expect("malformed", [](Json& j) { j["model"]["vocab"]["\u4e2d"] = 1999; });
  expect("malformed", [](Json& j) { j["model"]["vocab"]["zzzzz"] = "7"; });
  expect("two tokens", [](Json& j) { j["model"]["vocab"]["zzzzz"] = 7; });
  expect("outside", [](Json& j) { j["model"]["vocab"]["zzzzz"] = int64_t{1} << 40; });
  expect("outside", [](Json& j) { j["model"]["vocab"]["zzzzz"] = -1; });
  expect("byte", [](Json& j) { j["model"]["vocab"].erase("!"); });
  expect("merges[3]", [](Json& j) { j["model"]["merges"][3] = "zq zq"; });
  expect("merges[3]", [](Json& j) { j["model"]["merges"][3] = 5; });
  expect("merges", [](Json& j) { j["model"].erase("merges"); });
  expect("lstrip", [](Json& j) { j["added_tokens"][2]["lstrip"] = true; });
  expect("added_tokens[2]", [](Json& j) { j["added_tokens"][2].erase("id"); });
  expect("pre_tokenizer", [](Json& j) { j = 5; });
}

TEST(Tokenizer, ReadsBothSpellingsOfMerges) {
  Result<Json> json = ReadJsonFile("models/pocket-agent/tokenizer.json");
  ASSERT_TRUE(json.ok());
  for (Json& merge : (*json)["model"]["merges"]) {
    const std::string text = merge.get<std::string>();
    const size_t space = text.find(' ');
    merge = Json::array({text.substr(0, space), text.substr(space + 1)});
  }
  const auto tokenizer = Tokenizer::FromJson(json->dump(), "pairs");
  ASSERT_TRUE(tokenizer.ok()) << tokenizer.status().message();
  const std::string text = "The confirm button is GOLD-1; see the desktop, please.\n";
  EXPECT_EQ(tokenizer->Encode(text, ParseSpecial::kAll), Pocket().Encode(text, ParseSpecial::kAll));
}

TEST(Tokenizer, TruncatedOrDamagedFilesAreRefusedNotFatal) {
  const Result<std::string> file = ReadFile("models/pocket-agent/tokenizer.json", 1 << 20);
  ASSERT_TRUE(file.ok());
  std::mt19937 random(7);
  for (int i = 0; i < 30; ++i) {
    std::string damaged = file->substr(0, random() % file->size());
    EXPECT_FALSE(Tokenizer::FromJson(damaged, "x").ok());
    damaged = *file;
    for (int k = 0; k < 5; ++k) damaged[random() % damaged.size()] = static_cast<char>(random());
    (void)Tokenizer::FromJson(damaged, "x");  // either way, no crash
  }
  EXPECT_EQ(Tokenizer::Load("no/such/directory").status().code(), Code::kNotFound);
}

}  // namespace
}  // namespace triaxial
