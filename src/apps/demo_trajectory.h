// Recorded agent conversations: read from a file, asked of a server step by step, and compared with its
// answers.
#ifndef TRIAXIAL_APPS_DEMO_TRAJECTORY_H_
#define TRIAXIAL_APPS_DEMO_TRAJECTORY_H_

#include <string>
#include <vector>

#include "base/json.h"
#include "base/status.h"

namespace triaxial {

struct Trajectory {
  std::string id;
  Json messages;              // OpenAI chat format; every picture as a data: URL
  Json tools;                 // null if there are none
  std::vector<size_t> steps;  // indices of the assistant's messages
  bool request = false;  // the line was one request, {"request": {...}}, rather than a whole conversation
};

// The first `limit` (0: all) conversations of a file (text/conversation_file.h). Pictures are paths relative
// to `images` (empty: to the file), or data: URLs. Errors name file and line.
Result<std::vector<Trajectory>> LoadTrajectories(const std::string& path, size_t limit,
                                                 const std::string& images = "");

// The chat request that leads to the recorded assistant message: greedy, not streamed.
Json StepRequest(const Trajectory& trajectory, size_t step, const std::string& model, int max_tokens);

// Whether an answer does what the recorded message does: the same tool calls in the same order, name and
// every argument equal as JSON values; without calls, the same content. Reasoning is not compared.
bool SameAnswer(const Json& answer, const Json& recorded);

}  // namespace triaxial

#endif  // TRIAXIAL_APPS_DEMO_TRAJECTORY_H_
