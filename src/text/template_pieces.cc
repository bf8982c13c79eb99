#include "text/template_pieces.h"

#include <algorithm>
#include <optional>
#include <string_view>
#include <utility>

namespace triaxial {
namespace {

constexpr std::string_view kToolsHead =
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\nYou are provided with "
    "function signatures within <tools></tools> XML tags:\n<tools>";
constexpr std::string_view kToolsTail =
    "\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
    "<tool_call></tool_call> XML tags:\n<tool_call>\n{\"name\": <function-name>, \"arguments\": "
    "<args-json-object>}\n</tool_call>";
constexpr std::string_view kResponseBegin = "<tool_response>", kResponseEnd = "</tool_response>";

bool HasVision(TemplateKind kind) {
  return kind == TemplateKind::kQwen3VlInstruct || kind == TemplateKind::kQwen3VlThinking;
}

std::string TextOf(const Message& message) {
  std::string text;
  for (const ContentPart& part : message.content) {
    if (part.kind == ContentPart::Kind::kText) text += part.text;
  }
  return text;
}

std::string_view TrimLeft(std::string_view text) {
  return text.substr(std::min(text.find_first_not_of('\n'), text.size()));
}
std::string_view TrimRight(std::string_view text) { return text.substr(0, text.find_last_not_of('\n') + 1); }

// The message's parts with neighbouring texts joined.
std::vector<ContentPart> JoinTexts(const Message& message) {
  std::vector<ContentPart> parts;
  for (const ContentPart& part : message.content) {
    const bool text = part.kind == ContentPart::Kind::kText;
    if (text && !parts.empty() && parts.back().kind == ContentPart::Kind::kText) {
      parts.back().text += part.text;
    } else {
      parts.push_back(part);
    }
  }
  return parts;
}

// The templates' rule by which a user message is a tool's response written out by hand.
bool IsWrappedResponse(const std::vector<ContentPart>& parts) {
  return !parts.empty() && parts.front().kind == ContentPart::Kind::kText &&
         parts.back().kind == ContentPart::Kind::kText && parts.front().text.starts_with(kResponseBegin) &&
         parts.back().text.ends_with(kResponseEnd);
}

class Layout {
 public:
  Layout(TemplateKind kind, const Tokenizer& tokenizer, const MarkupIds& markup,
         const Conversation& conversation, const TemplateOptions& options)
      : kind_(kind),
        tokenizer_(tokenizer),
        markup_(markup),
        messages_(conversation.messages),
        tools_(conversation.tools),
        options_(options) {}

  std::vector<TemplatePiece> Make() {
    FindLastQuery();
    System();
    for (size_t i = 0; i < messages_.size(); ++i) {
      message_ = static_cast<int32_t>(i);
      switch (messages_[i].role) {
        case Role::kSystem:
          if (i > 0) LaterSystem(messages_[i]);
          break;
        case Role::kUser:
          User(messages_[i]);
          break;
        case Role::kAssistant:
          Assistant(i);
          break;
        case Role::kTool:
          Tool(i);
          break;
      }
    }
    message_ = -1;
    if (options_.add_generation_prompt) GenerationPrompt();
    return std::move(pieces_);
  }

 private:
  // Where pieces come from
  // ------------------------------------------------------------------------------------
  TemplatePiece& Add(TemplatePiece::Kind kind, Semantic semantic) {
    TemplatePiece piece;
    piece.kind = kind;
    piece.message = message_;
    piece.turn = std::max(turn_, 0);
    piece.semantic = semantic;
    pieces_.push_back(std::move(piece));
    return pieces_.back();
  }
  void Token(int32_t id, Semantic semantic = Semantic::kDelim) {
    Add(TemplatePiece::Kind::kToken, semantic).id = id;
  }
  // Text as data. Neighbours of the same kind are one piece: normalization must see them together.
  void Text(std::string_view text, Semantic semantic) {
    if (text.empty()) return;
    if (pieces_.empty() || pieces_.back().kind != TemplatePiece::Kind::kText ||
        pieces_.back().message != message_ || pieces_.back().turn != std::max(turn_, 0) ||
        pieces_.back().semantic != semantic) {
      Add(TemplatePiece::Kind::kText, semantic);
    }
    pieces_.back().text += text;
  }
  void Delim(std::string_view text) { Text(text, Semantic::kDelim); }

  // Text of the system, in which markup tokens are recognized and are part of the instructions.
  void Instructions(std::string_view text) {
    for (size_t at = 0; at < text.size();) {
      const Tokenizer::AddedMatch match = tokenizer_.FindAdded(text, at, ParseSpecial::kMarkup);
      Text(text.substr(at, match.begin - at), Semantic::kInst);
      if (match.id < 0) return;
      Token(match.id, Semantic::kInst);
      at = match.end;
    }
  }

  // Text of the model: thoughts and calls written out in it are told apart as in a generation.
  void ModelText(std::string_view text, bool marker_follows) {
    GenerationTagger tagger(markup_, /*starts_in_thought=*/false);
    bool after_marker = false;
    for (size_t at = 0; at < text.size();) {
      const Tokenizer::AddedMatch match = tokenizer_.FindAdded(text, at, ParseSpecial::kMarkup);
      const bool before_marker = match.id >= 0 ? markup_.IsMarker(match.id) : marker_follows;
      std::string_view stretch = text.substr(at, match.begin - at);
      if (after_marker) {
        const std::string_view rest = TrimLeft(stretch);
        Delim(stretch.substr(0, stretch.size() - rest.size()));
        stretch = rest;
      }
      const std::string_view body = before_marker ? TrimRight(stretch) : stretch;
      Text(body, tagger.state());
      Delim(stretch.substr(body.size()));
      if (match.id < 0) return;
      Token(match.id, tagger.Next(match.id));
      after_marker = markup_.IsMarker(match.id);
      at = match.end;
    }
  }

  // The template
  // ----------------------------------------------------------------------------------------------
  void FindLastQuery() {
    last_query_ = messages_.size() - 1;
    for (size_t i = messages_.size(); i-- > 0;) {
      if (messages_[i].role == Role::kUser && !IsWrappedResponse(JoinTexts(messages_[i]))) {
        last_query_ = i;
        return;
      }
    }
  }

  void Begin(std::string_view role) {
    Token(markup_.im_start);
    Delim(role);
  }
  void End() {
    Token(markup_.im_end);
    Delim("\n");
  }

  void System() {
    const bool has_message = messages_[0].role == Role::kSystem;
    if (!has_message && tools_.empty()) return;
    message_ = has_message ? 0 : -1;
    Begin("system\n");
    if (has_message) Instructions(TextOf(messages_[0]));
    if (!tools_.empty()) {
      if (has_message) Instructions("\n\n");
      Instructions(kToolsHead);
      for (const std::string& tool : tools_) {
        Instructions("\n");
        Instructions(tool);
      }
      Instructions(kToolsTail);
    }
    End();
  }

  void LaterSystem(const Message& message) {
    if (kind_ == TemplateKind::kQwen3VlInstruct) return;  // this template drops it
    Begin("system\n");
    Instructions(TextOf(message));
    End();
  }

  void Parts(const std::vector<ContentPart>& parts, Semantic semantic) {
    for (const ContentPart& part : parts) {
      if (part.kind == ContentPart::Kind::kText) {
        Text(part.text, semantic);
        continue;
      }
      ++pictures_;
      if (options_.add_vision_id) Delim("Picture " + std::to_string(pictures_) + ": ");
      Token(markup_.vision_start);
      Add(TemplatePiece::Kind::kImage, Semantic::kObs);
      Token(markup_.vision_end);
    }
  }

  void User(const Message& message) {
    ++turn_;
    Begin("user\n");
    std::vector<ContentPart> parts = JoinTexts(message);
    const bool wrapped = IsWrappedResponse(parts);
    if (wrapped) {
      parts.front().text.erase(0, kResponseBegin.size());
      parts.back().text.resize(parts.back().text.size() - kResponseEnd.size());
      Token(markup_.tool_response_begin, Semantic::kUser);
    }
    Parts(parts, Semantic::kUser);
    if (wrapped) Token(markup_.tool_response_end, Semantic::kUser);
    End();
  }

  // What an assistant message says, with its thoughts where the template keeps them.
  struct Answer {
    std::string text;
    bool has_content = false;  // then a newline separates it from the first call
  };
  Answer AnswerOf(size_t index) const {
    const Message& message = messages_[index];
    std::string content = TextOf(message);
    if (kind_ == TemplateKind::kQwen3VlInstruct) return {std::move(content), !message.content.empty()};
    std::string reasoning;
    if (message.reasoning_content) {
      reasoning = *message.reasoning_content;
    } else if (const size_t end = content.find("</think>"); end != std::string::npos) {
      std::string_view thought = TrimRight(std::string_view(content).substr(0, end));
      if (const size_t begin = thought.rfind("<think>"); begin != std::string_view::npos) {
        thought.remove_prefix(begin + std::string_view("<think>").size());
      }
      reasoning = TrimLeft(thought);
      const size_t last = content.rfind("</think>") + std::string_view("</think>").size();
      content = std::string(TrimLeft(std::string_view(content).substr(last)));
    }
    const bool has_content = !content.empty();
    if (index > last_query_ && (index + 1 == messages_.size() || !reasoning.empty())) {
      std::string text = "<think>\n";
      text += TrimRight(TrimLeft(reasoning));
      text += "\n</think>\n\n";
      text += TrimLeft(content);
      return {std::move(text), has_content};
    }
    return {std::move(content), has_content};
  }

  void Assistant(size_t index) {
    const Message& message = messages_[index];
    Begin("assistant\n");
    const Answer answer = AnswerOf(index);
    ModelText(answer.text, !message.tool_calls.empty());
    bool newline = answer.has_content;
    for (const ToolCall& call : message.tool_calls) {
      if (newline) Delim("\n");
      newline = true;
      Token(markup_.tool_call_begin);
      Delim("\n");
      Text("{\"name\": \"" + call.name + "\", \"arguments\": " + call.arguments + "}", Semantic::kToolCall);
      Delim("\n");
      Token(markup_.tool_call_end);
    }
    End();
  }

  void Tool(size_t index) {
    if (index == 0 || messages_[index - 1].role != Role::kTool) {
      ++turn_;
      Begin("user");
    }
    Delim("\n");
    Token(markup_.tool_response_begin);
    Delim("\n");
    Parts(JoinTexts(messages_[index]), Semantic::kObs);
    Delim("\n");
    Token(markup_.tool_response_end);
    if (index + 1 == messages_.size() || messages_[index + 1].role != Role::kTool) End();
  }

  void GenerationPrompt() {
    Begin("assistant\n");
    switch (kind_) {
      case TemplateKind::kQwen3VlInstruct:
      case TemplateKind::kQwen3Instruct2507:
        return;
      case TemplateKind::kQwen3VlThinking:
      case TemplateKind::kQwen3Thinking2507:
        Token(markup_.think_begin);
        Delim("\n");
        return;
      case TemplateKind::kQwen3Hybrid:
        if (options_.enable_thinking) return;
        Token(markup_.think_begin);
        Delim("\n\n");
        Token(markup_.think_end);
        Delim("\n\n");
        return;
    }
  }

  const TemplateKind kind_;
  const Tokenizer& tokenizer_;
  const MarkupIds& markup_;
  const std::vector<Message>& messages_;
  const std::vector<std::string>& tools_;
  const TemplateOptions& options_;
  std::vector<TemplatePiece> pieces_;
  size_t last_query_ = 0;  // thoughts of answers after it are kept
  int32_t message_ = -1;
  int32_t turn_ = -1;  // of the last user block
  int pictures_ = 0;
};

}  // namespace

Result<std::vector<TemplatePiece>> LayOut(TemplateKind kind, const Tokenizer& tokenizer,
                                          const MarkupIds& markup, const Conversation& conversation,
                                          const TemplateOptions& options) {
  if (conversation.messages.empty()) return InvalidArgument("messages is empty");
  for (size_t i = 0; i < conversation.messages.size(); ++i) {
    const Message& message = conversation.messages[i];
    const bool allowed = HasVision(kind) && (message.role == Role::kUser || message.role == Role::kTool);
    for (size_t k = 0; k < message.content.size(); ++k) {
      if (allowed || message.content[k].kind != ContentPart::Kind::kImage) continue;
      const std::string where = "messages[" + std::to_string(i) + "].content[" + std::to_string(k) + "]";
      return InvalidArgument(where + (HasVision(kind)
                                          ? " is an image; images are supported in user and tool messages"
                                          : " is an image, which this model cannot see; send text only"));
    }
  }
  return Layout(kind, tokenizer, markup, conversation, options).Make();
}

}  // namespace triaxial
