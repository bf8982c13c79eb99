#include "kv/store_thread.h"

#include <gtest/gtest.h>

#include <atomic>
#include <future>
#include <new>

#include "base/temp_dir_testing.h"
#include "kv/block_store_testing.h"

namespace triaxial {
namespace {

// A store whose thread waits in Put and Get until it is let go.
class HeldStore : public BlockStore {
 public:
  explicit HeldStore(std::shared_future<void> let_go) : let_go_(std::move(let_go)) {}
  bool Contains(const BlockKey& key) const override { return store_->Contains(key); }
  std::vector<BlockKey> Keys() const override { return store_->Keys(); }
  std::vector<BlockKey> TakeGone() override { return store_->TakeGone(); }
  bool Put(const SleepingBlock& block) override {
    let_go_.wait();
    return store_->Put(block);
  }
  Result<SleepingBlock> Get(const BlockKey& key) override {
    let_go_.wait();
    return store_->Get(key);
  }
  Status Save() override { return store_->Save(); }
  BlockStoreStats Stats() const override { return store_->Stats(); }

 private:
  std::shared_future<void> let_go_;
  std::unique_ptr<BlockStore> store_ = OpenStore(1 << 20);
};

void PutCopy(StoreThread* store, const SleepingBlock& block) {
  SleepingBlock begun = store->Begin();
  begun = block;
  store->Put(std::move(begun));
}

Result<SleepingBlock> WaitFor(StoreThread* store, const BlockKey& key) {
  store->Fetch({&key, 1});
  while (true) {
    Result<SleepingBlock> block = store->Take(key);
    if (block.ok() || block.status().code() != Code::kUnavailable) return block;
    store->Wait();
  }
}

TEST(StoreThread, BringsBackWhatItWasGiven) {
  StoreThread store(OpenStore(1 << 20), kTestPayload);
  EXPECT_TRUE(store.empty());
  for (uint32_t seed = 0; seed < 40; ++seed) {
    PutCopy(&store, MakeBlock(seed));
    EXPECT_TRUE(store.Contains(MakeBlock(seed).key)) << "at once";
  }
  EXPECT_FALSE(store.empty());
  for (uint32_t seed = 0; seed < 40; ++seed) {
    const Result<SleepingBlock> block = WaitFor(&store, MakeBlock(seed).key);
    ASSERT_TRUE(block.ok()) << block.status().message();
    EXPECT_TRUE(Same(*block, MakeBlock(seed)));
  }
  EXPECT_EQ(WaitFor(&store, MakeBlock(99).key).status().code(), Code::kNotFound);
  EXPECT_EQ(store.Stats().stored, 40);
  EXPECT_EQ(store.Stats().woken, 40);
}

TEST(StoreThread, NobodyWaitsForAStoreThatIsSlow) {
  std::promise<void> let_go;
  StoreThread store(std::make_unique<HeldStore>(let_go.get_future().share()), kTestPayload);
  constexpr uint32_t kMany = StoreThread::kUnderWay + 30;
  for (uint32_t seed = 0; seed < kMany; ++seed) PutCopy(&store, MakeBlock(seed));
  // One of them may be with the store already.
  const int64_t dropped = store.Stats().dropped;
  EXPECT_GE(dropped, 29);
  EXPECT_LE(dropped, 30);
  EXPECT_FALSE(store.Contains(MakeBlock(5).key)) << "who waited longest is dropped";
  const BlockKey key = MakeBlock(kMany - 1).key;
  EXPECT_TRUE(store.Contains(key));
  store.Fetch({&key, 1});
  EXPECT_EQ(store.Take(key).status().code(), Code::kUnavailable);
  let_go.set_value();
  store.Drain();
  EXPECT_EQ(store.Stats().stored, int64_t{kMany} - dropped);
  EXPECT_TRUE(Same(WaitFor(&store, key).value(), MakeBlock(kMany - 1)));
}

TEST(StoreThread, WhatWasFetchedForNobodyIsGivenUp) {
  StoreThread store(OpenStore(1 << 20), kTestPayload);
  std::vector<BlockKey> keys;
  for (uint32_t seed = 0; seed < 200; ++seed) {
    PutCopy(&store, MakeBlock(seed));
    store.Drain();
    keys.push_back(MakeBlock(seed).key);
  }
  store.Fetch(keys);
  store.Wait();
  // As many as may be under way have come, or come soon; none is taken.
  EXPECT_TRUE(Same(WaitFor(&store, keys[199]).value(), MakeBlock(199)));
  EXPECT_EQ(store.Take(keys[0]).status().code(), Code::kUnavailable);
  EXPECT_TRUE(Same(WaitFor(&store, keys[0]).value(), MakeBlock(0))) << "it still sleeps";
}

TEST(StoreThread, ForgetsTheKeysOfBlocksThatWent) {
  StoreThread store(OpenStore(3 * kTestRecord), kTestPayload);
  for (uint32_t seed = 0; seed < 10; ++seed) {
    PutCopy(&store, MakeBlock(seed));
    store.Drain();
  }
  for (uint32_t seed = 0; seed < 10; ++seed) EXPECT_EQ(store.Contains(MakeBlock(seed).key), seed >= 7);
  PutCopy(&store, MakeBlock(20, 4 * kTestRecord));  // it finds no room
  store.Drain();
  EXPECT_FALSE(store.Contains(MakeBlock(20).key));
  EXPECT_EQ(store.Stats().dropped, 8);
}

TEST(StoreThread, ARestartKnowsWhatIsOnDisk) {
  const TempDir dir;
  {
    StoreThread store(OpenStore(1 << 20, dir.path(), 1 << 20), kTestPayload);
    for (uint32_t seed = 0; seed < 20; ++seed) PutCopy(&store, MakeBlock(seed));
    EXPECT_TRUE(store.Save().ok());
  }
  StoreThread store(OpenStore(1 << 20, dir.path(), 1 << 20), kTestPayload);
  for (uint32_t seed = 0; seed < 20; ++seed) {
    EXPECT_TRUE(store.Contains(MakeBlock(seed).key));
    EXPECT_TRUE(Same(WaitFor(&store, MakeBlock(seed).key).value(), MakeBlock(seed)));
  }
}

TEST(StoreThread, WithoutMemoryABlockIsLostAndNothingElse) {
  struct Store final : HeldStore {
    using HeldStore::HeldStore;
    bool Put(const SleepingBlock& block) override {
      if (fails) throw std::bad_alloc();
      return HeldStore::Put(block);
    }
    Result<SleepingBlock> Get(const BlockKey& key) override {
      if (fails) throw std::bad_alloc();
      return HeldStore::Get(key);
    }
    std::atomic<bool> fails = true;
  };
  std::promise<void> open;
  open.set_value();
  auto held = std::make_unique<Store>(open.get_future().share());
  std::atomic<bool>& fails = held->fails;
  StoreThread store(std::move(held), kTestPayload);
  PutCopy(&store, MakeBlock(1));
  store.Drain();
  EXPECT_FALSE(store.Contains(MakeBlock(1).key));
  fails = false;
  PutCopy(&store, MakeBlock(2));
  store.Drain();
  fails = true;
  EXPECT_EQ(WaitFor(&store, MakeBlock(2).key).status().code(), Code::kInternal);
  fails = false;
  PutCopy(&store, MakeBlock(3));
  EXPECT_TRUE(Same(WaitFor(&store, MakeBlock(3).key).value(), MakeBlock(3)));
}

}  // namespace
}  // namespace triaxial
