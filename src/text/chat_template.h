// The chat templates of Qwen3 and Qwen3-VL, rendered natively into tokens and tag spans. Because every span
// comes from the structure of the conversation, text of users and tools can neither become a special token
// nor move a tag boundary.
#ifndef TRIAXIAL_TEXT_CHAT_TEMPLATE_H_
#define TRIAXIAL_TEXT_CHAT_TEMPLATE_H_

#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "text/conversation.h"
#include "text/prompt.h"
#include "text/token_tagger.h"
#include "text/tokenizer.h"

namespace triaxial {

enum class TemplateKind {
  kQwen3VlInstruct,
  kQwen3VlThinking,
  kQwen3Hybrid,  // Qwen3 of April 2025, with enable_thinking
  kQwen3Instruct2507,
  kQwen3Thinking2507,
};
std::string_view Name(TemplateKind kind);  // "qwen3-vl-instruct", ... as the published files are called

struct TemplateOptions {
  bool add_generation_prompt = true;
  bool enable_thinking = true;  // read by kQwen3Hybrid only
  bool add_vision_id = false;
};

class ChatTemplate {
 public:
  // Recognizes which published template the checkpoint carries (chat_template.jinja, or "chat_template" in
  // tokenizer_config.json). InvalidArgument if it is none of them; NotFound if there is none.
  static Result<ChatTemplate> Load(const std::string& directory, const Tokenizer& tokenizer);
  // `tokenizer` must outlive the template and have the markup tokens of Qwen3 (InvalidArgument names a
  // missing one).
  static Result<ChatTemplate> Create(TemplateKind kind, const Tokenizer& tokenizer);

  // Tokens and spans. `images` holds one entry per image part of the conversation, in order; each image part
  // becomes vision_start, its number of image pads, vision_end. InvalidArgument if the counts differ or
  // messages are empty.
  Result<Prompt> Render(const Conversation& conversation,
                        const std::vector<std::shared_ptr<const ImagePatches>>& images, int merge_size,
                        const TemplateOptions& options) const;
  // The text that the reference renders (one image pad per image), for tests and inspection.
  Result<std::string> RenderText(const Conversation& conversation, const TemplateOptions& options) const;

  TemplateKind kind() const { return kind_; }
  // True if a generation starts inside a thought (the generation prompt ends in "<think>\n").
  bool GenerationStartsInThought(const TemplateOptions& options) const;

 private:
  ChatTemplate(TemplateKind kind, const Tokenizer& tokenizer)
      : kind_(kind), tokenizer_(&tokenizer), markup_(FindMarkup(tokenizer)) {}
  TemplateKind kind_;
  const Tokenizer* tokenizer_;
  MarkupIds markup_;
};

}  // namespace triaxial

#endif  // TRIAXIAL_TEXT_CHAT_TEMPLATE_H_
