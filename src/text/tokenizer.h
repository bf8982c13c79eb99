// Byte-level BPE as stored in tokenizer.json (Qwen2 family): NFC, added tokens, regex pre-tokenizer, merges
// by rank.
#ifndef TRIAXIAL_TEXT_TOKENIZER_H_
#define TRIAXIAL_TEXT_TOKENIZER_H_

#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"

namespace triaxial {

// Which added tokens are recognized in the text; everything else is ordinary text.
enum class ParseSpecial {
  kNone,    // text from users and tools: data
  kMarkup,  // added tokens whose "special" flag is false: <tool_call>, <think>, ...
  kAll,     // raw completion prompts
};

class Tokenizer {
 public:
  // Reads directory/tokenizer.json. Errors name the file and what is unsupported or malformed.
  static Result<Tokenizer> Load(const std::string& directory);
  // The same from the parts of a published vocabulary: used by tests on the full Qwen vocabulary.
  static Result<Tokenizer> FromJson(std::string_view tokenizer_json, std::string_view what);
  Tokenizer(Tokenizer&&) noexcept;
  Tokenizer& operator=(Tokenizer&&) noexcept;
  ~Tokenizer();

  // Token ids of UTF-8 text; bytes that are not UTF-8 are encoded as U+FFFD. Thread-safe, as every const
  // member is.
  std::vector<int32_t> Encode(std::string_view text, ParseSpecial special) const;
  void Append(std::string_view text, ParseSpecial special, std::vector<int32_t>* ids) const;

  // The steps of Append, for a caller that must know which bytes a token stands for. Normalize makes the text
  // valid UTF-8 in normal form C; AppendNormalized encodes such text without looking for added tokens, and
  // the bytes of the ids that it appends concatenate to exactly that text.
  std::string Normalize(std::string_view text) const;
  void AppendNormalized(std::string_view normalized, std::vector<int32_t>* ids) const;
  struct AddedMatch {
    size_t begin = std::string_view::npos;  // npos: there is none
    size_t end = std::string_view::npos;
    int32_t id = -1;
  };
  // The first added token at or after `from` that `special` recognizes; the longest one at its place.
  AddedMatch FindAdded(std::string_view text, size_t from, ParseSpecial special) const;

  // Bytes of one token: for added tokens their text; "" for ids without an entry. Bytes of consecutive tokens
  // concatenate to the text; a single token may hold half a character.
  std::string_view TokenBytes(int32_t id) const;
  // Whole text; incomplete UTF-8 becomes U+FFFD. skip_special drops added tokens whose "special" flag is
  // true.
  std::string Decode(const std::vector<int32_t>& ids, bool skip_special) const;

  bool IsAdded(int32_t id) const;
  bool IsSpecial(int32_t id) const;  // added, with the "special" flag
  // Id of an added token by its exact text, or -1.
  int32_t AddedId(std::string_view content) const;
  int32_t vocab_size() const;  // one past the largest id

 private:
  struct Impl;
  explicit Tokenizer(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

// Turns a stream of byte pieces into text that never ends inside a UTF-8 character: what is incomplete waits
// for the next piece; what can never become valid is replaced by U+FFFD.
class Utf8Stream {
 public:
  std::string Push(std::string_view bytes);
  std::string Finish();  // what is left, with U+FFFD for an incomplete character

 private:
  std::string pending_;
};

}  // namespace triaxial

#endif  // TRIAXIAL_TEXT_TOKENIZER_H_
