// What the engine is given: tokens, what each of them is, and the pictures among them.
#ifndef TRIAXIAL_TEXT_PROMPT_H_
#define TRIAXIAL_TEXT_PROMPT_H_

#include <cstdint>
#include <memory>
#include <vector>

#include "io/image_processor.h"
#include "kv/block.h"
#include "kv/tag.h"

namespace triaxial {

struct PromptImage {
  int32_t begin = 0;  // index of its first image-pad token
  int32_t tokens = 0;
  std::shared_ptr<const ImagePatches> patches;
};

struct Prompt {
  std::vector<int32_t> tokens;      // image pads expanded
  std::vector<TagSpan> spans;       // sorted, without gaps or empty spans, covering all tokens
  std::vector<PromptImage> images;  // in order of appearance
};

// What the cache is to know of the prompt's tokens: a token's id or its place in a picture, and its tag.
void AppendKvTokens(const Prompt& prompt, std::vector<KvToken>* out);

}  // namespace triaxial

#endif  // TRIAXIAL_TEXT_PROMPT_H_
