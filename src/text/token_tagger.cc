#include "text/token_tagger.h"

namespace triaxial {
namespace {

// Whether `token` is the markup `id`, which the vocabulary may lack.
bool Is(int32_t token, int32_t id) { return id >= 0 && token == id; }

int32_t SingleToken(const Tokenizer& tokenizer, std::string_view text) {
  const std::vector<int32_t> ids = tokenizer.Encode(text, ParseSpecial::kNone);
  return ids.size() == 1 ? ids[0] : -1;
}

// Walks over the tokens of a raw prompt and says what each of them is.
class Scanner {
 public:
  Scanner(const std::vector<int32_t>& tokens, const MarkupIds& markup)
      : tokens_(tokens), markup_(markup), before_marker_(tokens.size(), false) {
    for (size_t i = tokens.size(); i-- > 1;) {
      before_marker_[i - 1] =
          markup.IsNewline(tokens[i - 1]) && (before_marker_[i] || markup.IsMarker(tokens[i]));
    }
  }

  std::vector<TagSpan> Scan() {
    for (size_t i = 0; i < tokens_.size(); ++i) {
      if (Is(tokens_[i], markup_.im_start)) {
        StartBlock(At(i + 1));
        Add(i, Semantic::kDelim);
      } else if (Is(tokens_[i], markup_.im_end)) {
        StartText(Block::kUser, Line::kEnd);
        Add(i, Semantic::kDelim);
      } else if (Is(tokens_[i], markup_.image_pad)) {
        Add(i, Semantic::kObs, Modal::kImage);
      } else {
        Add(i, Classify(i));
      }
    }
    return std::move(spans_);
  }

 private:
  enum class Block { kUser, kResponse, kSystem, kAssistant };
  // Where in the scaffolding we are: a role name is expected, then a newline; after <|im_end|> a newline.
  enum class Line { kText, kRole, kEnd };

  int32_t At(size_t i) const { return i < tokens_.size() ? tokens_[i] : -1; }

  void StartText(Block block, Line line) {
    block_ = block;
    line_ = line;
  }
  void StartBlock(int32_t role) {
    if (Is(role, markup_.role_system)) {
      StartText(Block::kSystem, Line::kRole);
    } else if (Is(role, markup_.role_assistant)) {
      StartText(Block::kAssistant, Line::kRole);
      generation_ = GenerationTagger(markup_, /*starts_in_thought=*/false);
    } else {
      const bool known = Is(role, markup_.role_user);
      if (known) ++turn_;
      StartText(Block::kUser, known ? Line::kRole : Line::kText);
    }
  }

  Semantic Classify(size_t i) {
    const int32_t token = tokens_[i];
    const bool newline = markup_.IsNewline(token);
    if (line_ == Line::kRole) {
      line_ = Line::kEnd;  // the role name itself; the newline comes next
      return Semantic::kDelim;
    }
    if (line_ == Line::kEnd) {
      line_ = Line::kText;
      if (newline) return Semantic::kDelim;
    }
    if (Is(token, markup_.vision_start) || Is(token, markup_.vision_end)) return Semantic::kDelim;
    switch (block_) {
      case Block::kSystem:
        return Semantic::kInst;
      case Block::kAssistant: {
        const Semantic semantic = generation_.Next(token);
        return before_marker_[i] ? Semantic::kDelim : semantic;
      }
      case Block::kUser:
      case Block::kResponse:
        break;
    }
    const bool opens = Is(token, markup_.tool_response_begin);
    if (opens || Is(token, markup_.tool_response_end)) {
      StartText(opens ? Block::kResponse : Block::kUser, Line::kEnd);
      return Semantic::kDelim;
    }
    if (block_ == Block::kUser) return Semantic::kUser;
    // The template closes a response with one newline; further ones are the tool's.
    const bool closing = Is(token, markup_.newlines[0]) && Is(At(i + 1), markup_.tool_response_end);
    return closing ? Semantic::kDelim : Semantic::kObs;
  }

  void Add(size_t i, Semantic semantic, Modal modal = Modal::kText) {
    const int32_t turn = std::max(turn_, 0);
    if (spans_.empty() || spans_.back().semantic != semantic || spans_.back().modal != modal ||
        spans_.back().turn != turn) {
      const auto begin = static_cast<int32_t>(i);
      spans_.push_back({begin, begin, -1, turn, modal, semantic});
    }
    spans_.back().end = static_cast<int32_t>(i) + 1;
  }

  const std::vector<int32_t>& tokens_;
  const MarkupIds& markup_;
  std::vector<bool> before_marker_;  // a newline of a run that ends at a marker
  std::vector<TagSpan> spans_;
  Block block_ = Block::kUser;
  Line line_ = Line::kText;
  int32_t turn_ = -1;  // of the last user block
  GenerationTagger generation_{markup_, false};
};

}  // namespace

MarkupIds FindMarkup(const Tokenizer& tokenizer) {
  MarkupIds ids;
  ids.im_start = tokenizer.AddedId("<|im_start|>");
  ids.im_end = tokenizer.AddedId("<|im_end|>");
  ids.vision_start = tokenizer.AddedId("<|vision_start|>");
  ids.vision_end = tokenizer.AddedId("<|vision_end|>");
  ids.image_pad = tokenizer.AddedId("<|image_pad|>");
  ids.tool_call_begin = tokenizer.AddedId("<tool_call>");
  ids.tool_call_end = tokenizer.AddedId("</tool_call>");
  ids.tool_response_begin = tokenizer.AddedId("<tool_response>");
  ids.tool_response_end = tokenizer.AddedId("</tool_response>");
  ids.think_begin = tokenizer.AddedId("<think>");
  ids.think_end = tokenizer.AddedId("</think>");
  ids.role_system = SingleToken(tokenizer, "system");
  ids.role_user = SingleToken(tokenizer, "user");
  ids.role_assistant = SingleToken(tokenizer, "assistant");
  for (size_t i = 0; i < ids.newlines.size(); ++i) {
    ids.newlines[i] = SingleToken(tokenizer, std::string(i + 1, '\n'));
  }
  return ids;
}

std::vector<TagSpan> ScanSpans(const std::vector<int32_t>& tokens, const MarkupIds& markup) {
  return Scanner(tokens, markup).Scan();
}

Semantic GenerationTagger::Next(int32_t token) {
  if (markup_.IsMarker(token)) {
    after_marker_ = true;
    if (token == markup_.think_end) {
      state_ = Semantic::kAssistant;
    } else if (state_ != Semantic::kReasoning) {
      if (token == markup_.tool_call_begin) state_ = Semantic::kToolCall;
      if (token == markup_.tool_call_end) state_ = Semantic::kAssistant;
      if (token == markup_.think_begin && state_ == Semantic::kAssistant) state_ = Semantic::kReasoning;
    }
    return Semantic::kDelim;
  }
  if (after_marker_ && markup_.IsNewline(token)) return Semantic::kDelim;
  after_marker_ = false;
  const bool scaffolding = Is(token, markup_.im_start) || Is(token, markup_.im_end) ||
                           Is(token, markup_.vision_start) || Is(token, markup_.vision_end) ||
                           Is(token, markup_.tool_response_begin) || Is(token, markup_.tool_response_end);
  return scaffolding ? Semantic::kDelim : state_;
}

}  // namespace triaxial
