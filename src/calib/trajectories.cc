#include "calib/trajectories.h"

#include <fmt/format.h>
#include <xxhash.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <utility>

#include "base/file.h"

namespace triaxial {
namespace {

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
  for (const std::string& path : paths) {
    ASSIGN_OR_RETURN(ConversationFile file, ConversationFile::Open(path));
    for (size_t i = 0; i < file.size(); ++i) trajectories.places_.push_back({trajectories.files_.size(), i});
    trajectories.files_.push_back(std::move(file));
  }
  return trajectories;
}

std::string Trajectories::NameOf(size_t index) const {
  const Place& place = places_[index];
  return files_[place.file].NameOf(place.index);
}

Result<Prompt> Trajectories::Read(size_t index, const ServedModel& model) const {
  const Place& place = places_[index];
  ASSIGN_OR_RETURN(const ConversationLine line, files_[place.file].Read(place.index));
  ASSIGN_OR_RETURN(const Conversation conversation, line.Parse());
  TemplateOptions options;
  options.add_generation_prompt = false;
  Result<Prompt> prompt = BuildChatPrompt(model, conversation, options, ImageFromFiles(line.images));
  if (!prompt.ok()) return line.Error(prompt.status());
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
