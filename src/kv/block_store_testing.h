// For tests only: blocks made of a seed, and what a store's folder holds.
#ifndef TRIAXIAL_KV_BLOCK_STORE_TESTING_H_
#define TRIAXIAL_KV_BLOCK_STORE_TESTING_H_

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "kv/block_record.h"
#include "kv/block_store.h"
#include "kv/tag.h"

namespace triaxial {

constexpr int64_t kTestPayload = 512;
constexpr int64_t kTestRecord = kRecordHeaderBytes + kTestPayload;

// Equal seeds give equal keys; `version` changes what may change about a block of a key.
inline SleepingBlock MakeBlock(uint32_t seed, int64_t payload = kTestPayload, uint32_t version = 0,
                               const BlockKey& parent = RootKey("test")) {
  SleepingBlock block;
  block.parent = parent;
  std::mt19937 contents(seed);
  for (ContentId& content : block.contents) {
    content = contents() % 4 == 0
                  ? ContentId::OfPicture(contents(), contents(), static_cast<int>(contents() % 99))
                  : ContentId::OfToken(static_cast<int32_t>(contents() >> 1));
  }
  block.key = ChildKey(parent, block.contents);
  std::mt19937 rest(seed * 31 + version);
  block.position = static_cast<int32_t>(rest() % 1000) * kBlockTokens;
  block.format = static_cast<Format>(rest() % kFormats);
  for (uint8_t& tag : block.tags) tag = static_cast<uint8_t>(rest() % kTags);
  block.bytes.resize(static_cast<size_t>(payload));
  for (uint8_t& byte : block.bytes) byte = static_cast<uint8_t>(rest());
  return block;
}

inline bool Same(const SleepingBlock& a, const SleepingBlock& b) {
  return a.key == b.key && a.parent == b.parent && a.position == b.position && a.format == b.format &&
         a.contents == b.contents && a.tags == b.tags && a.bytes == b.bytes;
}

inline bool Returns(BlockStore* store, const SleepingBlock& block) {
  const Result<SleepingBlock> got = store->Get(block.key);
  return got.ok() && Same(*got, block);
}

inline std::unique_ptr<BlockStore> OpenStore(int64_t host_bytes, const std::string& dir = "",
                                             int64_t disk_bytes = 0,
                                             const std::string& fingerprint = "test model") {
  Result<std::unique_ptr<BlockStore>> store = BlockStore::Open({host_bytes, dir, disk_bytes, fingerprint});
  if (!store.ok()) {
    ADD_FAILURE() << store.status().message();
    return nullptr;
  }
  return *std::move(store);
}

// Files of blocks, sorted by name.
inline std::vector<std::string> BlockFilesIn(const std::string& dir) {
  std::vector<std::string> files;
  for (const auto& entry : std::filesystem::directory_iterator(dir)) {
    if (entry.path().extension() == ".kv") files.push_back(entry.path().string());
  }
  std::sort(files.begin(), files.end());
  return files;
}

inline int64_t BytesIn(const std::string& dir) {
  int64_t bytes = 0;
  for (const std::string& file : BlockFilesIn(dir))
    bytes += static_cast<int64_t>(std::filesystem::file_size(file));
  return bytes;
}

}  // namespace triaxial

#endif  // TRIAXIAL_KV_BLOCK_STORE_TESTING_H_
