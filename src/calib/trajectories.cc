#include "calib/trajectories.h"

#include <fmt/format.h>
#include <xxhash.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <memory>
#include <numeric>

#include "base/file.h"
#include "base/json.h"

namespace triaxial {
namespace {

constexpr int64_t kMaxLine = int64_t{256} << 20;

bool IsBlank(const std::string& line) { return line.find_first_not_of(" \t\r\n") == std::string::npos; }

// A generator that is the same in every standard library (SplitMix64).
uint64_t Next(uint64_t* state) {
  uint64_t z = *state += 0x9e3779b97f4a7c15;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9;
  z = (z ^ z >> 27) * 0x94d049bb133111eb;
  return z ^ z >> 31;
}

}  // namespace

Result<Trajectories> Trajectories::Open(const std::vector<std::string>& paths) {
  Trajectories trajectories;
  trajectories.paths_ = paths;
  for (size_t file = 0; file < paths.size(); ++file) {
    std::error_code ignored;
    std::ifstream in(paths[file], std::ios::binary);
    if (!in || std::filesystem::is_directory(paths[file], ignored)) {
      return NotFound("cannot open the trajectories '" + paths[file] + "'; give a file of JSON lines");
    }
    int64_t offset = 0;
    int64_t number = 0;
    for (std::string line; std::getline(in, line);) {
      ++number;
      const auto bytes = static_cast<int64_t>(line.size());
      if (bytes > kMaxLine) {
        return InvalidArgument(fmt::format("{}, line {} has {} bytes; a conversation may have {}",
                                           paths[file], number, bytes, kMaxLine));
      }
      if (!IsBlank(line)) trajectories.lines_.push_back({file, number, offset, bytes});
      offset += bytes + 1;
    }
    if (in.bad()) return Internal("reading '" + paths[file] + "' failed");
  }
  if (!trajectories.lines_.empty()) return trajectories;
  return InvalidArgument(
      (paths.size() == 1 ? "'" + paths[0] + "' holds" : std::string("the trajectories hold")) +
      " no conversation; give JSON lines such as {\"messages\": [...], \"tools\": [...]}");
}

std::string Trajectories::NameOf(size_t index) const {
  const Line& line = lines_[index];
  return fmt::format("{}, line {}", paths_[line.file], line.number);
}

Result<Prompt> Trajectories::Read(size_t index, const ServedModel& model) const {
  const Line& line = lines_[index];
  const std::string what = NameOf(index);
  std::ifstream in(paths_[line.file], std::ios::binary);
  std::string text(static_cast<size_t>(line.bytes), '\0');
  in.seekg(line.offset);
  if (!in.read(text.data(), line.bytes))
    return DataLoss(what + " cannot be read any more; the file has changed");
  ASSIGN_OR_RETURN(Json json, ParseJson(text, what));
  if (json.is_object() && json.contains("request")) json = Json(json["request"]);
  if (!json.is_object() || !json.contains("messages")) {
    return InvalidArgument(what +
                           " has no messages; expected an object {\"messages\": [...], \"tools\": [...]}");
  }
  const auto in_line = [&](const Status& status) {
    return Status(status.code(), what + ": " + status.message());
  };
  const Result<Conversation> conversation = ParseConversation(json["messages"], json.value("tools", Json()));
  if (!conversation.ok()) return in_line(conversation.status());
  TemplateOptions options;
  options.add_generation_prompt = false;
  const std::string directory = std::filesystem::path(paths_[line.file]).parent_path().string();
  Result<Prompt> prompt = BuildChatPrompt(model, *conversation, options, ImageFromFiles(directory));
  if (!prompt.ok()) return in_line(prompt.status());
  return prompt;
}

std::vector<size_t> ChooseConversations(size_t size, size_t count, uint64_t seed) {
  std::vector<size_t> order(size);
  std::iota(order.begin(), order.end(), size_t{0});
  for (size_t i = 0; i + 1 < size; ++i) std::swap(order[i], order[i + Next(&seed) % (size - i)]);
  if (count > 0 && count < size) order.resize(count);
  return order;
}

bool CutPrompt(int32_t max_tokens, Prompt* prompt) {
  if (static_cast<int64_t>(prompt->tokens.size()) <= max_tokens) return false;
  for (const PromptImage& image : prompt->images) {
    if (image.begin < max_tokens && image.begin + image.tokens > max_tokens) max_tokens = image.begin;
  }
  prompt->tokens.resize(static_cast<size_t>(max_tokens));
  std::erase_if(prompt->images, [&](const PromptImage& image) { return image.begin >= max_tokens; });
  std::erase_if(prompt->spans, [&](const TagSpan& span) { return span.begin >= max_tokens; });
  if (!prompt->spans.empty()) prompt->spans.back().end = std::min(prompt->spans.back().end, max_tokens);
  return true;
}

Result<std::string> HashFiles(const std::vector<std::string>& paths) {
  const std::unique_ptr<XXH3_state_t, decltype(&XXH3_freeState)> state(XXH3_createState(), &XXH3_freeState);
  if (state == nullptr) return ResourceExhausted("no memory for a hash");
  XXH3_128bits_reset(state.get());
  for (const std::string& path : paths) {
    ASSIGN_OR_RETURN(const MappedFile file, MappedFile::Open(path));
    XXH3_128bits_update(state.get(), file.data(), file.size());
  }
  const XXH128_hash_t hash = XXH3_128bits_digest(state.get());
  return fmt::format("{:016x}{:016x}", hash.high64, hash.low64);
}

}  // namespace triaxial
