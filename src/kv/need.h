// What the tokens of a block need, and the format that follows. A fixed policy wishes for a format; a priced
// one says what each format would cost, and the block takes the one of least
//   distortion(block, format) + price * bytes(format)
// (the Lagrangian of TriAxialKV's allocation problem, arXiv 2605.17170, section "allocation").
#ifndef TRIAXIAL_KV_NEED_H_
#define TRIAXIAL_KV_NEED_H_

#include <array>
#include <cstdint>
#include <span>
#include <string_view>

#include "kv/format.h"
#include "kv/policy.h"
#include "kv/tag.h"

namespace triaxial {

// Why a block's format changed.
enum class Cause : uint8_t { kWindow, kAge, kPressure, kBudget };
inline constexpr int kCauses = 4;
std::string_view Name(Cause cause);  // "window", "age", "pressure", "budget"

// A policy resolved for one cache.
struct TagNeeds {
  bool priced = false;
  std::array<Format, kTags> wish{};                       // of a fixed policy
  std::array<Format, kTags> floor{};                      // pins: never less
  std::array<std::array<float, kFormats>, kTags> loss{};  // of a priced policy, per token; falls with bits
  Format sink = Format::kK2V2;                            // the floor of a sequence's first block
  int recent_window = 0;
  double rest_price = 0;   // per byte of one KV head and layer (HeadBytes), of a priced policy
  double budget_bits = 0;  // effective bits that it may rest at; 0: no budget
  // Formats that blocks may take: with the rotated codec and no calibration, 2-bit keys are none of them.
  std::array<bool, kFormats> allowed = [] {
    std::array<bool, kFormats> all{};
    all.fill(true);
    return all;
  }();

  static TagNeeds Uniform(Format format);
  // Tag f wishes for format f, for tests and benchmarks that say each token's format.
  static TagNeeds ByIndex();
};
// The policy for a cache. Without `two_bit_keys` the fewest bits of a key are 4. A `budget_bits` above 0
// replaces the policy's own.
TagNeeds ResolveNeeds(const Policy& policy, const KvGeometry& geometry, bool two_bit_keys,
                      double budget_bits);

// What a block needs: of one sequence, or the most of what several need.
struct BlockNeed {
  Format wish = Format::kK2V2;
  Format floor = Format::kK2V2;
  std::array<float, kFormats> loss{};

  void Merge(const BlockNeed& other);  // to the more demanding, field by field
  bool operator==(const BlockNeed&) const = default;
};
BlockNeed NeedOf(const TagNeeds& needs, std::span<const uint8_t> tags, bool first_block);

// The format that a block takes at a price; at price 0 of a priced policy, the most precise one.
Format Choose(const TagNeeds& needs, const BlockNeed& need, const KvGeometry& geometry, double price);

// What a block takes at rest if all its tokens have one tag.
Format FormatOfTag(const TagNeeds& needs, const KvGeometry& geometry, uint8_t tag);

// The fewest bits that it may have.
Format FloorFormat(const TagNeeds& needs, const BlockNeed& need);

// The next cheaper format for a block that has `format`, and the loss per byte of going there: the step of
// least slope down the convex hull of loss over bytes, so that the slopes of successive steps rise.
// `format` itself and an infinite slope if there is none (always so for a fixed policy).
struct DemotionStep {
  Format to;
  double slope;
};
DemotionStep NextDemotion(const TagNeeds& needs, const BlockNeed& need, const KvGeometry& geometry,
                          Format format);

// The price at which tokens in these proportions take at most `budget_bits` effective bits, tags apart
// (metadata included, tails not); the least such price. Infinity if even the floors take more.
double PriceForBudget(const TagNeeds& needs, const std::array<double, kTags>& counts,
                      const KvGeometry& geometry, double budget_bits);

}  // namespace triaxial

#endif  // TRIAXIAL_KV_NEED_H_
