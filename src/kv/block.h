// A block of the KV cache: where it lies, what its tokens are, what they need, and how it came to its format.
#ifndef TRIAXIAL_KV_BLOCK_H_
#define TRIAXIAL_KV_BLOCK_H_

#include <array>
#include <cstdint>
#include <vector>

#include "kv/content.h"
#include "kv/format.h"
#include "kv/need.h"
#include "kv/tag.h"

namespace triaxial {

using SequenceId = int64_t;
using BlockId = int32_t;
using NodeId = int32_t;
inline constexpr BlockId kNoBlock = -1;
inline constexpr NodeId kNoNode = -1;

// A token about to be appended: what it is, and what it counts as.
struct KvToken {
  ContentId content;
  uint8_t tag = 0;  // Tag::index()
};

// A change of format, and why.
struct KvChange {
  Format from = Format::kBf16;
  Format to = Format::kBf16;
  Cause cause = Cause::kAge;
  double price = 0;  // per byte, when it happened
  int64_t step = 0;  // of the cache
};

struct KvBlock {
  uint32_t unit_row = 0;
  int32_t position = 0;             // of its first token in the sequence
  uint8_t tokens = 0;               // 64 once complete
  uint8_t capacity = kBlockTokens;  // of a tail: a multiple of kTailStep
  Format format = Format::kBf16;
  std::array<ContentId, kBlockTokens> contents{};
  std::array<uint8_t, kBlockTokens> tags{};  // as its last user saw them
  BlockNeed need;                            // of a complete block: the most that its users need
  int32_t users = 0;                         // sequences that hold it
  std::vector<SequenceId> holders;           // those
  NodeId node = kNoNode;                     // its place among the cached prefixes; none: private
  std::vector<KvChange> history;

  int64_t serial = 0;  // of all blocks that there ever were

  bool complete() const { return tokens == kBlockTokens; }

  // The cache's own:
  bool in_use = false;  // false: a free slot
  bool ages = false;    // waits to be re-quantized
  int slack = 0;        // unit rows that can be had of it: all if nobody needs it, else those above its floor
  double last_value = 0;     // what it was worth when its last user left
  int64_t convert_step = 0;  // in which it was last re-quantized,
  size_t convert_index = 0;  // and the place of that conversion in the step's list
};

// Names a block after its place was taken by another.
struct BlockHandle {
  BlockId id = kNoBlock;
  int64_t serial = 0;
};

// Bytes and tokens in use, from the blocks themselves.
struct KvUsage {
  std::array<int64_t, kFormats> tokens{};
  std::array<int64_t, kFormats> bytes{};  // whole blocks, metadata included; a tail counts its capacity
  int64_t tail_tokens = 0;                // the part of `tokens`/`bytes` [kBf16] that are tails of sequences
  int64_t tail_bytes = 0;
  int64_t total_tokens() const;
  int64_t total_bytes() const;
  // Stored bits per element, metadata and tails included; 0 for an empty cache.
  double effective_bits(const KvGeometry& geometry) const;
  bool operator==(const KvUsage&) const = default;
};

}  // namespace triaxial

#endif  // TRIAXIAL_KV_BLOCK_H_
