// What a token is, apart from its place: the identity by which blocks are shared.
#ifndef TRIAXIAL_KV_CONTENT_H_
#define TRIAXIAL_KV_CONTENT_H_

#include <array>
#include <cstdint>
#include <functional>
#include <span>
#include <string_view>

namespace triaxial {

// Equal contents under equal prefixes have equal keys and values. Text: the token id. A token of a picture:
// 127 bits of the SHA-256 of the picture's patches and grid, plus its index within the picture.
struct ContentId {
  uint64_t lo = 0;
  uint64_t hi = 0;  // the uppermost bit marks a picture

  static ContentId OfToken(int32_t token) { return {static_cast<uint64_t>(static_cast<uint32_t>(token)), 0}; }
  static ContentId OfPicture(uint64_t hash_lo, uint64_t hash_hi, int32_t index) {
    return {hash_lo + static_cast<uint64_t>(index), hash_hi | uint64_t{1} << 63};
  }
  bool operator==(const ContentId&) const = default;
};

// SHA-256 of what decides a block's contents: salt and all tokens up to its end. (Model and codec decide too;
// a cache has one of each, a block store's fingerprint names them.) docs/kv-format.md, "Keys".
struct BlockKey {
  std::array<uint8_t, 32> bytes{};
  bool operator==(const BlockKey&) const = default;
};
struct BlockKeyHash {
  size_t operator()(const BlockKey& key) const;
};
// The key above all first blocks of a salt, which may be any bytes.
BlockKey RootKey(std::string_view salt);
// The key of a block with these contents (at most kBlockTokens) behind `parent`. About a microsecond.
BlockKey ChildKey(const BlockKey& parent, std::span<const ContentId> contents);

}  // namespace triaxial

#endif  // TRIAXIAL_KV_CONTENT_H_
