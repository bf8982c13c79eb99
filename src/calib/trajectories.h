// Recorded conversations to calibrate on: those of some files (text/conversation_file.h), read one at a time
// however large the files are.
#ifndef TRIAXIAL_CALIB_TRAJECTORIES_H_
#define TRIAXIAL_CALIB_TRAJECTORIES_H_

#include <cstdint>
#include <string>
#include <vector>

#include "base/status.h"
#include "serve/served_model.h"
#include "text/conversation_file.h"
#include "text/prompt.h"

namespace triaxial {

class Trajectories {
 public:
  // Finds the conversations. Errors as ConversationFile::Open.
  static Result<Trajectories> Open(const std::vector<std::string>& paths);

  size_t size() const { return places_.size(); }
  std::string NameOf(size_t index) const;  // "FILE, line 3"
  // The conversation as the model reads it, pictures (paths relative to the file, or data: URLs) included.
  // Errors name file and line.
  Result<Prompt> Read(size_t index, const ServedModel& model) const;

 private:
  struct Place {
    size_t file;
    size_t index;  // within the file
  };
  std::vector<ConversationFile> files_;
  std::vector<Place> places_;
};

// `count` (0: all) of `size` indices in a random order that follows from the seed alone.
std::vector<size_t> ChooseConversations(size_t size, size_t count, uint64_t seed);

// The first `max_tokens` tokens, without a picture that would be cut through. True if that is less than there
// was.
bool CutPrompt(int32_t max_tokens, Prompt* prompt);

// XXH3-128 in hexadecimal of the files' contents, one after the other. Errors as opening or reading a file.
Result<std::string> HashFiles(const std::vector<std::string>& paths);

}  // namespace triaxial

#endif  // TRIAXIAL_CALIB_TRAJECTORIES_H_
