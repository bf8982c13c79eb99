// The three axes by which TriAxial decides how precisely a token's keys and values are stored
// (TriAxialKV, arXiv 2605.17170, section "tags"): how recent, which modality, which role.
#ifndef TRIAXIAL_KV_TAG_H_
#define TRIAXIAL_KV_TAG_H_

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace triaxial {

// Age in turns. A turn starts at every user block of the chat template; tool responses ride in user blocks,
// so every agent step is a turn. Tokens before the first user block share the first turn.
enum class Temporal : uint8_t { kCurrent, kM1, kM2, kOlder };
enum class Modal : uint8_t { kText, kImage };
enum class Semantic : uint8_t {
  kInst,       // system prompt and tool schemas
  kUser,       // text that the user wrote
  kAssistant,  // answers of the model
  kReasoning,  // its thoughts
  kToolCall,   // its tool calls
  kObs,        // tool responses and screenshots
  kDelim,      // scaffolding of the template
};
inline constexpr int kTemporals = 4;
inline constexpr int kModals = 2;
inline constexpr int kSemantics = 7;
inline constexpr int kTags = kTemporals * kModals * kSemantics;

struct Tag {
  Temporal temporal = Temporal::kCurrent;
  Modal modal = Modal::kText;
  Semantic semantic = Semantic::kUser;

  // Dense index in [0, kTags).
  int index() const {
    return (static_cast<int>(temporal) * kModals + static_cast<int>(modal)) * kSemantics +
           static_cast<int>(semantic);
  }
  static Tag FromIndex(int index) {
    return {static_cast<Temporal>(index / (kModals * kSemantics)),
            static_cast<Modal>(index / kSemantics % kModals), static_cast<Semantic>(index % kSemantics)};
  }
  bool operator==(const Tag&) const = default;
};

std::string_view Name(Temporal temporal);  // "current", "m1", "m2", "older"
std::string_view Name(Modal modal);        // "text", "image"
std::string_view Name(
    Semantic semantic);            // "inst", "user", "assistant", "reasoning", "tool_call", "obs", "delim"
std::string Name(const Tag& tag);  // "current/text/user"

// A run of tokens [begin, end) with everything about their tags that does not change as the conversation goes
// on.
struct TagSpan {
  int32_t begin = 0;
  int32_t end = 0;
  int32_t message = -1;  // index in the request's messages; -1 for scaffolding that belongs to none
  int32_t turn = 0;      // 0-based
  Modal modal = Modal::kText;
  Semantic semantic = Semantic::kUser;
};

// Age of a token of `turn` when `last_turn` is the conversation's newest.
inline Temporal Age(int turn, int last_turn) {
  const int age = last_turn - turn;
  return age <= 0   ? Temporal::kCurrent
         : age == 1 ? Temporal::kM1
         : age == 2 ? Temporal::kM2
                    : Temporal::kOlder;
}

// One tag per token for spans that cover [0, tokens) without gaps; the newest turn is that of the last span.
std::vector<Tag> TagTokens(const std::vector<TagSpan>& spans, int32_t tokens);

}  // namespace triaxial

#endif  // TRIAXIAL_KV_TAG_H_
