// Recorded conversations to calibrate on: files with one JSON object {"messages", "tools"} a line (OpenAI's
// form, or {"request": that}), read one at a time however large the files are.
#ifndef TRIAXIAL_CALIB_TRAJECTORIES_H_
#define TRIAXIAL_CALIB_TRAJECTORIES_H_

#include <cstdint>
#include <string>
#include <vector>

#include "base/status.h"
#include "serve/served_model.h"
#include "text/prompt.h"

namespace triaxial {

class Trajectories {
 public:
  // Finds the lines that are not blank. NotFound for a missing file, InvalidArgument if there is no
  // conversation or a line has more than 256 MiB.
  static Result<Trajectories> Open(const std::vector<std::string>& paths);

  size_t size() const { return lines_.size(); }
  std::string NameOf(size_t index) const;  // "FILE, line 3"
  // The conversation as the model reads it, pictures (paths relative to the file, or data: URLs) included.
  // Errors name file and line.
  Result<Prompt> Read(size_t index, const ServedModel& model) const;

 private:
  struct Line {
    size_t file;
    int64_t number;  // from 1
    int64_t offset;  // in bytes
    int64_t bytes;
  };
  std::vector<std::string> paths_;
  std::vector<Line> lines_;
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
