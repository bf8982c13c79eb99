// The structure of a rendered conversation, before it is text or tokens: which stretches are the template's,
// which are content, and what each of them is.
#ifndef TRIAXIAL_TEXT_TEMPLATE_PIECES_H_
#define TRIAXIAL_TEXT_TEMPLATE_PIECES_H_

#include <cstdint>
#include <string>
#include <vector>

#include "base/status.h"
#include "kv/tag.h"
#include "text/chat_template.h"
#include "text/conversation.h"
#include "text/token_tagger.h"
#include "text/tokenizer.h"

namespace triaxial {

struct TemplatePiece {
  enum class Kind {
    kText,   // ordinary text: whatever it spells, no added token is looked for in it
    kToken,  // the added token `id`
    kImage,  // the pads of the next image
  } kind = Kind::kText;
  std::string text;  // kText
  int32_t id = -1;   // kToken
  int32_t message = -1;
  int32_t turn = 0;
  Semantic semantic = Semantic::kDelim;
};

// Errors (InvalidArgument): no messages; an image where the template has none.
Result<std::vector<TemplatePiece>> LayOut(TemplateKind kind, const Tokenizer& tokenizer,
                                          const MarkupIds& markup, const Conversation& conversation,
                                          const TemplateOptions& options);

}  // namespace triaxial

#endif  // TRIAXIAL_TEXT_TEMPLATE_PIECES_H_
