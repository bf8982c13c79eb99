// The full tokenizer of Qwen3 and Qwen3-VL, composed from tests/data/text.
#ifndef TRIAXIAL_TESTS_GOLDEN_TEXT_QWEN_TOKENIZER_H_
#define TRIAXIAL_TESTS_GOLDEN_TEXT_QWEN_TOKENIZER_H_

#include "text/tokenizer.h"

namespace triaxial {

// Made at the first call; ends the program if the files are not there.
const Tokenizer& QwenTokenizer();

}  // namespace triaxial

#endif  // TRIAXIAL_TESTS_GOLDEN_TEXT_QWEN_TOKENIZER_H_
