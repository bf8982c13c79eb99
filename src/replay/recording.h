// What a replay asks: recorded requests with their times and lengths, what their tokens are, and which of
// them are the same. Prompts are made when they are asked for, since a hundred thousand of them fit no
// memory.
#ifndef TRIAXIAL_REPLAY_RECORDING_H_
#define TRIAXIAL_REPLAY_RECORDING_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/status.h"
#include "io/model_config.h"
#include "kv/block.h"
#include "kv/tag.h"

namespace triaxial {

inline constexpr int kTraceBlockTokens = 512;  // of a hash id in Mooncake's traces

// What the tokens of a trace are, which no trace says: a system prompt, then turns of one shape.
struct TagMix {
  struct Part {
    Modal modal = Modal::kText;
    Semantic semantic = Semantic::kUser;
    int32_t tokens = 0;  // at least 1
  };
  int32_t system_tokens = 512;  // instructions
  std::vector<Part> turn = {
      {Modal::kText, Semantic::kDelim, 16},     {Modal::kText, Semantic::kUser, 112},
      {Modal::kText, Semantic::kObs, 576},      {Modal::kText, Semantic::kAssistant, 192},
      {Modal::kText, Semantic::kToolCall, 112}, {Modal::kText, Semantic::kDelim, 16},
  };
};
// {"system_tokens": 512, "turn": [{"tag": "text/obs", "tokens": 576}, ...]}; the tag is modal/semantic.
Result<TagMix> LoadTagMix(const std::string& path);

// A step of a conversation, rendered by the chat template: the prompt, then the recorded answer.
struct RenderedStep {
  struct Picture {
    int32_t begin = 0;
    int32_t tokens = 0;
    uint64_t hash_lo = 0;
    uint64_t hash_hi = 0;
  };
  std::vector<int32_t> tokens;
  std::vector<uint8_t> tags;  // Tag::index() of each when the step runs
  std::vector<Picture> pictures;
  int32_t system_tokens = 0;  // leading ones that do not depend on the conversation
};

struct RecordedRequest {
  double arrival = 0;         // seconds since the recording's first request; 0 for steps of a conversation
  int32_t prompt_tokens = 0;  // at least 1
  int32_t output_tokens = 0;  // at least 1
  // One of the two, or neither: a request of a trace that shares nothing.
  std::vector<int64_t> blocks;                   // ids of its blocks of kTraceBlockTokens
  std::shared_ptr<const RenderedStep> rendered;  // prompt_tokens + output_tokens tokens
};

// A conversation, whose steps follow each other; or a trace's request by itself.
struct RecordedSession {
  std::string id;
  std::vector<RecordedRequest> steps;  // at least one
};

struct Recording {
  std::vector<RecordedSession> trace;   // single requests, by time of arrival
  std::vector<RecordedSession> agents;  // conversations
  double trace_seconds = 0;             // after which the trace may begin anew
  TagMix mix;
  // Ids of blocks that more than one request in a hundred has (system prompts): they are the same in every
  // repetition. Sorted.
  std::vector<int64_t> common_blocks;
};

struct RecordingOptions {
  // Tokenizer and chat template for conversations; not needed for traces ("").
  std::string tokenizer_directory;
  std::string images;  // directory to which pictures' paths are relative; "": that of their file
  ModelConfig config;
  PreprocessorConfig preprocessor;
  std::optional<TagMix> mix;
};

// Reads files, each recognized by its first line: Mooncake's JSONL (timestamp in ms, input_length,
// output_length, hash_ids), Azure's CSV (TIMESTAMP,ContextTokens,GeneratedTokens), or conversations
// (text/conversation_file.h; pictures as paths or data: URLs). An output of 0 tokens counts as 1. Errors
// name file, line and field.
Result<Recording> LoadRecording(const std::vector<std::string>& paths, const RecordingOptions& options);

// Tokens of one request, its answer included; overwrites `out`. `number` tells requests apart that share
// nothing, `repetition` the rounds through the recording: conversations of another round share their system
// prompts only, traces their common blocks.
void FillTokens(const Recording& recording, const RecordedRequest& request, int64_t number,
                int64_t repetition, std::vector<KvToken>* out);

}  // namespace triaxial

#endif  // TRIAXIAL_REPLAY_RECORDING_H_
