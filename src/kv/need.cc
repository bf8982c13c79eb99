#include "kv/need.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "base/check.h"

namespace triaxial {
namespace {

size_t Index(Format format) { return static_cast<size_t>(format); }

double LossOf(const BlockNeed& need, Format format) { return need.loss[Index(format)]; }

// Formats that a block may take, from fewest to most bits.
template <typename Fn>
void ForEachAllowed(const TagNeeds& needs, Format floor, const Fn& fn) {
  for (int f = static_cast<int>(floor); f < kFormats; ++f) {
    if (needs.allowed[static_cast<size_t>(f)] || f == kFormats - 1) fn(static_cast<Format>(f));
  }
}

}  // namespace

std::string_view Name(Cause cause) {
  switch (cause) {
    case Cause::kWindow:
      return "window";
    case Cause::kAge:
      return "age";
    case Cause::kPressure:
      return "pressure";
    case Cause::kBudget:
      return "budget";
  }
  return "";
}

TagNeeds TagNeeds::Uniform(Format format) {
  TagNeeds needs;
  needs.wish.fill(format);
  return needs;
}

TagNeeds TagNeeds::ByIndex() {
  TagNeeds needs = Uniform(Format::kBf16);
  for (size_t f = 0; f < kFormats; ++f) needs.wish[f] = static_cast<Format>(f);
  return needs;
}

TagNeeds ResolveNeeds(const Policy& policy, const KvGeometry& geometry, bool two_bit_keys,
                      double budget_bits) {
  TagNeeds needs;
  needs.priced = policy.priced;
  needs.recent_window = policy.recent_window;
  if (!two_bit_keys) needs.allowed[Index(Format::kK2V2)] = false;
  const auto allowed = [&](Format format) {
    return !two_bit_keys && format == Format::kK2V2 ? Format::kK4V2 : format;
  };
  needs.sink = allowed(policy.sink);
  for (size_t t = 0; t < kTags; ++t) {
    needs.wish[t] = allowed(policy.table[t]);
    needs.floor[t] = allowed(policy.floor[t]);
    needs.loss[t] = policy.distortion[t];
  }
  if (policy.priced) {
    needs.budget_bits = budget_bits > 0 ? budget_bits : policy.budget_bits;
    needs.rest_price = needs.budget_bits > 0
                           ? PriceForBudget(needs, policy.counts, geometry, needs.budget_bits)
                           : policy.price;
  }
  return needs;
}

void BlockNeed::Merge(const BlockNeed& other) {
  wish = std::max(wish, other.wish);
  floor = std::max(floor, other.floor);
  for (size_t f = 0; f < kFormats; ++f) loss[f] = std::max(loss[f], other.loss[f]);
}

BlockNeed NeedOf(const TagNeeds& needs, std::span<const uint8_t> tags, bool first_block) {
  CHECK(!tags.empty() && tags.size() <= kBlockTokens);
  BlockNeed need;
  std::array<Format, kBlockTokens> wishes;
  size_t pinned = 0;
  for (size_t i = 0; i < tags.size(); ++i) {
    const uint8_t tag = tags[i];
    wishes[i] = needs.wish[tag];
    if (needs.floor[tag] > Format::kK2V2) {
      ++pinned;
      need.floor = std::max(need.floor, needs.floor[tag]);
    }
    if (!needs.priced) continue;
    for (size_t f = 0; f < kFormats; ++f) need.loss[f] += needs.loss[tag][f];
  }
  // A pin is a rule about a role, and a block that merely touches it is not of that role.
  if (2 * pinned < tags.size()) need.floor = Format::kK2V2;
  if (first_block) need.floor = std::max(need.floor, needs.sink);
  if (!needs.allowed[Index(Format::kK2V2)]) need.floor = std::max(need.floor, Format::kK4V2);
  if (!needs.priced) need.wish = std::max(BlockFormat(std::span(wishes).first(tags.size())), need.floor);
  return need;
}

Format FloorFormat(const TagNeeds& needs, const BlockNeed& need) {
  for (int f = static_cast<int>(need.floor); f < kFormats; ++f) {
    if (needs.allowed[static_cast<size_t>(f)]) return static_cast<Format>(f);
  }
  return Format::kBf16;
}

Format Choose(const TagNeeds& needs, const BlockNeed& need, const KvGeometry& geometry, double price) {
  if (!needs.priced) return std::max(need.wish, need.floor);
  if (std::isinf(price)) return FloorFormat(needs, need);
  Format best = Format::kBf16;
  double least = std::numeric_limits<double>::infinity();
  ForEachAllowed(needs, need.floor, [&](Format f) {
    const double cost = LossOf(need, f) + price * HeadBytes(geometry, f);
    if (cost > least) return;  // of equal costs the more precise one
    least = cost;
    best = f;
  });
  return best;
}

Format FormatOfTag(const TagNeeds& needs, const KvGeometry& geometry, uint8_t tag) {
  std::array<uint8_t, kBlockTokens> tags;
  tags.fill(tag);
  return Choose(needs, NeedOf(needs, tags, /*first_block=*/false), geometry, needs.rest_price);
}

DemotionStep NextDemotion(const TagNeeds& needs, const BlockNeed& need, const KvGeometry& geometry,
                          Format format) {
  DemotionStep step{format, std::numeric_limits<double>::infinity()};
  if (!needs.priced) return step;
  ForEachAllowed(needs, need.floor, [&](Format f) {
    if (f >= format) return;
    const double saved = HeadBytes(geometry, format) - HeadBytes(geometry, f);
    if (saved <= 0) return;
    const double slope = std::max(0.0, LossOf(need, f) - LossOf(need, format)) / saved;
    if (slope < step.slope) step = {f, slope};  // of equal slopes the longer step, which comes first
  });
  return step;
}

double PriceForBudget(const TagNeeds& needs, const std::array<double, kTags>& counts,
                      const KvGeometry& geometry, double budget_bits) {
  double tokens = 0;
  for (const double count : counts) tokens += count;
  if (tokens <= 0) return 0;
  // A tag at a time, as blocks of that tag alone.
  std::array<BlockNeed, kTags> need;
  std::array<Format, kTags> format;
  double bits = 0;
  const auto weight = [&](size_t t) { return counts[t] / tokens; };
  for (size_t t = 0; t < kTags; ++t) {
    std::array<uint8_t, kBlockTokens> tags;
    tags.fill(static_cast<uint8_t>(t));
    need[t] = NeedOf(needs, tags, /*first_block=*/false);
    format[t] = Choose(needs, need[t], geometry, 0);
    bits += weight(t) * EffectiveBits(geometry, format[t]);
  }
  double price = 0;
  while (bits > budget_bits) {
    size_t cheapest = kTags;
    DemotionStep best{Format::kBf16, std::numeric_limits<double>::infinity()};
    for (size_t t = 0; t < kTags; ++t) {
      if (counts[t] <= 0) continue;
      const DemotionStep step = NextDemotion(needs, need[t], geometry, format[t]);
      if (step.slope < best.slope) {
        best = step;
        cheapest = t;
      }
    }
    if (cheapest == kTags) return std::numeric_limits<double>::infinity();
    bits -= weight(cheapest) * (EffectiveBits(geometry, format[cheapest]) - EffectiveBits(geometry, best.to));
    format[cheapest] = best.to;
    price = std::max(price, best.slope);
  }
  // Just above the last step's slope, so that its blocks take it.
  return price * (1 + 1e-9);
}

}  // namespace triaxial
