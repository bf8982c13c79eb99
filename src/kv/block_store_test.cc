#include "kv/block_store.h"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <algorithm>
#include <list>
#include <map>
#include <set>

#include "base/temp_dir_testing.h"
#include "kv/block_store_testing.h"

namespace triaxial {
namespace {

constexpr int64_t kMany = 1 << 20;

TEST(BlockStore, WithoutRoomAnywhereNothingIsKept) {
  const auto store = OpenStore(0);
  EXPECT_FALSE(store->Put(MakeBlock(1)));
  EXPECT_FALSE(store->Contains(MakeBlock(1).key));
  EXPECT_EQ(store->Get(MakeBlock(1).key).status().code(), Code::kNotFound);
  EXPECT_TRUE(store->Save().ok());
  EXPECT_EQ(store->Stats().dropped, 1);
  EXPECT_EQ(store->Stats().stored, 0);
}

TEST(BlockStore, ComesBackBitForBitAndStays) {
  const auto store = OpenStore(kMany);
  for (const int64_t payload : {0, 1, 255, 100000}) {
    const SleepingBlock block = MakeBlock(static_cast<uint32_t>(payload), payload);
    ASSERT_TRUE(store->Put(block));
    EXPECT_TRUE(Returns(store.get(), block));
    EXPECT_TRUE(Returns(store.get(), block));
  }
  EXPECT_EQ(store->Stats().host_blocks, 4);
  EXPECT_EQ(store->Stats().host_bytes, 4 * static_cast<int64_t>(kRecordHeaderBytes) + 100256);
  EXPECT_EQ(store->Stats().stored, 4);
  EXPECT_EQ(store->Stats().woken, 8);
}

TEST(BlockStore, TheHostAreaForgetsTheLeastRecentlyUsed) {
  const auto store = OpenStore(3 * kTestRecord + kTestRecord / 2);
  for (const uint32_t seed : {1, 2, 3}) ASSERT_TRUE(store->Put(MakeBlock(seed)));
  EXPECT_TRUE(Returns(store.get(), MakeBlock(1)));
  ASSERT_TRUE(store->Put(MakeBlock(4)));
  EXPECT_FALSE(store->Contains(MakeBlock(2).key));
  ASSERT_TRUE(store->Put(MakeBlock(3, kTestPayload, 1)));  // a new version is a use
  ASSERT_TRUE(store->Put(MakeBlock(5)));
  EXPECT_FALSE(store->Contains(MakeBlock(1).key));
  EXPECT_TRUE(Returns(store.get(), MakeBlock(3, kTestPayload, 1)));
  EXPECT_TRUE(Returns(store.get(), MakeBlock(4)));
  EXPECT_EQ(store->Stats().dropped, 2);
  EXPECT_FALSE(store->Put(MakeBlock(6, 4 * kTestRecord))) << "larger than the whole area";
  EXPECT_EQ(store->Stats().host_blocks, 3);
}

TEST(BlockStore, HostOverflowsToDisk) {
  const TempDir dir;
  const auto store = OpenStore(2 * kTestRecord, dir.path(), kMany);
  for (uint32_t seed = 0; seed < 10; ++seed) ASSERT_TRUE(store->Put(MakeBlock(seed)));
  EXPECT_EQ(store->Stats().host_blocks, 2);
  EXPECT_EQ(store->Stats().disk_blocks, 8);
  EXPECT_EQ(store->Stats().disk_bytes, BytesIn(dir.path()));
  for (uint32_t seed = 0; seed < 10; ++seed) EXPECT_TRUE(Returns(store.get(), MakeBlock(seed)));
  EXPECT_TRUE(store->Put(MakeBlock(10, 3 * kTestRecord))) << "too large for the host area: to disk at once";
  EXPECT_EQ(store->Stats().host_blocks, 2);
  EXPECT_EQ(store->Stats().disk_blocks, 9);
  EXPECT_EQ(store->Stats().dropped, 0);
}

TEST(BlockStore, ARestartFindsWhatWasOnDisk) {
  const TempDir dir;
  std::vector<SleepingBlock> blocks;
  BlockKey parent = RootKey("a conversation");
  for (uint32_t i = 0; i < 40; ++i) {
    blocks.push_back(MakeBlock(i, i * 97, 0, parent));
    parent = blocks.back().key;
  }
  for (int run = 0; run < 3; ++run) {
    const auto store = OpenStore(0, dir.path(), kMany);
    for (size_t i = 0; i < blocks.size(); ++i) {
      if (i < 10 * static_cast<size_t>(run)) {
        EXPECT_TRUE(Returns(store.get(), blocks[i])) << run << " " << i;
      } else {
        EXPECT_FALSE(store->Contains(blocks[i].key));
      }
    }
    for (size_t i = 0; i < 10; ++i) ASSERT_TRUE(store->Put(blocks[10 * static_cast<size_t>(run) + i]));
  }
}

TEST(BlockStore, SaveKeepsTheHostAreaForTheNextRun) {
  const TempDir dir;
  for (const bool save : {false, true}) {
    {
      const auto store = OpenStore(kMany, dir.path(), kMany);
      for (uint32_t seed = 0; seed < 20; ++seed) ASSERT_TRUE(store->Put(MakeBlock(seed)));
      if (save) {
        const Status status = store->Save();
        EXPECT_TRUE(status.ok()) << status.message();
        const int64_t bytes = BytesIn(dir.path());
        EXPECT_TRUE(store->Save().ok());
        EXPECT_EQ(BytesIn(dir.path()), bytes) << "what is there already is not written again";
      }
    }
    const auto store = OpenStore(kMany, dir.path(), kMany);
    for (uint32_t seed = 0; seed < 20; ++seed) EXPECT_EQ(Returns(store.get(), MakeBlock(seed)), save);
  }
}

TEST(BlockStore, SaveKeepsTheMostRecentOfMoreThanFits) {
  const TempDir dir;
  const int64_t disk = 20 * kTestRecord;
  {
    const auto store = OpenStore(kMany, dir.path(), disk);
    for (uint32_t seed = 0; seed < 100; ++seed) ASSERT_TRUE(store->Put(MakeBlock(seed)));
    EXPECT_TRUE(Returns(store.get(), MakeBlock(0)));
    EXPECT_TRUE(store->Save().ok());
    EXPECT_LE(BytesIn(dir.path()), disk);
  }
  const auto store = OpenStore(0, dir.path(), disk);
  const int64_t kept = store->Stats().disk_blocks;
  EXPECT_GE(kept, 17);
  EXPECT_TRUE(Returns(store.get(), MakeBlock(0)));
  for (int64_t i = 1; i < kept; ++i)
    EXPECT_TRUE(Returns(store.get(), MakeBlock(static_cast<uint32_t>(100 - i))));
}

TEST(BlockStore, TheLatestVersionOfAKeyCounts) {
  const TempDir dir;
  const SleepingBlock old_block = MakeBlock(1), new_block = MakeBlock(1, 2 * kTestPayload, 1);
  for (const int64_t host_bytes : {int64_t{0}, kMany}) {
    const auto store = OpenStore(host_bytes, dir.path(), kMany);
    ASSERT_TRUE(store->Put(MakeBlock(2)));
    ASSERT_TRUE(store->Put(old_block));
    EXPECT_TRUE(store->Save().ok());
    ASSERT_TRUE(store->Put(new_block));
    EXPECT_TRUE(Returns(store.get(), new_block));
    EXPECT_TRUE(store->Save().ok());
    EXPECT_TRUE(Returns(store.get(), new_block));
    EXPECT_EQ(store->Stats().disk_blocks, 2);
    EXPECT_EQ(store->Stats().dropped, 0);
  }
  EXPECT_TRUE(Returns(OpenStore(0, dir.path(), kMany).get(), new_block));
}

// A conversation that wakes and sleeps again has most of its blocks unchanged.
TEST(BlockStore, WhatIsOnDiskAlreadyIsNotWrittenAgain) {
  const TempDir dir;
  const auto store = OpenStore(2 * kTestRecord, dir.path(), kMany);
  for (uint32_t seed = 0; seed < 8; ++seed) ASSERT_TRUE(store->Put(MakeBlock(seed)));
  EXPECT_TRUE(store->Save().ok());
  const int64_t bytes = BytesIn(dir.path());
  for (int round = 0; round < 3; ++round) {
    for (uint32_t seed = 0; seed < 8; ++seed) ASSERT_TRUE(store->Put(MakeBlock(seed)));
  }
  EXPECT_EQ(BytesIn(dir.path()), bytes);
  for (uint32_t seed = 0; seed < 8; ++seed) EXPECT_TRUE(Returns(store.get(), MakeBlock(seed)));
}

TEST(BlockStore, DiskIsBoundedAndForgetsTheFileLeastRecentlyUsed) {
  const TempDir dir;
  const int64_t disk = 20 * (kTestRecord + static_cast<int64_t>(kFileHeaderBytes));
  const auto store = OpenStore(0, dir.path(), disk);
  for (uint32_t seed = 0; seed < 60; ++seed) {
    ASSERT_TRUE(store->Put(MakeBlock(seed)));
    EXPECT_TRUE(Returns(store.get(), MakeBlock(0))) << seed;  // always in use, so never the one to go
    EXPECT_LE(BytesIn(dir.path()), disk);
    EXPECT_EQ(BytesIn(dir.path()), store->Stats().disk_bytes);
  }
  const int64_t kept = store->Stats().disk_blocks;
  EXPECT_GE(kept, 17) << "at most about a tenth goes at once";
  EXPECT_EQ(store->Stats().dropped, 60 - kept);
  for (int64_t i = 1; i < kept - 2; ++i)
    EXPECT_TRUE(store->Contains(MakeBlock(static_cast<uint32_t>(60 - i)).key));
}

// The copy on disk of a block that is used in host memory ages with it.
TEST(BlockStore, UseInHostMemoryKeepsTheCopyOnDisk) {
  const TempDir dir;
  {
    const auto store = OpenStore(3 * kTestRecord, dir.path(), 20 * kTestRecord);
    ASSERT_TRUE(store->Put(MakeBlock(0)));
    EXPECT_TRUE(store->Save().ok());
    for (uint32_t seed = 1; seed < 60; ++seed) {
      ASSERT_TRUE(store->Put(MakeBlock(seed)));
      EXPECT_TRUE(Returns(store.get(), MakeBlock(0)));
    }
  }
  EXPECT_TRUE(OpenStore(0, dir.path(), 20 * kTestRecord)->Contains(MakeBlock(0).key))
      << "though nothing was saved";
}

TEST(BlockStore, SleepingAgainKeepsTheCopyOnDisk) {
  const TempDir dir;
  const auto store = OpenStore(2 * kTestRecord, dir.path(), 20 * kTestRecord);
  for (uint32_t seed = 1; seed < 80; ++seed) {
    if (seed % 8 == 1) {
      ASSERT_TRUE(store->Put(MakeBlock(0)));
    }
    ASSERT_TRUE(store->Put(MakeBlock(seed)));
    EXPECT_TRUE(store->Contains(MakeBlock(0).key)) << seed;
  }
}

TEST(BlockStore, ABlockLargerThanAFileButNotThanTheDiskFits) {
  const TempDir dir;
  const int64_t disk = 4 * kTestRecord;
  const auto store = OpenStore(0, dir.path(), disk);
  const int64_t header = static_cast<int64_t>(kFileHeaderBytes + kRecordHeaderBytes);
  ASSERT_TRUE(store->Put(MakeBlock(1)));
  ASSERT_TRUE(store->Put(MakeBlock(2, disk - header)));
  EXPECT_TRUE(Returns(store.get(), MakeBlock(2, disk - header)));
  EXPECT_EQ(BytesIn(dir.path()), disk);
  EXPECT_FALSE(store->Put(MakeBlock(3, disk - header + 1)));
  EXPECT_TRUE(store->Contains(MakeBlock(2).key)) << "what cannot fit drives nothing out";
}

TEST(BlockStore, AFileWhoseBlocksWereAllReplacedGoes) {
  const TempDir dir;
  const auto store = OpenStore(0, dir.path(), 40 * kTestRecord);  // four blocks a file
  for (uint32_t seed = 0; seed < 8; ++seed) ASSERT_TRUE(store->Put(MakeBlock(seed)));
  const std::vector<std::string> before = BlockFilesIn(dir.path());
  for (uint32_t seed = 0; seed < 8; ++seed) ASSERT_TRUE(store->Put(MakeBlock(seed, kTestPayload, 1)));
  const std::vector<std::string> after = BlockFilesIn(dir.path());
  EXPECT_EQ(std::count(after.begin(), after.end(), before.front()), 0);
  EXPECT_EQ(store->Stats().dropped, 0);
  for (uint32_t seed = 0; seed < 8; ++seed) {
    EXPECT_TRUE(Returns(store.get(), MakeBlock(seed, kTestPayload, 1)));
  }
}

TEST(BlockStore, ASmallerLimitHoldsFromTheStart) {
  const TempDir dir;
  {
    const auto store = OpenStore(0, dir.path(), 100 * kTestRecord);
    for (uint32_t seed = 0; seed < 80; ++seed) ASSERT_TRUE(store->Put(MakeBlock(seed)));
  }
  const auto store = OpenStore(0, dir.path(), 30 * kTestRecord);
  EXPECT_LE(BytesIn(dir.path()), 30 * kTestRecord);
  EXPECT_GE(store->Stats().disk_blocks, 15);
  EXPECT_TRUE(Returns(store.get(), MakeBlock(79))) << "the newest files stay";
}

TEST(BlockStore, OneServerAFolder) {
  const TempDir dir;
  auto first = OpenStore(0, dir.path(), kMany);
  const auto second = BlockStore::Open({0, dir.path(), kMany, "another model"});
  ASSERT_FALSE(second.ok());
  EXPECT_EQ(second.status().code(), Code::kUnavailable);
  EXPECT_NE(second.status().message().find(dir.path()), std::string::npos) << second.status().message();
  ASSERT_TRUE(first->Put(MakeBlock(1)));
  first.reset();
  EXPECT_TRUE(Returns(OpenStore(0, dir.path(), kMany).get(), MakeBlock(1)));
}

TEST(BlockStore, OthersCannotReadWhatPeopleSaid) {
  const TempDir dir;
  for (const char* name : {"/a/b/blocks", "/c/"}) {
    const std::string path = dir.path() + name;
    const auto store = OpenStore(0, path, kMany);
    ASSERT_TRUE(store->Put(MakeBlock(1)));
    struct stat info;
    ASSERT_EQ(stat(path.c_str(), &info), 0);
    EXPECT_EQ(info.st_mode & 0777, 0700u);
    ASSERT_EQ(stat(BlockFilesIn(path).at(0).c_str(), &info), 0);
    EXPECT_EQ(info.st_mode & 0077, 0u);
  }
}

TEST(BlockStoreDeathTest, AKeyThatIsNotThatOfTheContentsIsOurBug) {
  const auto store = OpenStore(kMany);
  SleepingBlock block = MakeBlock(1);
  block.contents[3].lo ^= 1;
  EXPECT_DEATH(store->Put(block), "CHECK|ChildKey");
}

// Random operations against a naive model: what the host area must hold in its order, which versions a key
// may return, and that nothing vanishes uncounted.
class Simulation {
 public:
  Simulation(uint32_t seed, int64_t host_bytes, int64_t disk_bytes)
      : random_(seed), host_bytes_(host_bytes), disk_bytes_(disk_bytes) {
    Restart(false);
  }

  void Run(int operations) {
    for (int i = 0; i < operations && !testing::Test::HasFailure(); ++i) {
      SCOPED_TRACE("operation " + std::to_string(i));
      const int kind = Below(1000);  // saving waits for the disk, so it is rare
      if (kind < 580) {
        Put();
      } else if (kind < 984) {
        Get();
      } else if (kind < 988) {
        EXPECT_TRUE(store_->Save().ok());
      } else {
        Restart(Below(3) == 0);
      }
      Check();
    }
  }

  int hits = 0, misses = 0, restarts = 0, lost = 0;

 private:
  struct Resident {
    uint32_t seed = 0;
    int64_t bytes = 0;
  };
  struct Version {
    int64_t payload = 0;
    uint32_t version = 0;
  };

  int Below(int n) { return std::uniform_int_distribution<int>(0, n - 1)(random_); }
  uint32_t AnySeed() { return static_cast<uint32_t>(Below(60)); }
  static BlockKey KeyOf(uint32_t seed) { return MakeBlock(seed, 0).key; }

  void Put() {
    const uint32_t seed = AnySeed();
    std::vector<Version>& versions = versions_[seed];
    Version version = {Below(3) == 0 ? Below(3000) : kTestPayload, static_cast<uint32_t>(versions.size())};
    if (!versions.empty() && Below(2) == 0) version = versions.back();
    const int64_t bytes = static_cast<int64_t>(kRecordHeaderBytes) + version.payload;
    present_.insert(seed);
    host_.remove_if([&](const Resident& resident) { return resident.seed == seed; });
    const bool kept = store_->Put(MakeBlock(seed, version.payload, version.version));
    versions.push_back(version);
    latest_[seed] = version;
    if (bytes <= host_bytes_) {
      EXPECT_TRUE(kept);
      host_.push_back({seed, bytes});
      while (HostBytes() > host_bytes_) host_.pop_front();
    }
    EXPECT_EQ(store_->Contains(KeyOf(seed)), kept);
  }

  void Get() {
    const uint32_t seed = AnySeed();
    const bool there = store_->Contains(KeyOf(seed));
    const Result<SleepingBlock> block = store_->Get(KeyOf(seed));
    ASSERT_EQ(block.ok(), there);
    ++(there ? hits : misses);
    if (!there) {
      EXPECT_EQ(block.status().code(), Code::kNotFound);
      return;
    }
    const auto matches = [&](const Version& v) {
      return Same(*block, MakeBlock(seed, v.payload, v.version));
    };
    const auto latest = latest_.find(seed);
    if (latest != latest_.end()) {
      EXPECT_TRUE(matches(latest->second));
    } else {  // of an earlier run, possibly without its last versions
      EXPECT_TRUE(std::any_of(versions_[seed].begin(), versions_[seed].end(), matches));
    }
    const auto resident =
        std::find_if(host_.begin(), host_.end(), [&](const Resident& r) { return r.seed == seed; });
    if (resident != host_.end()) host_.splice(host_.end(), host_, resident);
  }

  void Restart(bool save) {
    if (store_ != nullptr) {
      ++restarts;
      if (save) {
        EXPECT_TRUE(store_->Save().ok());
      }
      store_.reset();
    }
    store_ = OpenStore(host_bytes_, disk_bytes_ > 0 ? dir_.path() : "", disk_bytes_);
    EXPECT_EQ(store_->Stats().corrupt, 0);
    if (save && disk_bytes_ >= 2 * host_bytes_) {
      for (const Resident& resident : host_) {
        EXPECT_TRUE(store_->Contains(KeyOf(resident.seed)));
        EXPECT_TRUE(
            Same(*store_->Get(KeyOf(resident.seed)),
                 MakeBlock(resident.seed, latest_[resident.seed].payload, latest_[resident.seed].version)));
      }
    }
    host_.clear();
    latest_.clear();
    present_.clear();
    for (const auto& [seed, versions] : versions_) {
      if (store_->Contains(KeyOf(seed))) present_.insert(seed);
    }
    dropped_ = store_->Stats().dropped;
  }

  void Check() {
    const BlockStoreStats stats = store_->Stats();
    EXPECT_EQ(stats.host_bytes, HostBytes());
    EXPECT_EQ(stats.host_blocks, static_cast<int64_t>(host_.size()));
    EXPECT_LE(stats.disk_bytes, disk_bytes_);
    if (disk_bytes_ > 0) {
      EXPECT_EQ(stats.disk_bytes, BytesIn(dir_.path()));
    }
    for (const Resident& resident : host_) EXPECT_TRUE(store_->Contains(KeyOf(resident.seed)));
    EXPECT_EQ(stats.corrupt, 0);
    const size_t before = present_.size();
    std::erase_if(present_, [&](uint32_t seed) { return !store_->Contains(KeyOf(seed)); });
    EXPECT_EQ(static_cast<int64_t>(before - present_.size()), stats.dropped - dropped_);
    lost += static_cast<int>(before - present_.size());
    dropped_ = stats.dropped;
  }

  int64_t HostBytes() const {
    int64_t bytes = 0;
    for (const Resident& resident : host_) bytes += resident.bytes;
    return bytes;
  }

  std::mt19937 random_;
  const int64_t host_bytes_, disk_bytes_;
  const TempDir dir_;
  std::unique_ptr<BlockStore> store_;
  std::list<Resident> host_;                           // the least recently used first
  std::map<uint32_t, std::vector<Version>> versions_;  // ever put
  std::map<uint32_t, Version> latest_;                 // put in this run
  std::set<uint32_t> present_;
  int64_t dropped_ = 0;
};

TEST(BlockStore, RandomOperationsAgainstANaiveModel) {
  const int64_t r = kTestRecord;
  for (const auto& [host, disk] : std::vector<std::pair<int64_t, int64_t>>{
           {20 * r, 0}, {0, 30 * r}, {10 * r, 30 * r}, {30 * r, 10 * r}, {10 * r, 1000 * r}, {r, 3 * r}}) {
    SCOPED_TRACE(std::to_string(host) + " in memory, " + std::to_string(disk) + " on disk");
    Simulation simulation(static_cast<uint32_t>(host + disk), host, disk);
    simulation.Run(2000);
    EXPECT_GT(simulation.hits, 20);
    EXPECT_GT(simulation.restarts, 5);
    if (disk < 1000 * r) {
      EXPECT_GT(simulation.lost, 50);
    }
  }
}

}  // namespace
}  // namespace triaxial
