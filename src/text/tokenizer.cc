#include "text/tokenizer.h"

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>
#include <unordered_map>

#include "base/file.h"
#include "text/bpe.h"
#include "text/pre_tokenizer.h"
#include "text/utf8.h"

namespace triaxial {
namespace {

// A sorted map: the project's own Json keeps the order of keys by searching them one by one, which 150,000
// vocabulary entries would make slow.
using SortedJson = nlohmann::json;

constexpr int64_t kMaxTokenId = 1 << 22;

// The member `key` of an object, or null for anything else.
const SortedJson& Get(const SortedJson& object, const char* key) {
  static const SortedJson kNull;
  if (!object.is_object()) return kNull;
  const auto it = object.find(key);
  return it == object.end() ? kNull : *it;
}

std::string StringOf(const SortedJson& value) {
  return value.is_string() ? value.get<std::string>() : std::string();
}
bool IsTrue(const SortedJson& value) { return value.is_boolean() && value.get<bool>(); }

// GPT-2's alphabet: printable bytes of Latin-1 stand for themselves, the rest for U+0100, U+0101, ...
// Byte by character, -1 for what is not in it.
constexpr int kAlphabetEnd = 0x144;
const std::array<int16_t, kAlphabetEnd>& ByteAlphabet() {
  static const auto alphabet = [] {
    std::array<int16_t, kAlphabetEnd> bytes;
    bytes.fill(-1);
    int next = 0x100;
    for (int byte = 0; byte < 256; ++byte) {
      const bool printable = (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE;
      bytes[static_cast<size_t>(printable ? byte : next++)] = static_cast<int16_t>(byte);
    }
    return bytes;
  }();
  return alphabet;
}

// False if a character is not of the alphabet. The JSON parser vouches for UTF-8.
bool FromByteAlphabet(std::string_view token, std::string* bytes) {
  bytes->clear();
  for (size_t i = 0; i < token.size(); ++i) {
    int character = static_cast<uint8_t>(token[i]);
    if (character >= 0xE0 || (character >= 0x80 && i + 1 == token.size())) return false;
    if (character >= 0x80) character = (character & 0x1F) << 6 | (token[++i] & 0x3F);
    if (character >= kAlphabetEnd || ByteAlphabet()[static_cast<size_t>(character)] < 0) return false;
    bytes->push_back(static_cast<char>(ByteAlphabet()[static_cast<size_t>(character)]));
  }
  return true;
}

std::string Quoted(const std::string& text) { return "'" + ToValidUtf8(text) + "'"; }

}  // namespace

struct Tokenizer::Impl {
  struct Added {
    std::string content;
    int32_t id = -1;
    bool special = false;
  };

  std::vector<std::string> bytes;  // by id
  std::vector<Added> added;        // longest first
  std::vector<int8_t> added_kind;  // by id: 0 ordinary, 1 added, 2 special
  std::array<bool, 256> starts_added{};
  bool nfc = false;
  PreTokenizer pre_tokenizer;
  Bpe bpe;

  // Each reads its part of tokenizer.json.
  Status ReadNormalizer(const SortedJson& json, const std::string& what);
  Status ReadPreTokenizer(const SortedJson& json, const std::string& what);
  Status ReadModel(const SortedJson& json, const std::string& what);
  Status ReadAddedTokens(const SortedJson& json, const std::string& what);

  // The vocabulary may name an id once; an added token may repeat one of the vocabulary.
  Status SetBytes(int64_t id, std::string token, bool is_added, const std::string& what) {
    if (id < 0 || id >= kMaxTokenId) {
      return InvalidArgument(what + ": token " + Quoted(token) + " has id " + std::to_string(id) +
                             ", outside 0.." + std::to_string(kMaxTokenId - 1));
    }
    const auto at = static_cast<size_t>(id);
    if (bytes.size() <= at) bytes.resize(at + 1);
    if (!is_added && !bytes[at].empty()) {
      return InvalidArgument(what + ": model.vocab gives id " + std::to_string(id) + " to two tokens");
    }
    bytes[at] = std::move(token);
    return OkStatus();
  }
  bool Has(int32_t id) const { return id >= 0 && static_cast<size_t>(id) < bytes.size(); }
  int8_t KindOf(int32_t id) const {
    return id >= 0 && static_cast<size_t>(id) < added_kind.size() ? added_kind[static_cast<size_t>(id)]
                                                                  : int8_t{0};
  }
};

Status Tokenizer::Impl::ReadNormalizer(const SortedJson& json, const std::string& what) {
  if (json.is_null()) return OkStatus();
  const std::string type = StringOf(Get(json, "type"));
  if (type != "NFC") {
    return InvalidArgument(what + ": normalizer.type is " + Quoted(type) + "; NFC and none are supported");
  }
  nfc = true;
  return OkStatus();
}

Status Tokenizer::Impl::ReadPreTokenizer(const SortedJson& json, const std::string& what) {
  const SortedJson& steps = Get(json, "pretokenizers");
  const SortedJson& split = steps.is_array() && steps.size() == 2 ? steps[0] : SortedJson();
  const SortedJson& bytes_step = steps.is_array() && steps.size() == 2 ? steps[1] : SortedJson();
  const SortedJson& regex = Get(Get(split, "pattern"), "Regex");
  if (StringOf(Get(json, "type")) != "Sequence" || StringOf(Get(split, "type")) != "Split" ||
      !regex.is_string() || StringOf(Get(split, "behavior")) != "Isolated" || IsTrue(Get(split, "invert")) ||
      StringOf(Get(bytes_step, "type")) != "ByteLevel" || IsTrue(Get(bytes_step, "add_prefix_space")) ||
      IsTrue(Get(bytes_step, "use_regex"))) {
    return InvalidArgument(what +
                           ": the pre_tokenizer is not the one of Qwen2 (a Sequence of Split by a regular "
                           "expression, isolated, and ByteLevel without prefix space and regex)");
  }
  ASSIGN_OR_RETURN(pre_tokenizer, PreTokenizer::Compile(regex.get<std::string>(), what));
  return OkStatus();
}

Status Tokenizer::Impl::ReadModel(const SortedJson& json, const std::string& what) {
  const std::string type = StringOf(Get(json, "type"));
  if (type != "BPE" && !(type.empty() && json.is_object())) {
    return InvalidArgument(what + ": model.type is " + Quoted(type) + "; BPE is supported");
  }
  for (const char* flag : {"byte_fallback", "ignore_merges"}) {
    if (IsTrue(Get(json, flag))) return InvalidArgument(what + ": model." + flag + " is not supported");
  }
  for (const char* affix : {"continuing_subword_prefix", "end_of_word_suffix"}) {
    if (!StringOf(Get(json, affix)).empty()) {
      return InvalidArgument(what + ": model." + affix + " is not supported");
    }
  }

  const SortedJson& vocab = Get(json, "vocab");
  if (!vocab.is_object() || vocab.empty()) {
    return InvalidArgument(what + ": model.vocab is not an object of tokens and ids");
  }
  std::unordered_map<std::string_view, int32_t> ids;  // by the token as written in the file
  ids.reserve(vocab.size());
  std::array<int32_t, 256> byte_ids;
  byte_ids.fill(-1);
  for (const auto& [token, id] : vocab.items()) {
    std::string token_bytes;
    if (!id.is_number_integer() || token.empty() || !FromByteAlphabet(token, &token_bytes)) {
      return InvalidArgument(what + ": model.vocab has a malformed entry " + Quoted(token));
    }
    const int64_t number = id.get<int64_t>();
    if (token_bytes.size() == 1) {
      byte_ids[static_cast<uint8_t>(token_bytes[0])] = static_cast<int32_t>(number);
    }
    RETURN_IF_ERROR(SetBytes(number, std::move(token_bytes), /*is_added=*/false, what));
    ids.emplace(token, static_cast<int32_t>(number));
  }
  for (size_t byte = 0; byte < byte_ids.size(); ++byte) {
    if (byte_ids[byte] < 0) {
      return InvalidArgument(what + ": model.vocab has no token for the byte " + std::to_string(byte));
    }
  }

  const SortedJson& list = Get(json, "merges");
  if (!list.is_array()) return InvalidArgument(what + ": model.merges is not an array");
  std::vector<Merge> merges;
  merges.reserve(list.size());
  for (size_t i = 0; i < list.size(); ++i) {
    std::string left, right;
    if (const SortedJson& entry = list[i]; entry.is_string()) {
      const std::string& text = entry.get_ref<const std::string&>();
      const size_t space = text.find(' ');
      left = text.substr(0, space);
      if (space != std::string::npos) right = text.substr(space + 1);
    } else if (entry.is_array() && entry.size() == 2) {
      left = StringOf(entry[0]);
      right = StringOf(entry[1]);
    }
    const auto a = ids.find(left), b = ids.find(right), merged = ids.find(left + right);
    if (a == ids.end() || b == ids.end() || merged == ids.end()) {
      return InvalidArgument(what + ": model.merges[" + std::to_string(i) +
                             "] is not a pair of tokens that the vocabulary has, merged, as well");
    }
    merges.push_back({a->second, b->second, merged->second});
  }
  bpe = Bpe(byte_ids, merges);
  return OkStatus();
}

Status Tokenizer::Impl::ReadAddedTokens(const SortedJson& json, const std::string& what) {
  if (json.is_null()) return OkStatus();
  if (!json.is_array()) return InvalidArgument(what + ": added_tokens is not an array");
  for (size_t i = 0; i < json.size(); ++i) {
    const std::string where = what + ": added_tokens[" + std::to_string(i) + "]";
    const SortedJson& entry = json[i];
    const SortedJson& id = Get(entry, "id");
    const std::string content = StringOf(Get(entry, "content"));
    if (!id.is_number_integer() || content.empty()) {
      return InvalidArgument(where + " lacks an id or its content");
    }
    for (const char* flag : {"single_word", "lstrip", "rstrip", "normalized"}) {
      if (IsTrue(Get(entry, flag))) {
        return InvalidArgument(where + " " + Quoted(content) + " is " + flag + ", which is not supported");
      }
    }
    RETURN_IF_ERROR(SetBytes(id.get<int64_t>(), content, /*is_added=*/true, what));
    const bool special = IsTrue(Get(entry, "special"));
    added.push_back({content, id.get<int32_t>(), special});
    starts_added[static_cast<uint8_t>(content[0])] = true;
  }
  std::stable_sort(added.begin(), added.end(),
                   [](const Added& a, const Added& b) { return a.content.size() > b.content.size(); });
  added_kind.assign(bytes.size(), 0);
  for (const Added& token : added) added_kind[static_cast<size_t>(token.id)] = token.special ? 2 : 1;
  return OkStatus();
}

Result<Tokenizer> Tokenizer::Load(const std::string& directory) {
  const std::string path = directory + "/tokenizer.json";
  ASSIGN_OR_RETURN(const std::string text, ReadFile(path, size_t{256} << 20));
  return FromJson(text, path);
}

Result<Tokenizer> Tokenizer::FromJson(std::string_view tokenizer_json, std::string_view what_view) {
  const std::string what(what_view);
  auto impl = std::make_unique<Impl>();
  try {
    const SortedJson json = SortedJson::parse(tokenizer_json.begin(), tokenizer_json.end());
    RETURN_IF_ERROR(impl->ReadNormalizer(Get(json, "normalizer"), what));
    RETURN_IF_ERROR(impl->ReadPreTokenizer(Get(json, "pre_tokenizer"), what));
    RETURN_IF_ERROR(impl->ReadModel(Get(json, "model"), what));
    RETURN_IF_ERROR(impl->ReadAddedTokens(Get(json, "added_tokens"), what));
  } catch (const SortedJson::exception& error) {
    return InvalidArgument(what + " is not valid JSON: " + error.what());
  }
  return Tokenizer(std::move(impl));
}

Tokenizer::Tokenizer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Tokenizer::Tokenizer(Tokenizer&&) noexcept = default;
Tokenizer& Tokenizer::operator=(Tokenizer&&) noexcept = default;
Tokenizer::~Tokenizer() = default;

std::vector<int32_t> Tokenizer::Encode(std::string_view text, ParseSpecial special) const {
  std::vector<int32_t> ids;
  Append(text, special, &ids);
  return ids;
}

void Tokenizer::Append(std::string_view text, ParseSpecial special, std::vector<int32_t>* ids) const {
  size_t at = 0;
  while (at < text.size()) {
    const AddedMatch match = FindAdded(text, at, special);
    const size_t end = std::min(match.begin, text.size());
    if (end > at) AppendNormalized(Normalize(text.substr(at, end - at)), ids);
    if (match.id >= 0) ids->push_back(match.id);
    at = std::min(match.end, text.size());
  }
}

std::string Tokenizer::Normalize(std::string_view text) const {
  if (IsAscii(text)) return std::string(text);
  std::string valid = ToValidUtf8(text);
  return impl_->nfc ? ToNfc(valid) : valid;
}

void Tokenizer::AppendNormalized(std::string_view normalized, std::vector<int32_t>* ids) const {
  PreTokenizer::Splitter splitter(impl_->pre_tokenizer, normalized);
  for (std::string_view piece; splitter.Next(&piece);) impl_->bpe.Append(piece, ids);
}

Tokenizer::AddedMatch Tokenizer::FindAdded(std::string_view text, size_t from, ParseSpecial special) const {
  if (special == ParseSpecial::kNone) return {};
  for (size_t i = from; i < text.size(); ++i) {
    if (!impl_->starts_added[static_cast<uint8_t>(text[i])]) continue;
    for (const Impl::Added& token : impl_->added) {
      if (token.special && special == ParseSpecial::kMarkup) continue;
      if (text.substr(i).starts_with(token.content)) return {i, i + token.content.size(), token.id};
    }
  }
  return {};
}

std::string_view Tokenizer::TokenBytes(int32_t id) const {
  return impl_->Has(id) ? std::string_view(impl_->bytes[static_cast<size_t>(id)]) : std::string_view();
}

std::string Tokenizer::Decode(const std::vector<int32_t>& ids, bool skip_special) const {
  std::string bytes;
  for (const int32_t id : ids) {
    if (!(skip_special && IsSpecial(id))) bytes += TokenBytes(id);
  }
  return ToValidUtf8(bytes);
}

bool Tokenizer::IsAdded(int32_t id) const { return impl_->KindOf(id) > 0; }
bool Tokenizer::IsSpecial(int32_t id) const { return impl_->KindOf(id) == 2; }

int32_t Tokenizer::AddedId(std::string_view content) const {
  for (const Impl::Added& token : impl_->added) {
    if (token.content == content) return token.id;
  }
  return -1;
}

int32_t Tokenizer::vocab_size() const { return static_cast<int32_t>(impl_->bytes.size()); }

std::string Utf8Stream::Push(std::string_view bytes) {
  pending_ += bytes;
  std::string out;
  std::string_view rest = pending_;
  while (!rest.empty()) {
    const Utf8Step step = NextUtf8(rest);
    if (step.kind == Utf8Step::Kind::kIncomplete) break;
    out += step.kind == Utf8Step::Kind::kCharacter ? rest.substr(0, step.length) : kReplacement;
    rest.remove_prefix(step.length);
  }
  pending_ = std::string(rest);
  return out;
}

std::string Utf8Stream::Finish() {
  std::string out(pending_.empty() ? std::string_view() : kReplacement);
  pending_.clear();
  return out;
}

}  // namespace triaxial
