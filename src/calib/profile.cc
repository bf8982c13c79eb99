#include "calib/profile.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>

namespace triaxial {
namespace {

constexpr double kMaxConversations = 1 << 30;

bool Good(const Json& value) {
  return value.is_number() && value.get<double>() >= 0 && std::isfinite(value.get<double>());
}

}  // namespace

void SensitivityProfile::Add(const ConversationLoss& conversation) {
  for (size_t t = 0; t < kTags; ++t) {
    tokens[t] += conversation.tokens[t];
    for (size_t f = 0; f < kFormats; ++f) loss[t][f] += conversation.loss[t][f];
  }
  ++conversations;
  length += conversation.length;
}

Json ProfileToJson(const SensitivityProfile& profile) {
  Json tags = Json::object();
  for (int t = 0; t < kTags; ++t) {
    const auto i = static_cast<size_t>(t);
    if (profile.tokens[i] <= 0) continue;
    Json& entry = tags[Name(Tag::FromIndex(t))];
    entry["tokens"] = profile.tokens[i];
    for (int f = 0; f < kFormats; ++f) {
      entry[std::string(Name(static_cast<Format>(f)))] = profile.loss[i][static_cast<size_t>(f)];
    }
  }
  return {{"conversations", profile.conversations}, {"length", profile.length}, {"tags", std::move(tags)}};
}

Result<SensitivityProfile> ParseProfile(const Json& json, const std::string& what) {
  SensitivityProfile profile;
  const Status wrong = InvalidArgument(
      what + " holds no sums of an interrupted calibration; remove the file, or name another one");
  if (!json.is_object() || json.size() != 3 || !json.contains("tags") || !json["tags"].is_object())
    return wrong;
  for (const char* field : {"conversations", "length"}) {
    if (!json.contains(field) || !json[field].is_number_integer() || !Good(json[field])) return wrong;
  }
  if (json["conversations"].get<double>() > kMaxConversations) return wrong;
  profile.conversations = json["conversations"].get<int>();
  profile.length = json["length"].get<int64_t>();
  for (int t = 0; t < kTags; ++t) {
    const auto found = json["tags"].find(Name(Tag::FromIndex(t)));
    if (found == json["tags"].end()) continue;
    if (!found->is_object() || found->size() != kFormats + 1 || !found->contains("tokens") ||
        !Good((*found)["tokens"])) {
      return wrong;
    }
    profile.tokens[static_cast<size_t>(t)] = (*found)["tokens"].get<double>();
    for (int f = 0; f < kFormats; ++f) {
      const std::string name(Name(static_cast<Format>(f)));
      if (!found->contains(name) || !Good((*found)[name])) return wrong;
      profile.loss[static_cast<size_t>(t)][static_cast<size_t>(f)] = (*found)[name].get<double>();
    }
  }
  return profile;
}

TagTotals MeanTokens(const SensitivityProfile& profile) {
  TagTotals mean = profile.tokens;
  for (double& tokens : mean) tokens /= std::max(1, profile.conversations);
  return mean;
}

Result<LossTable> MakeLossTable(const SensitivityProfile& profile) {
  LossTable table;
  std::array<double, kFormats> mean{};
  double tokens = 0;
  for (size_t t = 0; t < kTags; ++t) {
    tokens += profile.tokens[t];
    for (size_t f = 0; f < kFormats; ++f) mean[f] += profile.loss[t][f];
  }
  if (!(tokens > 0)) {
    return InvalidArgument("no conversation with a token was measured; give trajectories that have some");
  }
  const auto fill = [&](size_t tag, const std::array<double, kFormats>& loss, double count) {
    bool falls = true;
    double least = INFINITY;
    for (size_t f = 0; f < kFormats; ++f) {
      falls = falls && loss[f] <= least;
      least = std::min(least, loss[f]);
      table.per_token[tag][f] = static_cast<float>(least / count);
    }
    table.per_token[tag][static_cast<size_t>(Format::kBf16)] = 0;
    return falls;
  };
  for (int t = 0; t < kTags; ++t) {
    const auto i = static_cast<size_t>(t);
    if (profile.tokens[i] > 0) {
      if (!fill(i, profile.loss[i], profile.tokens[i])) table.not_falling.push_back(t);
      continue;
    }
    const Tag tag = Tag::FromIndex(t);
    int nearest = -1;
    int distance = kTemporals;
    for (int age = 0; age < kTemporals; ++age) {
      const int other = Tag{static_cast<Temporal>(age), tag.modal, tag.semantic}.index();
      const int away = std::abs(age - static_cast<int>(tag.temporal));
      if (profile.tokens[static_cast<size_t>(other)] > 0 && away < distance) {
        nearest = other;
        distance = away;
      }
    }
    const auto from = static_cast<size_t>(nearest);
    if (nearest >= 0) {
      fill(i, profile.loss[from], profile.tokens[from]);
    } else {
      fill(i, mean, tokens);
    }
    table.fallbacks.emplace_back(t, nearest >= 0 ? Name(Tag::FromIndex(nearest)) : "mean");
  }
  return table;
}

}  // namespace triaxial
