// What lies behind the cache's bookkeeping when blocks move: the memory of the rows, and the place where
// blocks sleep. This base has neither, for schedulers that run without a model.
#ifndef TRIAXIAL_ENGINE_KV_BACKING_H_
#define TRIAXIAL_ENGINE_KV_BACKING_H_

#include <span>

#include "kv/arena.h"
#include "kv/block.h"
#include "kv/block_store.h"
#include "kv/store_thread.h"

namespace triaxial {

class KvBacking {
 public:
  virtual ~KvBacking() = default;
  // As KvMemory::Move.
  virtual void Move(uint32_t /*from_row*/, uint32_t /*to_row*/, int /*rows*/) {}
  // Whether Sleep keeps anything.
  virtual bool sleeps() const { return false; }
  // Whether anything sleeps now.
  virtual bool asleep() const { return false; }
  // Takes a copy, or drops the block.
  virtual void Sleep(const KvBlock& /*block*/, const BlockKey& /*key*/, const BlockKey& /*parent*/) {}
  virtual bool Contains(const BlockKey& /*key*/) const { return false; }
  // As StoreThread's; and waiting for what was asked for.
  virtual void Fetch(std::span<const BlockKey> /*keys*/) {}
  virtual Result<SleepingBlock> Take(const BlockKey& key);
  virtual void WaitForFetched() {}
  // The bytes of a block that woke, to its rows; the rest of it is of no use any more.
  virtual Status Write(uint32_t /*row*/, int /*rows*/, SleepingBlock&& /*block*/) { return OkStatus(); }
};

// The engine's: a model's memory, and a store if there is one.
class MemoryBacking final : public KvBacking {
 public:
  // `memory` and `store` (or nullptr) must outlive it.
  MemoryBacking(KvMemory* memory, StoreThread* store) : memory_(memory), store_(store) {}
  void Move(uint32_t from_row, uint32_t to_row, int rows) override { memory_->Move(from_row, to_row, rows); }
  bool sleeps() const override { return store_ != nullptr; }
  bool asleep() const override { return store_ != nullptr && !store_->empty(); }
  void Sleep(const KvBlock& block, const BlockKey& key, const BlockKey& parent) override;
  bool Contains(const BlockKey& key) const override { return store_ != nullptr && store_->Contains(key); }
  void Fetch(std::span<const BlockKey> keys) override { store_->Fetch(keys); }
  Result<SleepingBlock> Take(const BlockKey& key) override { return store_->Take(key); }
  void WaitForFetched() override { store_->Wait(); }
  Status Write(uint32_t row, int rows, SleepingBlock&& block) override;

 private:
  KvMemory* memory_;
  StoreThread* store_;
};

}  // namespace triaxial

#endif  // TRIAXIAL_ENGINE_KV_BACKING_H_
