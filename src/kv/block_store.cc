#include "kv/block_store.h"

#include <optional>
#include <utility>

#include "base/check.h"
#include "base/sha256.h"
#include "kv/block_files.h"
#include "kv/block_record.h"
#include "kv/host_blocks.h"

namespace triaxial {
namespace {

// A key's record in host memory and its record in a file, if it has both, are the same.
class TieredStore : public BlockStore {
 public:
  TieredStore(int64_t host_bytes, std::unique_ptr<BlockFiles> files)
      : host_bytes_(host_bytes), files_(std::move(files)) {}

  bool Contains(const BlockKey& key) const override {
    return host_.Contains(key) || (files_ != nullptr && files_->Contains(key));
  }

  std::vector<BlockKey> Keys() const override {
    std::vector<BlockKey> keys;
    for (const Record& record : host_.order()) keys.push_back(record.key);
    if (files_ != nullptr) {
      files_->ForEachKey([&](const BlockKey& key) {
        if (!host_.Contains(key)) keys.push_back(key);
      });
    }
    return keys;
  }

  std::vector<BlockKey> TakeGone() override { return std::exchange(gone_, {}); }

  bool Put(const SleepingBlock& block) override {
    CHECK(block.key == ChildKey(block.parent, block.contents));
    std::optional<Record> record = EncodeRecord(block);
    host_.Erase(block.key);
    if (files_ != nullptr && !(record.has_value() && files_->Contains(*record))) files_->Erase(block.key);
    if (!record.has_value()) {
      ++dropped_;
      return false;
    }
    const int64_t size = static_cast<int64_t>(record->size);
    if (size > host_bytes_) {
      if (!ToFile(*record)) return false;
    } else {
      host_.Insert(*std::move(record));
      while (host_.bytes() > host_bytes_) ToFile(host_.TakeOldest());
    }
    ++stored_;
    return true;
  }

  Result<SleepingBlock> Get(const BlockKey& key) override {
    if (!Contains(key)) return NotFound("no block with this key is at rest");
    std::optional<SleepingBlock> block;
    if (const Record* record = host_.Use(key); record != nullptr) {
      block = DecodeRecord(record->bytes(), key);
      if (!block.has_value()) {
        ++corrupt_in_host_;
        host_.Erase(key);
      } else if (files_ != nullptr) {
        files_->Touch(key);
      }
    }
    if (!block.has_value() && files_ != nullptr && files_->Contains(key)) block = files_->Read(key);
    if (!block.has_value()) return Internal("a block at rest was damaged and is dropped; compute it again");
    ++woken_;
    return *std::move(block);
  }

  Status Save() override {
    if (files_ == nullptr) return OkStatus();
    // What would go again before the end is not written.
    int64_t excess = host_.bytes() - files_->max_record_bytes();
    bool written = true;
    for (const Record& record : host_.order()) {
      if (excess > 0) {
        excess -= static_cast<int64_t>(record.size);
        continue;
      }
      if (files_->Contains(record)) {
        files_->Touch(record.key);
      } else {
        written = AppendToFile(record) && written;
      }
    }
    RETURN_IF_ERROR(files_->Sync());
    return written ? OkStatus() : Internal("not all blocks in host memory could be written to files");
  }

  BlockStoreStats Stats() const override {
    BlockStoreStats stats;
    stats.host_blocks = host_.blocks();
    stats.host_bytes = host_.bytes();
    stats.stored = stored_;
    stats.woken = woken_;
    stats.dropped = dropped_;
    stats.corrupt = corrupt_in_host_;
    if (files_ != nullptr) {
      stats.disk_blocks = files_->blocks();
      stats.disk_bytes = files_->bytes();
      stats.corrupt += files_->corrupt();
      stats.foreign = files_->foreign();
    }
    return stats;
  }

 private:
  // Of a record that is not, or no longer, in host memory. False: it is lost, and counted.
  bool ToFile(const Record& record) {
    if (files_ != nullptr && files_->Contains(record)) {
      files_->Touch(record.key);
      return true;
    }
    if (files_ != nullptr && AppendToFile(record)) return true;
    ++dropped_;
    gone_.push_back(record.key);
    return false;
  }

  bool AppendToFile(const Record& record) {
    std::vector<BlockKey> gone;
    const bool appended = files_->Append(record, &gone);
    for (const BlockKey& key : gone) {
      if (host_.Contains(key)) continue;
      ++dropped_;
      gone_.push_back(key);
    }
    return appended;
  }

  const int64_t host_bytes_;
  const std::unique_ptr<BlockFiles> files_;  // none without a folder
  HostBlocks host_;
  std::vector<BlockKey> gone_;
  int64_t stored_ = 0;
  int64_t woken_ = 0;
  int64_t dropped_ = 0;
  int64_t corrupt_in_host_ = 0;
};

}  // namespace

Result<std::unique_ptr<BlockStore>> BlockStore::Open(const BlockStoreOptions& options) {
  std::unique_ptr<BlockFiles> files;
  if (!options.disk_dir.empty() && options.disk_bytes > 0) {
    const std::string& text = options.fingerprint;
    const Sha256Digest fingerprint = Sha256Of({reinterpret_cast<const uint8_t*>(text.data()), text.size()});
    ASSIGN_OR_RETURN(files, BlockFiles::Open(options.disk_dir, options.disk_bytes, fingerprint));
  }
  return std::unique_ptr<BlockStore>(std::make_unique<TieredStore>(options.host_bytes, std::move(files)));
}

}  // namespace triaxial
