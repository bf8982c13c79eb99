// Blocks in files: a folder of append-only files, each of up to 64 MiB or a tenth of the folder's limit,
// whichever is less (but at least one block).
//
// Room is made by removing whole files, the one least recently written or read first. Blocks that go to sleep
// together lie together and are wanted together, so a file ages as one; removing it is one call, where
// compaction would copy blocks on the engine's thread. The price: a block that was replaced takes its place
// until its file goes, at once if no block of the file is alive any more.
//
// Locked against a second server. All calls block on the disk, as far as the page cache does not help; only
// Sync waits for it. A folder that cannot be written is read all the same.
#ifndef TRIAXIAL_KV_BLOCK_FILES_H_
#define TRIAXIAL_KV_BLOCK_FILES_H_

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <unordered_map>
#include <vector>

#include "base/fd.h"
#include "base/status.h"
#include "kv/block_record.h"

namespace triaxial {

class BlockFiles {
 public:
  // Makes the folder if need be and reads the headers of all files and records in it; then removes files
  // until it holds at most `max_bytes`. Errors: the folder cannot be made or read (Internal), or is in use by
  // another server (Unavailable).
  static Result<std::unique_ptr<BlockFiles>> Open(const std::string& dir, int64_t max_bytes,
                                                  const Sha256Digest& fingerprint);

  bool Contains(const BlockKey& key) const { return index_.contains(key); }
  template <typename Fn>
  void ForEachKey(const Fn& fn) const {
    for (const auto& [key, place] : index_) fn(key);
  }
  // True if this very record is there.
  bool Contains(const Record& record) const;
  // Counts as a use of the block. Unknown keys do nothing, here and in Erase.
  void Touch(const BlockKey& key);
  void Erase(const BlockKey& key);
  // Its key must not be there. Adds the keys of blocks that had to go for it to `gone`. False if the record
  // is too large or cannot be written; the first failure of the machine is logged.
  bool Append(const Record& record, std::vector<BlockKey>* gone);
  // The block, verified, or nothing: then it is counted as corrupt and erased. The key must be there.
  std::optional<SleepingBlock> Read(const BlockKey& key);
  // Returns when everything written is on the disk.
  Status Sync();

  // The most bytes of records that fit at once, however they fall into files.
  int64_t max_record_bytes() const;
  int64_t blocks() const { return static_cast<int64_t>(index_.size()); }
  int64_t bytes() const { return bytes_; }  // of our files, foreign and corrupt ones not counted
  int64_t corrupt() const { return corrupt_; }
  int64_t foreign() const { return foreign_; }

 private:
  struct File {
    int64_t bytes = 0;
    int64_t alive = 0;     // blocks that the index finds here
    int64_t last_use = 0;  // by clock_
    bool synced = true;
    std::vector<BlockKey> keys;  // of all records, also those that were replaced
  };
  using Files = std::map<uint64_t, File>;  // by number
  struct Place {
    uint64_t file = 0;
    int64_t offset = 0;
    int64_t bytes = 0;
    Checksum checksum;
  };

  BlockFiles(std::string dir, int64_t max_bytes, const Sha256Digest& fingerprint);
  Status Lock();
  Status ReadFolder();
  void ReadFile(uint64_t number);
  void ReadRecords(uint64_t number, int fd, int64_t size);
  Fd OpenFile(uint64_t number, int64_t* size) const;
  bool ReadRecord(const Place& place);  // into scratch_
  void Insert(const BlockKey& key, const Place& place);
  bool MakeRoom(int64_t bytes, std::vector<BlockKey>* gone);
  bool BeginFile();
  void EndFile();
  Files::iterator LeastRecentlyUsed();
  bool Remove(Files::iterator file, std::vector<BlockKey>* gone);
  void Forget(Files::iterator file, std::vector<BlockKey>* gone);
  void Use(uint64_t file) { files_.at(file).last_use = ++clock_; }
  void Failed(const std::string& what);  // with errno; logs the first

  const std::string dir_;
  const int64_t max_bytes_;
  const int64_t file_bytes_;
  const Sha256Digest fingerprint_;
  Fd folder_;
  Fd lock_;  // none: nothing may be written

  Files files_;
  std::unordered_map<BlockKey, Place, BlockKeyHash> index_;
  uint64_t writing_ = 0;  // number of the file that is written; 0: none
  Fd writing_fd_;
  uint64_t next_number_ = 1;
  int64_t bytes_ = 0;
  int64_t clock_ = 0;
  int64_t corrupt_ = 0;
  int64_t foreign_ = 0;
  bool warned_ = false;
  bool folder_synced_ = true;
  std::vector<uint8_t> scratch_;
};

}  // namespace triaxial

#endif  // TRIAXIAL_KV_BLOCK_FILES_H_
