// Recorded conversations as the requests that a server would have been sent, each with what the model
// answered.
#ifndef TRIAXIAL_CALIB_RECORDED_STEPS_H_
#define TRIAXIAL_CALIB_RECORDED_STEPS_H_

#include <cstdint>
#include <string>
#include <vector>

#include "base/json.h"
#include "base/status.h"
#include "model/batch.h"
#include "serve/served_model.h"
#include "text/conversation_file.h"

namespace triaxial {

// One answer of the assistant. `prompt` is the request that led to it, as the chat template renders it: what
// the template drops (thoughts of earlier turns) is dropped.
struct RecordedStep {
  Prompt prompt;                // pictures are shared by the steps of a conversation
  MropePositions positions;     // of the prompt
  std::vector<int32_t> output;  // what the model wrote, <|im_end|> last
  std::vector<uint8_t> tags;    // [output] Tag::index() as the server tags what is generated
  int32_t action = 0;           // output[action...] is what the client sees: calls or the answer, no thought
  int32_t message = 0;          // index among the conversation's messages
  bool calls_tools = false;
  int32_t length() const { return static_cast<int32_t>(prompt.tokens.size() + output.size()); }
};

struct RecordedConversation {
  std::string id;
  std::vector<RecordedStep> steps;
  int32_t longest = 0;  // tokens of its longest step
};

// The lines of a JSONL file; made into steps one at a time, because pictures take memory.
struct RecordedFile {
  std::string path;
  std::vector<ConversationLine> lines;
  // [lines] Messages in front that are only read, their answers no steps; empty: none.
  std::vector<size_t> history;
};

// At most `limit` conversations (0: all), from the first on. Pictures are relative to the file if `images` is
// "". Errors as ConversationFile::Open and Read.
Result<RecordedFile> LoadRecorded(const std::string& path, const std::string& images, size_t limit);

// Makes conversations long: each gets the messages of the `count` before it (of the first ones: of the last)
// in front of its own, behind its own system prompt and tools. Answers of its own stay its only steps.
Status PutBehind(size_t count, RecordedFile* file);

// Line `line` (from 0) as steps. InvalidArgument names file, line and message: what cannot be rendered, a
// conversation in which the assistant says nothing, or one longer than the model.
Result<RecordedConversation> PrepareRecorded(const ServedModel& model, const RecordedFile& file, size_t line);

}  // namespace triaxial

#endif  // TRIAXIAL_CALIB_RECORDED_STEPS_H_
