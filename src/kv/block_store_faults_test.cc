// What files and machines do to blocks at rest: damage, forgery, other servers' files, full and unwritable
// disks.
#include <fcntl.h>
#include <gtest/gtest.h>
#include <spdlog/sinks/ostream_sink.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <unistd.h>
#include <xxhash.h>

#include <algorithm>
#include <csignal>
#include <functional>
#include <set>
#include <sstream>

#include "base/file.h"
#include "base/little_endian.h"
#include "base/log.h"
#include "base/temp_dir_testing.h"
#include "kv/block_store_testing.h"

namespace triaxial {
namespace {

constexpr int64_t kMany = 1 << 20;
constexpr uint32_t kBlocks = 3;

std::string Read(const std::string& path) {
  const Result<std::string> bytes = ReadFile(path, 1 << 24);
  EXPECT_TRUE(bytes.ok());
  return *bytes;
}

std::string Text(std::span<const uint8_t> bytes) { return {bytes.begin(), bytes.end()}; }

std::string FileHeader(uint64_t number = 1, const std::string& fingerprint = "test model") {
  return Text(EncodeFileHeader(
      Sha256Of({reinterpret_cast<const uint8_t*>(fingerprint.data()), fingerprint.size()}), number));
}

std::string RecordOf(const SleepingBlock& block) { return Text(EncodeRecord(block)->bytes()); }

// A file of blocks 0 .. kBlocks - 1.
std::string GoodFile(uint64_t number = 1) {
  std::string bytes = FileHeader(number);
  for (uint32_t seed = 0; seed < kBlocks; ++seed) bytes += RecordOf(MakeBlock(seed));
  return bytes;
}

const char kFirst[] = "0000000000000001.kv";

// Opens a folder with this file and gets all blocks twice: each is what it was or is gone. Returns how many
// were found; `indexed`: how many the store believed in before it read them.
int Survivors(const TempDir& dir, const std::string& bytes, BlockStoreStats* stats,
              int64_t* indexed = nullptr) {
  dir.Write(kFirst, bytes);
  const auto store = OpenStore(0, dir.path(), kMany);
  if (indexed != nullptr) *indexed = store->Stats().disk_blocks;
  int found = 0;
  for (uint32_t seed = 0; seed < kBlocks; ++seed) {
    const SleepingBlock block = MakeBlock(seed);
    const bool there = store->Contains(block.key);
    const Result<SleepingBlock> first = store->Get(block.key);
    if (first.ok()) {
      EXPECT_TRUE(Same(*first, block));
      EXPECT_TRUE(Returns(store.get(), block));
      ++found;
    } else {
      EXPECT_EQ(first.status().code(), there ? Code::kInternal : Code::kNotFound);
      EXPECT_EQ(store->Get(block.key).status().code(), Code::kNotFound);
    }
  }
  EXPECT_TRUE(store->Put(MakeBlock(77))) << "whatever is there, the store works";
  EXPECT_TRUE(Returns(store.get(), MakeBlock(77)));
  *stats = store->Stats();
  return found;
}

// docs/kv-format.md, "Blocks at rest", written down once more.
TEST(BlockFile, IsAsDocumented) {
  const TempDir dir;
  const SleepingBlock block = MakeBlock(1, 300);
  ASSERT_TRUE(OpenStore(0, dir.path(), kMany)->Put(block));
  std::string want;
  const auto little = [&](uint64_t value, int bytes) {
    for (int i = 0; i < bytes; ++i) want += static_cast<char>(value >> (8 * i));
  };
  const auto checksum = [&](size_t from) {
    const XXH128_hash_t hash = XXH3_128bits(want.data() + from, want.size() - from);
    little(hash.low64, 8);
    little(hash.high64, 8);
  };
  want = "TRIAXKV\n";
  little(1, 4);
  little(0, 4);
  const std::string fingerprint = "test model";
  want += Text(Sha256Of({reinterpret_cast<const uint8_t*>(fingerprint.data()), fingerprint.size()}));
  little(1, 8);
  checksum(0);
  EXPECT_EQ(want.size(), 72u);

  const size_t record = want.size();
  want += "KVBLOCK\n";
  little(300, 8);
  want += Text(block.key.bytes) + Text(block.parent.bytes);
  little(static_cast<uint64_t>(block.position), 4);
  little(static_cast<uint64_t>(block.format), 4);
  for (const ContentId& content : block.contents) {
    little(content.lo, 8);
    little(content.hi, 8);
  }
  want += Text(block.tags);
  const XXH128_hash_t payload = XXH3_128bits(block.bytes.data(), block.bytes.size());
  little(payload.low64, 8);
  little(payload.high64, 8);
  checksum(record);
  EXPECT_EQ(want.size(), record + 1208);
  want += Text(block.bytes);
  EXPECT_EQ(Read(dir.File(kFirst)), want);
}

TEST(BlockFaults, AnyFlippedByteIsFoundOut) {
  const TempDir dir;
  const std::string good = GoodFile();
  BlockStoreStats stats;
  ASSERT_EQ(Survivors(dir, good, &stats), 3);
  ASSERT_EQ(stats.corrupt + stats.foreign, 0);
  for (size_t i = 0; i < good.size() && !HasFailure(); i += i < 1600 ? 1 : 37) {
    SCOPED_TRACE("byte " + std::to_string(i));
    std::string bad = good;
    bad[i] = static_cast<char>(bad[i] ^ (1 << i % 8));
    const int found = Survivors(dir, bad, &stats);
    std::filesystem::remove(dir.File("0000000000000002.kv"));  // of block 77
    if (i < kFileHeaderBytes) {
      EXPECT_EQ(found, 0);
      const bool version = i >= 8 && i < 12;
      EXPECT_EQ(stats.foreign, version ? 1 : 0);
      EXPECT_EQ(stats.corrupt, version ? 0 : 1);
      EXPECT_EQ(Read(dir.File(kFirst)), bad) << "whose it is cannot be told, so it stays";
    } else {
      // A damaged header hides the records behind it, a damaged payload only its own.
      const size_t record = (i - kFileHeaderBytes) / kTestRecord;
      const bool header = (i - kFileHeaderBytes) % kTestRecord < kRecordHeaderBytes;
      EXPECT_EQ(found, header ? static_cast<int>(record) : 2);
      EXPECT_EQ(stats.corrupt, 1);
    }
  }
}

TEST(BlockFaults, AFileCutShortAnywhereKeepsTheBlocksBeforeTheCut) {
  const TempDir dir;
  const std::string good = GoodFile();
  for (size_t size = 0; size < good.size() && !HasFailure(); size += size < 1600 ? 7 : 41) {
    SCOPED_TRACE(std::to_string(size) + " bytes");
    BlockStoreStats stats;
    int64_t indexed = 0;
    const int found = Survivors(dir, good.substr(0, size), &stats, &indexed);
    std::filesystem::remove(dir.File("0000000000000002.kv"));
    const size_t records = size < kFileHeaderBytes ? 0 : (size - kFileHeaderBytes) / kTestRecord;
    EXPECT_EQ(found, static_cast<int>(records));
    EXPECT_EQ(indexed, found) << "a torn block is not promised";
    const bool whole = size >= kFileHeaderBytes && (size - kFileHeaderBytes) % kTestRecord == 0;
    EXPECT_EQ(stats.corrupt, whole ? 0 : 1);
  }
}

TEST(BlockFaults, WhatFollowsTheLastBlockIsIgnored) {
  const TempDir dir;
  for (const size_t tail : {1, 100, 5000}) {
    BlockStoreStats stats;
    EXPECT_EQ(Survivors(dir, GoodFile() + std::string(tail, '\0'), &stats), 3);
    EXPECT_EQ(stats.corrupt, 1);
    std::filesystem::remove(dir.File("0000000000000002.kv"));
  }
}

TEST(BlockFaults, FilesOfAnotherModelOrVersionAreLeftAlone) {
  const TempDir dir;
  {
    const auto other = OpenStore(0, dir.path(), 100 * kTestRecord, "another model");
    for (uint32_t seed = 0; seed < 50; ++seed) ASSERT_TRUE(other->Put(MakeBlock(seed)));
  }
  const size_t others = BlockFilesIn(dir.path()).size();
  std::string newer = GoodFile(99);
  newer[8] = 2;
  dir.Write("0000000000000063.kv", newer);
  {
    const auto store = OpenStore(0, dir.path(), 20 * kTestRecord);
    EXPECT_EQ(store->Stats().foreign, static_cast<int64_t>(others) + 1);
    EXPECT_EQ(store->Stats().corrupt, 0);
    EXPECT_EQ(store->Stats().disk_blocks, 0);
    EXPECT_EQ(store->Stats().disk_bytes, 0);
    EXPECT_FALSE(store->Contains(MakeBlock(1).key));
    for (uint32_t seed = 0; seed < 60; ++seed) ASSERT_TRUE(store->Put(MakeBlock(seed, kTestPayload, 5)));
    EXPECT_LE(store->Stats().disk_bytes, 20 * kTestRecord);
    EXPECT_GE(store->Stats().disk_blocks, 15) << "theirs take none of our room";
  }
  EXPECT_EQ(Read(dir.File("0000000000000063.kv")), newer);
  const auto other = OpenStore(0, dir.path(), 100 * kTestRecord, "another model");
  for (uint32_t seed = 0; seed < 50; ++seed) EXPECT_TRUE(Returns(other.get(), MakeBlock(seed)));
}

TEST(BlockFaults, OtherThingsInTheFolderAreNoFiles) {
  const TempDir dir;
  dir.Write("notes.txt", "mine");
  dir.Write("0000000000000000.kv", GoodFile(0));
  dir.Write("ffffffffffffffff.kv", GoodFile(~uint64_t{0}));
  dir.Write("000000000000000A.kv", GoodFile(10));
  dir.Write("0000000000000003.kv.old", GoodFile(3));
  std::filesystem::create_directory(dir.File("0000000000000004.kv"));
  ASSERT_EQ(mkfifo(dir.File("0000000000000005.kv").c_str(), 0600), 0);
  dir.Write("elsewhere", GoodFile(6));
  std::filesystem::create_symlink(dir.File("elsewhere"), dir.File("0000000000000006.kv"));
  dir.Write("0000000000000007.kv", GoodFile(8));  // a copy under another name
  const auto store = OpenStore(0, dir.path(), kMany);
  EXPECT_EQ(store->Stats().disk_blocks, 0);
  EXPECT_EQ(store->Stats().corrupt, 4);
  ASSERT_TRUE(store->Put(MakeBlock(1)));
  EXPECT_TRUE(std::filesystem::exists(dir.File("0000000000000008.kv")));
  EXPECT_EQ(Read(dir.File("notes.txt")), "mine");
}

// Records with good checksums whose fields lie.
TEST(BlockFaults, ForgedRecordsAreRefused) {
  const auto seal = [](std::string record) {  // both checksums anew
    const XXH128_hash_t payload =
        XXH3_128bits(record.data() + kRecordHeaderBytes, record.size() - kRecordHeaderBytes);
    auto* bytes = reinterpret_cast<uint8_t*>(record.data());
    StoreLittle(uint64_t{payload.low64}, bytes + 1176);
    StoreLittle(uint64_t{payload.high64}, bytes + 1184);
    const XXH128_hash_t header = XXH3_128bits(record.data(), 1192);
    StoreLittle(uint64_t{header.low64}, bytes + 1192);
    StoreLittle(uint64_t{header.high64}, bytes + 1200);
    return record;
  };
  const std::string good = RecordOf(MakeBlock(0));
  ASSERT_EQ(seal(good), good);
  const TempDir dir;
  BlockStoreStats stats;
  for (const auto& [offset, value] :
       std::vector<std::pair<size_t, uint8_t>>{{0, 'k'},        // magic
                                               {8, 0xff},       // payload longer than the file
                                               {15, 0xff},      // absurdly so
                                               {15, 0x80},      // negative, if it were signed
                                               {16, 0x55},      // key
                                               {48, 0x55},      // parent
                                               {83, 0x80},      // a negative position
                                               {84, kFormats},  // a format that does not exist
                                               {87, 1},         // a large one
                                               {88, 0x55},      // contents
                                               {1111, 0x55},    // the last of them
                                               {1112, 56},      // a tag that does not exist
                                               {1175, 255}}) {
    SCOPED_TRACE("offset " + std::to_string(offset));
    std::string bad = good;
    bad[offset] = static_cast<char>(value);
    EXPECT_EQ(Survivors(dir, FileHeader() + seal(bad), &stats), 0);
    EXPECT_EQ(stats.disk_blocks, 1) << "block 77 alone";
    EXPECT_EQ(stats.corrupt, 1);
    std::filesystem::remove(dir.File("0000000000000002.kv"));
  }
  // A changed payload with a new checksum is beyond what a checksum can know, as the page says.
}

// Damage while the server runs: the index knows of blocks that the files no longer hold.
TEST(BlockFaults, FilesReplacedDuringTheRun) {
  const TempDir elsewhere;
  const std::vector<std::function<void(const std::string&)>> deeds = {
      [](const std::string& path) { std::filesystem::remove(path); },
      [](const std::string& path) { std::filesystem::resize_file(path, 0); },
      [](const std::string& path) { std::filesystem::resize_file(path, 5000); },
      [](const std::string& path) {
        std::filesystem::remove(path);
        std::filesystem::create_directory(path);
      },
      [](const std::string& path) {
        std::filesystem::remove(path);
        ASSERT_EQ(mkfifo(path.c_str(), 0600), 0);
      },
      [&](const std::string& path) {
        elsewhere.Write("a", Read(path));
        std::filesystem::remove(path);
        std::filesystem::create_symlink(elsewhere.File("a"), path);
      },
      // Good records of good files, each in the place of another.
      [](const std::string& path) {
        std::string bytes = FileHeader();
        for (uint32_t seed = 0; seed < 8; ++seed) bytes += RecordOf(MakeBlock(7 - seed));
        ASSERT_TRUE(WriteFile(path, bytes).ok());
      },
  };
  for (size_t deed = 0; deed < deeds.size(); ++deed) {
    for (const bool after_restart : {false, true}) {
      SCOPED_TRACE("deed " + std::to_string(deed) + (after_restart ? " after a restart" : ""));
      const TempDir dir;
      auto store = OpenStore(0, dir.path(), kMany);
      for (uint32_t seed = 0; seed < 8; ++seed) ASSERT_TRUE(store->Put(MakeBlock(seed)));
      if (after_restart) {
        store.reset();
        store = OpenStore(0, dir.path(), kMany);
      }
      deeds[deed](dir.File(kFirst));
      int found = 0;
      for (uint32_t seed = 0; seed < 8; ++seed) {
        const Result<SleepingBlock> block = store->Get(MakeBlock(seed).key);
        EXPECT_TRUE(!block.ok() || Same(*block, MakeBlock(seed)));
        found += block.ok() ? 1 : 0;
      }
      EXPECT_EQ(found, deed == 2 ? 2 : 0);
      EXPECT_GE(store->Stats().corrupt, 1);
      EXPECT_EQ(store->Stats().disk_blocks, found);
      for (uint32_t seed = 0; seed < 8; ++seed) {
        ASSERT_TRUE(store->Put(MakeBlock(seed, kTestPayload, 1)));
        EXPECT_TRUE(Returns(store.get(), MakeBlock(seed, kTestPayload, 1)));
      }
      EXPECT_TRUE(store->Save().ok());
      store.reset();
      store = OpenStore(0, dir.path(), kMany);
      for (uint32_t seed = 0; seed < 8; ++seed) {
        EXPECT_TRUE(Returns(store.get(), MakeBlock(seed, kTestPayload, 1)));
      }
    }
  }
}

TEST(BlockFaults, AFileThatCannotBeRemovedAsAFileIsForgotten) {
  const TempDir dir;
  const auto store = OpenStore(0, dir.path(), 20 * kTestRecord);
  for (uint32_t seed = 0; seed < 10; ++seed) ASSERT_TRUE(store->Put(MakeBlock(seed)));
  std::filesystem::remove(dir.File(kFirst));
  std::filesystem::create_directory(dir.File(kFirst));
  for (uint32_t seed = 10; seed < 60; ++seed) EXPECT_TRUE(store->Put(MakeBlock(seed)));
  EXPECT_TRUE(Returns(store.get(), MakeBlock(59)));
}

TEST(BlockFaults, AFolderThatCannotBeMadeIsAnError) {
  const TempDir dir;
  dir.Write("file", "");
  for (const char* name : {"file", "file/blocks"}) {
    const auto store = BlockStore::Open({0, dir.File(name), kMany, "test model"});
    ASSERT_FALSE(store.ok());
    EXPECT_EQ(store.status().code(), Code::kInternal);
    EXPECT_NE(store.status().message().find(dir.File(name)), std::string::npos) << store.status().message();
  }
}

// Counts what is logged while it lives.
class LogLines {
 public:
  LogLines() : before_(spdlog::default_logger()) {
    auto sink = std::make_shared<spdlog::sinks::ostream_sink_st>(text_);
    spdlog::set_default_logger(std::make_shared<spdlog::logger>("test", std::move(sink)));
  }
  ~LogLines() { spdlog::set_default_logger(before_); }
  int64_t count() const {
    const std::string text = text_.str();
    return std::count(text.begin(), text.end(), '\n');
  }

 private:
  std::shared_ptr<spdlog::logger> before_;
  std::ostringstream text_;
};

TEST(BlockFaults, AFullDiskDropsBlocksWithOneWarning) {
  const TempDir dir;
  const LogLines log;
  const auto store = OpenStore(kTestRecord, dir.path(), kMany);
  for (uint32_t seed = 0; seed < 5; ++seed) ASSERT_TRUE(store->Put(MakeBlock(seed)));
  // Writes past this size fail, after a part of them was written.
  struct rlimit before;
  ASSERT_EQ(getrlimit(RLIMIT_FSIZE, &before), 0);
  const auto handler = std::signal(SIGXFSZ, SIG_IGN);
  struct rlimit full = before;
  full.rlim_cur = 8000;  // the file that is written has room for a part of the next block
  ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &full), 0);
  EXPECT_TRUE(store->Put(MakeBlock(9)));
  EXPECT_EQ(store->Stats().dropped, 1);
  for (const rlim_t limit : {rlim_t{1000}, rlim_t{100}, rlim_t{71}, rlim_t{0}}) {
    full.rlim_cur = limit;
    ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &full), 0);
    for (uint32_t seed = 10; seed < 20; ++seed) {
      EXPECT_TRUE(store->Put(MakeBlock(seed)))
          << "the host area takes it; the one that must make room is lost";
    }
    EXPECT_FALSE(store->Put(MakeBlock(30, 3 * kTestRecord))) << "too large for the host area";
    EXPECT_FALSE(store->Save().ok());
    for (uint32_t seed = 0; seed < 4; ++seed) EXPECT_TRUE(Returns(store.get(), MakeBlock(seed))) << seed;
    EXPECT_TRUE(Returns(store.get(), MakeBlock(19)));
    ASSERT_EQ(setrlimit(RLIMIT_FSIZE, &before), 0);
  }
  std::signal(SIGXFSZ, handler);
  EXPECT_EQ(log.count(), 1);
  EXPECT_EQ(store->Stats().corrupt, 0);
  EXPECT_GT(store->Stats().dropped, 30);
  for (uint32_t seed = 40; seed < 45; ++seed) EXPECT_TRUE(store->Put(MakeBlock(seed)));
  EXPECT_TRUE(store->Save().ok()) << "when there is room again, it goes on";
  for (uint32_t seed = 40; seed < 45; ++seed) EXPECT_TRUE(Returns(store.get(), MakeBlock(seed)));
  EXPECT_EQ(store->Stats().disk_bytes, BytesIn(dir.path())) << "nothing half-written remains";
}

// As a user who may not write: root may everything.
class Unprivileged {
 public:
  Unprivileged() : root_(geteuid() == 0) {
    if (root_) {
      EXPECT_EQ(seteuid(65534), 0);
    }
  }
  ~Unprivileged() {
    if (root_) {
      EXPECT_EQ(seteuid(0), 0);
    }
  }

 private:
  const bool root_;
};

TEST(BlockFaults, AFolderThatCannotBeWrittenIsReadAllTheSame) {
  const TempDir dir;
  for (const bool has_lock : {true, false}) {
    {
      const auto store = OpenStore(0, dir.path(), 40 * kTestRecord);
      for (uint32_t seed = 0; seed < 30; ++seed) ASSERT_TRUE(store->Put(MakeBlock(seed)));
    }
    if (!has_lock) std::filesystem::remove(dir.File("lock"));
    for (const std::string& file : BlockFilesIn(dir.path())) ASSERT_EQ(chmod(file.c_str(), 0444), 0);
    if (has_lock) {
      ASSERT_EQ(chmod(dir.File("lock").c_str(), 0444), 0);
    }
    ASSERT_EQ(chmod(dir.path().c_str(), 0555), 0);
    const int64_t bytes = BytesIn(dir.path());
    {
      const Unprivileged user;
      const LogLines log;
      for (const int64_t disk_bytes : {40 * kTestRecord, 5 * kTestRecord}) {
        const auto store = OpenStore(2 * kTestRecord, dir.path(), disk_bytes);
        for (uint32_t seed = 0; seed < 30; ++seed) EXPECT_TRUE(Returns(store.get(), MakeBlock(seed)));
        for (uint32_t seed = 50; seed < 60; ++seed) {
          EXPECT_TRUE(store->Put(MakeBlock(seed)));
          EXPECT_TRUE(Returns(store.get(), MakeBlock(seed)));
        }
        EXPECT_EQ(store->Stats().dropped, 8);
        EXPECT_FALSE(store->Put(MakeBlock(60, 10 * kTestRecord)));
      }
      EXPECT_EQ(log.count(), 2) << "one a store";
    }
    EXPECT_EQ(BytesIn(dir.path()), bytes);
    ASSERT_EQ(chmod(dir.path().c_str(), 0755), 0);
  }
}

TEST(BlockFaults, TheFolderVanishesDuringTheRun) {
  const TempDir dir;
  const std::string path = dir.File("blocks");
  const auto store = OpenStore(2 * kTestRecord, path, 100 * kTestRecord);
  for (uint32_t seed = 0; seed < 20; ++seed) ASSERT_TRUE(store->Put(MakeBlock(seed)));
  std::filesystem::remove_all(path);
  for (uint32_t seed = 20; seed < 60; ++seed) EXPECT_TRUE(store->Put(MakeBlock(seed)));
  for (uint32_t seed = 0; seed < 60; ++seed) {
    const Result<SleepingBlock> block = store->Get(MakeBlock(seed).key);
    EXPECT_EQ(block.ok(), seed >= 58);
    if (block.ok()) {
      EXPECT_TRUE(Same(*block, MakeBlock(seed)));
    }
  }
  EXPECT_EQ(store->Stats().disk_blocks, 0);
  EXPECT_FALSE(store->Save().ok());
}

}  // namespace
}  // namespace triaxial
