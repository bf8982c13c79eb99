#include "text/chat_template.h"

#include <limits>
#include <utility>

#include "base/file.h"
#include "base/json.h"
#include "text/template_pieces.h"
#include "text/token_tagger.h"

namespace triaxial {
namespace {

constexpr size_t kMaxFileBytes = size_t{16} << 20;

bool Contains(std::string_view text, std::string_view part) {
  return text.find(part) != std::string_view::npos;
}

// Which published template this is, by what only it does. Checkpoints carry the text with small edits of no
// consequence, so it is not compared as a whole.
Result<TemplateKind> Recognize(std::string_view jinja, const std::string& where) {
  const bool qwen3_calls = Contains(jinja, "<|im_start|>") && Contains(jinja, "# Tools") &&
                           Contains(jinja, "<tool_response>") &&
                           Contains(jinja, R"(<tool_call>\n{"name": ")");
  const bool vision = Contains(jinja, "<|vision_start|><|image_pad|><|vision_end|>");
  const bool reasoning = Contains(jinja, "reasoning_content") && Contains(jinja, "last_query_index");
  const bool starts_in_thought = Contains(jinja, R"(<|im_start|>assistant\n<think>\n')");
  const bool enable_thinking = Contains(jinja, "enable_thinking");
  if (qwen3_calls && vision && reasoning && starts_in_thought) return TemplateKind::kQwen3VlThinking;
  if (qwen3_calls && vision && !reasoning && !starts_in_thought) return TemplateKind::kQwen3VlInstruct;
  if (qwen3_calls && !vision && reasoning && enable_thinking) return TemplateKind::kQwen3Hybrid;
  if (qwen3_calls && !vision && reasoning && starts_in_thought) return TemplateKind::kQwen3Thinking2507;
  if (qwen3_calls && !vision && reasoning) return TemplateKind::kQwen3Instruct2507;
  return InvalidArgument(
      where + " is none of the chat templates of Qwen3 and Qwen3-VL; use the checkpoint's original one");
}

// The template's text in tokenizer_config.json: a string, or a list of named ones.
Result<std::string> FromTokenizerConfig(const std::string& path) {
  ASSIGN_OR_RETURN(const Json config, ReadJsonFile(path, kMaxFileBytes));
  const auto it = config.find("chat_template");
  if (it != config.end() && it->is_string()) return it->get<std::string>();
  if (it != config.end() && it->is_array()) {
    for (const Json& entry : *it) {
      const auto name = entry.find("name"), text = entry.find("template");
      if (name != entry.end() && *name == "default" && text != entry.end() && text->is_string()) {
        return text->get<std::string>();
      }
    }
  }
  return NotFound(path + " has no chat_template");
}

// Tokens with a span for every run of equal tags.
class TokenWriter {
 public:
  explicit TokenWriter(const Tokenizer& tokenizer) : tokenizer_(tokenizer) {}

  void Add(int32_t token, const TemplatePiece& piece, int32_t count = 1, Modal modal = Modal::kText) {
    if (count <= 0) return;
    const auto begin = static_cast<int32_t>(prompt_.tokens.size());
    prompt_.tokens.insert(prompt_.tokens.end(), static_cast<size_t>(count), token);
    if (!prompt_.spans.empty()) {
      TagSpan& last = prompt_.spans.back();
      if (last.message == piece.message && last.turn == piece.turn && last.modal == modal &&
          last.semantic == piece.semantic) {
        last.end += count;
        return;
      }
    }
    prompt_.spans.push_back({begin, begin + count, piece.message, piece.turn, modal, piece.semantic});
  }

  // The reference tokenizes the rendered text as a whole, so a word may begin in the scaffolding and end in
  // the content. Texts between two special tokens are therefore encoded together; a token belongs to the
  // piece of its first byte.
  void AddTexts(const TemplatePiece* begin, const TemplatePiece* end) {
    std::string run;
    std::vector<size_t> ends;
    for (const TemplatePiece* piece = begin; piece != end; ++piece) {
      run += tokenizer_.Normalize(piece->text);
      ends.push_back(run.size());
    }
    ids_.clear();
    tokenizer_.AppendNormalized(run, &ids_);
    size_t at = 0, piece = 0;
    for (const int32_t id : ids_) {
      while (ends[piece] <= at) ++piece;
      Add(id, begin[piece]);
      at += tokenizer_.TokenBytes(id).size();
    }
  }

  Prompt& prompt() { return prompt_; }

 private:
  const Tokenizer& tokenizer_;
  Prompt prompt_;
  std::vector<int32_t> ids_;
};

}  // namespace

std::string_view Name(TemplateKind kind) {
  switch (kind) {
    case TemplateKind::kQwen3VlInstruct:
      return "qwen3-vl-instruct";
    case TemplateKind::kQwen3VlThinking:
      return "qwen3-vl-thinking";
    case TemplateKind::kQwen3Hybrid:
      return "qwen3-hybrid";
    case TemplateKind::kQwen3Instruct2507:
      return "qwen3-instruct-2507";
    case TemplateKind::kQwen3Thinking2507:
      return "qwen3-thinking-2507";
  }
  return "";
}

Result<ChatTemplate> ChatTemplate::Load(const std::string& directory, const Tokenizer& tokenizer) {
  std::string path = directory + "/chat_template.jinja";
  Result<std::string> jinja = ReadFile(path, kMaxFileBytes);
  if (jinja.status().code() == Code::kNotFound) {
    path = directory + "/tokenizer_config.json";
    jinja = FromTokenizerConfig(path);
    if (jinja.status().code() == Code::kNotFound) {
      return NotFound(directory +
                      " has no chat template: neither chat_template.jinja nor chat_template in "
                      "tokenizer_config.json; only raw completions are possible");
    }
  }
  ASSIGN_OR_RETURN(const std::string text, std::move(jinja));
  ASSIGN_OR_RETURN(const TemplateKind kind, Recognize(text, path));
  return Create(kind, tokenizer);
}

Result<ChatTemplate> ChatTemplate::Create(TemplateKind kind, const Tokenizer& tokenizer) {
  for (const char* token :
       {"<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<tool_call>",
        "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"}) {
    if (tokenizer.AddedId(token) < 0) {
      return InvalidArgument("the tokenizer has no added token " + std::string(token) +
                             ", which the chat template " + std::string(Name(kind)) + " needs");
    }
  }
  return ChatTemplate(kind, tokenizer);
}

Result<Prompt> ChatTemplate::Render(const Conversation& conversation,
                                    const std::vector<std::shared_ptr<const ImagePatches>>& images,
                                    int merge_size, const TemplateOptions& options) const {
  const auto expected = static_cast<size_t>(conversation.images());
  if (images.size() != expected) {
    return InvalidArgument("the conversation has " + std::to_string(expected) + " images, but " +
                           std::to_string(images.size()) + " were given");
  }
  ASSIGN_OR_RETURN(const std::vector<TemplatePiece> pieces,
                   LayOut(kind_, *tokenizer_, markup_, conversation, options));
  TokenWriter writer(*tokenizer_);
  Prompt& prompt = writer.prompt();
  for (const TemplatePiece *piece = pieces.data(), *end = piece + pieces.size(); piece != end;) {
    if (prompt.tokens.size() > std::numeric_limits<int32_t>::max() / 2) {
      return TooLarge("the conversation has more than a billion tokens");
    }
    switch (piece->kind) {
      case TemplatePiece::Kind::kToken:
        writer.Add(piece->id, *piece);
        ++piece;
        break;
      case TemplatePiece::Kind::kText: {
        const TemplatePiece* texts = piece;
        while (piece != end && piece->kind == TemplatePiece::Kind::kText) ++piece;
        writer.AddTexts(texts, piece);
        break;
      }
      case TemplatePiece::Kind::kImage: {
        const size_t index = prompt.images.size();
        const bool known = images[index] != nullptr && merge_size > 0;
        const int count = known ? images[index]->tokens(merge_size) : 0;
        if (count <= 0) return InvalidArgument("image " + std::to_string(index) + " has no patches");
        prompt.images.push_back({static_cast<int32_t>(prompt.tokens.size()), count, images[index]});
        writer.Add(markup_.image_pad, *piece, count, Modal::kImage);
        ++piece;
        break;
      }
    }
  }
  return std::move(prompt);
}

Result<std::string> ChatTemplate::RenderText(const Conversation& conversation,
                                             const TemplateOptions& options) const {
  ASSIGN_OR_RETURN(const std::vector<TemplatePiece> pieces,
                   LayOut(kind_, *tokenizer_, markup_, conversation, options));
  std::string text;
  for (const TemplatePiece& piece : pieces) {
    switch (piece.kind) {
      case TemplatePiece::Kind::kText:
        text += piece.text;
        break;
      case TemplatePiece::Kind::kToken:
        text += tokenizer_->TokenBytes(piece.id);
        break;
      case TemplatePiece::Kind::kImage:
        text += tokenizer_->TokenBytes(markup_.image_pad);
        break;
    }
  }
  return text;
}

bool ChatTemplate::GenerationStartsInThought(const TemplateOptions& options) const {
  return options.add_generation_prompt &&
         (kind_ == TemplateKind::kQwen3VlThinking || kind_ == TemplateKind::kQwen3Thinking2507);
}

}  // namespace triaxial
