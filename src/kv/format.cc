#include "kv/format.h"

#include <array>

namespace triaxial {
namespace {

constexpr std::array<std::string_view, kFormats> kFormatNames = {"k2v2", "k4v2", "k4v4", "fp8", "bf16"};
constexpr std::array<std::string_view, 2> kCodecNames = {"rotated", "paper"};

// Capacity is exact only if no format pads: every size is a whole number of units.
constexpr bool WholeUnits(int head_dim, Codec codec) {
  const KvGeometry g{1, 1, head_dim, codec};
  for (int f = 0; f < kFormats; ++f) {
    for (const Side side : {Side::kK, Side::kV}) {
      if (SideBytes(g, Bits(static_cast<Format>(f), side)) % kUnitBytes != 0) return false;
    }
  }
  for (int capacity = kTailStep; capacity <= kBlockTokens; capacity += kTailStep) {
    if (SideBytes(g, 16, capacity) % kUnitBytes != 0) return false;
  }
  return true;
}
static_assert(WholeUnits(64, Codec::kRotated) && WholeUnits(128, Codec::kRotated));
static_assert(WholeUnits(64, Codec::kPaper) && WholeUnits(128, Codec::kPaper));

}  // namespace

std::string_view Name(Format format) { return kFormatNames[static_cast<size_t>(format)]; }

std::optional<Format> ParseFormat(std::string_view name) {
  for (size_t i = 0; i < kFormatNames.size(); ++i) {
    if (kFormatNames[i] == name) return static_cast<Format>(i);
  }
  return std::nullopt;
}

std::string_view Name(Codec codec) { return kCodecNames[static_cast<size_t>(codec)]; }

std::optional<Codec> ParseCodec(std::string_view name) {
  for (size_t i = 0; i < kCodecNames.size(); ++i) {
    if (kCodecNames[i] == name) return static_cast<Codec>(i);
  }
  return std::nullopt;
}

}  // namespace triaxial
