// What `triaxial bench serve` asks of a server: recorded conversations, OSWorld-shaped ones, and prompts of
// fixed length. A session is one conversation; its steps are asked in order, each when the answer before has
// come.
#ifndef TRIAXIAL_APPS_BENCH_WORKLOAD_H_
#define TRIAXIAL_APPS_BENCH_WORKLOAD_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/status.h"

namespace triaxial {

struct BenchStep {
  // Messages as JSON text, shared between the steps of a session; or a prompt of token ids as JSON text.
  std::vector<std::shared_ptr<const std::string>> messages;
  std::string prompt;
  int max_tokens = 0;
};

struct BenchSession {
  std::string tools;  // JSON text; empty: none
  std::vector<BenchStep> steps;
};

// Sessions by number. Thread-compatible: Make may keep what sessions share.
class BenchWorkload {
 public:
  virtual ~BenchWorkload() = default;
  virtual std::string_view name() const = 0;
  // How many different sessions there are; 0: as many as one likes.
  virtual int64_t sessions() const = 0;
  // `index` may be any number; recorded sessions repeat.
  virtual BenchSession Make(int64_t index) = 0;
  // Answers have exactly max_tokens tokens.
  virtual bool fixed_length() const = 0;
};

struct BenchWorkloadOptions {
  int max_tokens = 0;         // of an answer; 0: the workload's own (300, or what its name says)
  bool fixed_length = false;  // recorded conversations too get answers of exactly max_tokens
  std::string images;         // directory of a recording's pictures; empty: that of its file
};

// `name` is "osworld" (conversations of eight steps with a 1920x1080 screenshot each, 11k tokens of prompt on
// average with Qwen3-VL's tokenizer, answers of 300), "PROMPT/ANSWER" (random tokens, for instance
// "4096/1024"), or a JSONL file of conversations (messages and tools; each assistant message is a step) or of
// requests
// ({"request": {...}}; consecutive ones are the steps of one session).
Result<std::unique_ptr<BenchWorkload>> MakeWorkload(const std::string& name,
                                                    const BenchWorkloadOptions& options);

// The target and body of a step's streamed request with usage at its end.
std::string StepTarget(const BenchStep& step);
std::string StepBody(const BenchSession& session, const BenchStep& step, const std::string& model,
                     bool fixed_length);

}  // namespace triaxial

#endif  // TRIAXIAL_APPS_BENCH_WORKLOAD_H_
