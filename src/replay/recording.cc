#include "replay/recording.h"

#include <algorithm>
#include <unordered_map>

#include "base/check.h"
#include "base/file.h"
#include "io/json_fields.h"
#include "replay/recording_readers.h"

namespace triaxial {
namespace {

constexpr size_t kMaxFileBytes = size_t{1} << 30;

// The hi half of identities that are no real tokens: of a trace's blocks, and of what nobody else has.
constexpr uint64_t kTraceBlock = uint64_t{1} << 62;
constexpr uint64_t kUnshared = uint64_t{1} << 61;
constexpr uint64_t kOdd = 0x9E3779B97F4A7C15;  // spreads the number of a round over a hash

template <typename Axis>
bool ParseAxis(std::string_view name, int count, Axis* out) {
  for (int i = 0; i < count; ++i) {
    if (Name(static_cast<Axis>(i)) != name) continue;
    *out = static_cast<Axis>(i);
    return true;
  }
  return false;
}

Result<TagMix::Part> ParsePart(const Json& json, const std::string& path, size_t index) {
  const std::string what = path + ": turn[" + std::to_string(index) + "]";
  if (!json.is_object()) return InvalidArgument(what + R"( must be like {"tag": "text/obs", "tokens": 500})");
  const JsonFields fields(json, path, "turn[" + std::to_string(index) + "].");
  std::string tag;
  TagMix::Part part;
  RETURN_IF_ERROR(fields.String("tag", &tag));
  RETURN_IF_ERROR(fields.Int("tokens", 1, kMaxRecordedTokens, &part.tokens));
  const size_t slash = tag.find('/');
  if (slash == std::string::npos || !ParseAxis(tag.substr(0, slash), kModals, &part.modal) ||
      !ParseAxis(tag.substr(slash + 1), kSemantics, &part.semantic)) {
    return fields.Wrong("tag", R"(modal/semantic, such as "text/obs" or "image/obs")");
  }
  return part;
}

std::vector<int64_t> CommonBlocks(const std::vector<RecordedSession>& trace) {
  std::unordered_map<int64_t, size_t> requests;
  for (const RecordedSession& session : trace) {
    for (const int64_t id : session.steps[0].blocks) ++requests[id];
  }
  std::vector<int64_t> common;
  for (const auto& [id, count] : requests) {
    if (count > 1 && count * 100 > trace.size()) common.push_back(id);
  }
  std::sort(common.begin(), common.end());
  return common;
}

// Turns of a trace's prompt lie at fixed places, so that equal prefixes have equal roles.
void FillMix(const TagMix& mix, const RecordedRequest& request, std::vector<KvToken>* out) {
  int32_t turn_tokens = 0;
  for (const TagMix::Part& part : mix.turn) turn_tokens += part.tokens;
  const int32_t prompt = request.prompt_tokens;
  const int32_t system = std::min(mix.system_tokens, prompt);
  const int last_turn = (prompt - 1 - system) / turn_tokens;
  int32_t at = 0;
  const auto put = [&](int32_t count, Temporal age, Modal modal, Semantic semantic) {
    const auto tag = static_cast<uint8_t>(Tag{age, modal, semantic}.index());
    for (const int32_t end = at + count; at < end; ++at) (*out)[static_cast<size_t>(at)].tag = tag;
  };
  // Tokens before the first user block share the first turn.
  put(system, Age(0, last_turn), Modal::kText, Semantic::kInst);
  for (int turn = 0; at < prompt; ++turn) {
    for (const TagMix::Part& part : mix.turn) {
      put(std::min(part.tokens, prompt - at), Age(turn, last_turn), part.modal, part.semantic);
    }
  }
  put(request.output_tokens, Temporal::kCurrent, Modal::kText, Semantic::kAssistant);
}

void FillTrace(const Recording& recording, const RecordedRequest& request, int64_t number, int64_t repetition,
               std::vector<KvToken>* out) {
  FillMix(recording.mix, request, out);
  const std::vector<int64_t>& common = recording.common_blocks;
  size_t at = 0;
  for (const int64_t id : request.blocks) {
    const size_t end = std::min(at + kTraceBlockTokens, static_cast<size_t>(request.prompt_tokens));
    const bool everywhere = std::binary_search(common.begin(), common.end(), id);
    const uint64_t hi = kTraceBlock | (everywhere ? 0 : static_cast<uint64_t>(repetition));
    for (uint64_t lo = static_cast<uint64_t>(id) * kTraceBlockTokens; at < end; ++at, ++lo) {
      (*out)[at].content = {lo, hi};
    }
  }
  for (; at < out->size(); ++at) (*out)[at].content = {at, kUnshared | static_cast<uint64_t>(number)};
}

void FillConversation(const RenderedStep& step, int64_t repetition, std::vector<KvToken>* out) {
  const auto round = static_cast<uint64_t>(repetition);
  for (size_t i = 0; i < step.tokens.size(); ++i) {
    KvToken& token = (*out)[i];
    token.tag = step.tags[i];
    token.content = ContentId::OfToken(step.tokens[i]);
    if (static_cast<int32_t>(i) >= step.system_tokens) token.content.hi = round;
  }
  for (const RenderedStep::Picture& picture : step.pictures) {
    const uint64_t hi = picture.hash_hi ^ round * kOdd;
    for (int32_t i = 0; i < picture.tokens; ++i) {
      (*out)[static_cast<size_t>(picture.begin + i)].content = ContentId::OfPicture(picture.hash_lo, hi, i);
    }
  }
}

}  // namespace

Status ForEachLine(std::string_view text, const std::string& path,
                   const std::function<Status(std::string_view line, const std::string& what)>& line) {
  size_t number = 0;
  while (!text.empty()) {
    ++number;
    const size_t newline = std::min(text.find('\n'), text.size());
    std::string_view part = text.substr(0, newline);
    text.remove_prefix(std::min(newline + 1, text.size()));
    if (part.ends_with('\r')) part.remove_suffix(1);
    if (part.find_first_not_of(" \t") == std::string_view::npos) continue;
    RETURN_IF_ERROR(line(part, path + ", line " + std::to_string(number)));
  }
  return OkStatus();
}

Result<TagMix> LoadTagMix(const std::string& path) {
  ASSIGN_OR_RETURN(const Json json, ReadJsonFile(path, size_t{1} << 20));
  if (!json.is_object())
    return InvalidArgument(path + " must hold a JSON object with system_tokens and turn");
  const JsonFields fields(json, path);
  TagMix mix;
  RETURN_IF_ERROR(fields.Int("system_tokens", 0, kMaxRecordedTokens, &mix.system_tokens));
  const auto turn = json.find("turn");
  if (turn == json.end() || !turn->is_array() || turn->empty() || turn->size() > 1000) {
    return fields.Wrong("turn", "a list of 1 to 1000 parts");
  }
  mix.turn.clear();
  int64_t tokens = 0;
  for (size_t i = 0; i < turn->size(); ++i) {
    ASSIGN_OR_RETURN(const TagMix::Part part, ParsePart((*turn)[i], path, i));
    mix.turn.push_back(part);
    tokens += part.tokens;
  }
  if (tokens > kMaxRecordedTokens) {
    return InvalidArgument(path + ": a turn of " + std::to_string(tokens) + " tokens is too long; at most " +
                           std::to_string(kMaxRecordedTokens));
  }
  return mix;
}

Result<Recording> LoadRecording(const std::vector<std::string>& paths, const RecordingOptions& options) {
  CHECK(!paths.empty());
  Recording recording;
  recording.mix = options.mix.value_or(TagMix{});
  const auto add = [](std::vector<RecordedSession> sessions, std::vector<RecordedSession>* to) {
    to->insert(to->end(), std::make_move_iterator(sessions.begin()), std::make_move_iterator(sessions.end()));
  };
  int64_t files = -1;
  for (const std::string& path : paths) {
    ++files;
    ASSIGN_OR_RETURN(const std::string text, ReadFile(path, kMaxFileBytes));
    const std::string_view first = std::string_view(text).substr(0, std::min(text.find('\n'), text.size()));
    if (first.find("\"messages\"") != std::string_view::npos || first.starts_with('[')) {
      ASSIGN_OR_RETURN(auto sessions, ReadConversations(path, options));
      add(std::move(sessions), &recording.agents);
    } else if (first.starts_with(kAzureHeader)) {
      ASSIGN_OR_RETURN(auto sessions, ReadAzure(text, path));
      add(std::move(sessions), &recording.trace);
    } else if (first.starts_with('{')) {
      ASSIGN_OR_RETURN(auto sessions, ReadMooncake(text, path));
      // Ids of different files have nothing to do with each other.
      for (RecordedSession& session : sessions) {
        for (int64_t& id : session.steps[0].blocks) id += (kMaxHashId + 1) * files;
      }
      add(std::move(sessions), &recording.trace);
    } else {
      return InvalidArgument(path +
                             " is no trace: its first line is neither a JSON object with messages or with "
                             "timestamp, input_length and output_length, nor " +
                             std::string(kAzureHeader));
    }
  }
  std::vector<RecordedSession>& trace = recording.trace;
  std::stable_sort(trace.begin(), trace.end(), [](const RecordedSession& a, const RecordedSession& b) {
    return a.steps[0].arrival < b.steps[0].arrival;
  });
  if (!trace.empty()) {
    // A repetition begins one mean gap after the last request.
    const double last = trace.back().steps[0].arrival;
    recording.trace_seconds = last + last / static_cast<double>(std::max<size_t>(1, trace.size() - 1));
  }
  recording.common_blocks = CommonBlocks(trace);
  return recording;
}

void FillTokens(const Recording& recording, const RecordedRequest& request, int64_t number,
                int64_t repetition, std::vector<KvToken>* out) {
  out->assign(static_cast<size_t>(request.prompt_tokens) + static_cast<size_t>(request.output_tokens), {});
  if (request.rendered == nullptr) return FillTrace(recording, request, number, repetition, out);
  CHECK(request.rendered->tokens.size() == out->size());
  FillConversation(*request.rendered, repetition, out);
}

}  // namespace triaxial
