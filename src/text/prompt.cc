#include "text/prompt.h"

namespace triaxial {

void AppendKvTokens(const Prompt& prompt, std::vector<KvToken>* out) {
  const size_t first = out->size();
  const std::vector<Tag> tags = TagTokens(prompt.spans, static_cast<int32_t>(prompt.tokens.size()));
  for (size_t i = 0; i < tags.size(); ++i) {
    out->push_back({ContentId::OfToken(prompt.tokens[i]), static_cast<uint8_t>(tags[i].index())});
  }
  for (const PromptImage& image : prompt.images) {
    for (int32_t i = 0; i < image.tokens; ++i) {
      (*out)[first + static_cast<size_t>(image.begin + i)].content =
          ContentId::OfPicture(image.patches->hash_lo, image.patches->hash_hi, i);
    }
  }
}

}  // namespace triaxial
