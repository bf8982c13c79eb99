#include "kv/content.h"

#include <algorithm>
#include <array>

#include "base/check.h"
#include "base/little_endian.h"
#include "base/sha256.h"
#include "kv/format.h"

namespace triaxial {
namespace {

// What is hashed begins with its kind, so that no salt can be made to look like a block.
constexpr size_t kKindBytes = 16;
constexpr std::array<uint8_t, kKindBytes> kRootKind = {'t', 'r', 'i', 'a', 'x', 'i', 'a', 'l',
                                                       ' ', 's', 'a', 'l', 't', ' ', '1', 0};
constexpr std::array<uint8_t, kKindBytes> kBlockKind = {'t', 'r', 'i', 'a', 'x', 'i', 'a', 'l',
                                                        ' ', 'b', 'l', 'o', 'c', 'k', '1', 0};

}  // namespace

size_t BlockKeyHash::operator()(const BlockKey& key) const { return LoadLittle<uint64_t>(key.bytes.data()); }

BlockKey RootKey(std::string_view salt) {
  Sha256 hash;
  hash.Update(kRootKind);
  hash.Update({reinterpret_cast<const uint8_t*>(salt.data()), salt.size()});
  return {hash.Finish()};
}

BlockKey ChildKey(const BlockKey& parent, std::span<const ContentId> contents) {
  CHECK(contents.size() <= kBlockTokens);
  constexpr size_t kContents = kKindBytes + sizeof(parent.bytes);
  std::array<uint8_t, kContents + kBlockTokens * 16> bytes;
  std::copy(kBlockKind.begin(), kBlockKind.end(), bytes.begin());
  std::copy(parent.bytes.begin(), parent.bytes.end(), bytes.begin() + kKindBytes);
  uint8_t* out = bytes.data() + kContents;
  for (const ContentId& content : contents) {
    StoreLittle(content.lo, out);
    StoreLittle(content.hi, out + 8);
    out += 16;
  }
  return {Sha256Of({bytes.data(), out})};
}

}  // namespace triaxial
