// The recorded agent conversations whose bytes bench/capacity counts, as the cache would meet them: what each
// token is and what its tag is, by the real Qwen3-VL tokenizer, chat template and image processor.
#ifndef TRIAXIAL_BENCH_CAPACITY_RECORDS_H_
#define TRIAXIAL_BENCH_CAPACITY_RECORDS_H_

#include <string>
#include <vector>

#include "base/status.h"
#include "kv/block.h"
#include "text/chat_template.h"

namespace triaxial {

struct Record {
  std::string id;
  std::string source;
  bool screenshots = false;
  std::vector<KvToken> tokens;  // token ids and identities of pictures, with Tag::index()
};

// The records of tests/data, in the order of their files; reads from the working directory, which is to be
// the repository's root. A conversation that ends with an answer is rendered as it is, one that waits for an
// answer with the generation prompt. Errors name file and line.
Result<std::vector<Record>> LoadRecords(const ChatTemplate& chat_template);

}  // namespace triaxial

#endif  // TRIAXIAL_BENCH_CAPACITY_RECORDS_H_
