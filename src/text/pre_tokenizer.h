// Cuts text into the pieces within which byte pairs are merged, by the regular expression of the checkpoint.
#ifndef TRIAXIAL_TEXT_PRE_TOKENIZER_H_
#define TRIAXIAL_TEXT_PRE_TOKENIZER_H_

#include <memory>
#include <string>
#include <string_view>

#include "base/status.h"

struct pcre2_real_code_8;
struct pcre2_real_match_data_8;

namespace triaxial {

class PreTokenizer {
 public:
  // InvalidArgument names `what` and the reason if the pattern does not compile.
  static Result<PreTokenizer> Compile(const std::string& pattern, std::string_view what);

  // One pass over valid UTF-8, which must stay alive. Matches and the gaps between them are pieces, so the
  // pieces always add up to the text.
  class Splitter {
   public:
    Splitter(const PreTokenizer& pre_tokenizer, std::string_view text);
    // False at the end of the text.
    bool Next(std::string_view* piece);

   private:
    struct Free {
      void operator()(pcre2_real_match_data_8* match) const;
    };
    const pcre2_real_code_8* code_;
    std::unique_ptr<pcre2_real_match_data_8, Free> match_;
    std::string_view text_;
    size_t at_ = 0;
  };

 private:
  std::shared_ptr<pcre2_real_code_8> code_;
};

}  // namespace triaxial

#endif  // TRIAXIAL_TEXT_PRE_TOKENIZER_H_
