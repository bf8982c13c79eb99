// Where blocks sleep: complete blocks that no running request uses, as stored in the arena (codes and
// metadata, about 3 bits an element), checksummed, first in a bounded host area, then in files. They come
// back bit for bit, also in a later run of the server. One thread uses it, in a server that of
// kv/store_thread.h.
//
// What waits for the disk: Put writes what the host area has no room for (into the page cache, as long as
// that keeps up), Get reads what is not in the host area, Save writes and syncs everything, Open reads about
// a kilobyte for every block in the folder. The rest is memory: Put copies and checksums a block once.
#ifndef TRIAXIAL_KV_BLOCK_STORE_H_
#define TRIAXIAL_KV_BLOCK_STORE_H_

#include <array>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "base/status.h"
#include "kv/content.h"
#include "kv/format.h"

namespace triaxial {

struct BlockStoreOptions {
  int64_t host_bytes = 0;  // of the host area, 1208 bytes a block besides its own included; 0: none
  std::string disk_dir;    // "": none. Made if it does not exist
  int64_t disk_bytes = 0;  // of all files together, foreign ones not counted; 0: none
  // Blocks of another fingerprint are foreign: model, tokenizer and calibration identity, codec, layout,
  // shapes.
  std::string fingerprint;
};

struct BlockStoreStats {
  int64_t host_blocks = 0;
  int64_t host_bytes = 0;
  int64_t disk_blocks = 0;  // those that are in the host area too included
  int64_t disk_bytes = 0;
  int64_t stored = 0;   // blocks put to sleep
  int64_t woken = 0;    // blocks read back
  int64_t dropped = 0;  // for want of room, or because they could not be written
  int64_t corrupt = 0;  // files or blocks that failed their checksum, or were cut short
  int64_t foreign = 0;  // files of another fingerprint or version, left alone
};

// One block at rest. `bytes` is KvMemory::Read's order: [num_layers][rows][UnitRowBytes].
struct SleepingBlock {
  BlockKey key;     // its place in the tree of prefixes: of salt, tokens before it and its own
  BlockKey parent;  // the key of the block before it; of the salt for a first block
  int32_t position = 0;
  Format format = Format::kBf16;
  std::array<ContentId, kBlockTokens> contents{};
  std::array<uint8_t, kBlockTokens> tags{};
  std::vector<uint8_t> bytes;
};

class BlockStore {
 public:
  // Reads the index of what an earlier run left in disk_dir; what is damaged or foreign there is counted and
  // ignored. Errors: the folder cannot be made or read (Internal), another server uses it (Unavailable).
  static Result<std::unique_ptr<BlockStore>> Open(const BlockStoreOptions& options);
  virtual ~BlockStore() = default;

  // True if Get may succeed. Reads nothing from disk.
  virtual bool Contains(const BlockKey& key) const = 0;
  // All of those.
  virtual std::vector<BlockKey> Keys() const = 0;
  // Those that went since the last call, other than by a Get or Put of the same key that said so.
  virtual std::vector<BlockKey> TakeGone() = 0;
  // Takes a copy. The least recently used blocks move on to disk, and from there out (a whole file of them at
  // once), to make room; false if the block fits nowhere. A key that is there already is replaced; a block
  // that is on disk already, bit for bit, is not written again. A file that cannot be written drops its
  // blocks with one warning, and never fails the caller. block.key must be that of contents behind parent
  // (CHECK).
  virtual bool Put(const SleepingBlock& block) = 0;
  // The block as it was put; it stays. NotFound if it is not there; Internal if it failed its checksums or
  // its identity (key of the contents behind the parent; known format and tags), after which it is gone. That
  // the format has so many bytes is for the caller to check, who knows the geometry.
  virtual Result<SleepingBlock> Get(const BlockKey& key) = 0;
  // Everything in the host area to disk, the most recently used as far as there is room, and the files
  // synced. Internal if a file could not be written or synced.
  virtual Status Save() = 0;
  virtual BlockStoreStats Stats() const = 0;
};

}  // namespace triaxial

#endif  // TRIAXIAL_KV_BLOCK_STORE_H_
