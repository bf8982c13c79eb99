// Sensitivities of many conversations, added up: what `triaxial calibrate` keeps between two of them, and
// what a priced policy is made of.
#ifndef TRIAXIAL_CALIB_PROFILE_H_
#define TRIAXIAL_CALIB_PROFILE_H_

#include <string>
#include <utility>
#include <vector>

#include "base/json.h"
#include "base/status.h"
#include "calib/sensitivity.h"
#include "kv/policy.h"

namespace triaxial {

struct SensitivityProfile {
  TagLosses loss{};    // D, summed over conversations
  TagTotals tokens{};  // summed over conversations
  int conversations = 0;
  int64_t length = 0;  // tokens of all conversations

  void Add(const ConversationLoss& conversation);
  bool operator==(const SensitivityProfile&) const = default;
};
// Doubles read back to the bit. Errors: InvalidArgument that begins with `what`.
Json ProfileToJson(const SensitivityProfile& profile);
Result<SensitivityProfile> ParseProfile(const Json& json, const std::string& what);

// What policies call distortion: loss of one token, D[tag][format] over the mean number of the tag's tokens
// in a conversation. So the losses that a policy's `counts` multiply to are the means over conversations, as
// published.
struct LossTable {
  std::array<std::array<float, kFormats>, kTags> per_token{};
  // Tags that no conversation has, and where their losses come from: the tag of the same modality and
  // semantic that is nearest in age (of two, the more recent), else "mean", that of all tokens.
  std::vector<std::pair<int, std::string>> fallbacks;
  // Tags for which some format lost more than one of fewer bits. Such a format counts as no better and no
  // worse than that one (losses of a policy fall with bits), so it is never chosen over it.
  std::vector<int> not_falling;
};
// InvalidArgument if the profile has no token.
Result<LossTable> MakeLossTable(const SensitivityProfile& profile);
// Mean tokens of a conversation by tag.
TagTotals MeanTokens(const SensitivityProfile& profile);

}  // namespace triaxial

#endif  // TRIAXIAL_CALIB_PROFILE_H_
