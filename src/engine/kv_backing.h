// What lies behind the cache's bookkeeping when blocks move: the memory of the rows, and the place where
// blocks sleep. This base has neither, for schedulers that run without a model.
#ifndef TRIAXIAL_ENGINE_KV_BACKING_H_
#define TRIAXIAL_ENGINE_KV_BACKING_H_

#include <memory>
#include <vector>

#include "kv/arena.h"
#include "kv/block.h"
#include "kv/block_store.h"

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
  virtual void Sleep(const KvBlock& /*block*/, const BlockKey& /*key*/, const BlockKey& /*parent*/) {}
  virtual bool Contains(const BlockKey& /*key*/) const { return false; }
  virtual Result<SleepingBlock> Get(const BlockKey& key);
  // The bytes of a block that woke, to its rows.
  virtual Status Write(uint32_t /*row*/, int /*rows*/, const SleepingBlock& /*block*/) { return OkStatus(); }
};

// The engine's: a model's memory, and a store if there is one.
class MemoryBacking final : public KvBacking {
 public:
  // `memory` and `store` (or nullptr) must outlive it.
  MemoryBacking(KvMemory* memory, BlockStore* store) : memory_(memory), store_(store) {}
  void Move(uint32_t from_row, uint32_t to_row, int rows) override { memory_->Move(from_row, to_row, rows); }
  bool sleeps() const override { return store_ != nullptr; }
  bool asleep() const override;
  void Sleep(const KvBlock& block, const BlockKey& key, const BlockKey& parent) override;
  bool Contains(const BlockKey& key) const override { return store_ != nullptr && store_->Contains(key); }
  Result<SleepingBlock> Get(const BlockKey& key) override { return store_->Get(key); }
  Status Write(uint32_t row, int rows, const SleepingBlock& block) override;

 private:
  KvMemory* memory_;
  BlockStore* store_;
  SleepingBlock sleeping_;  // keeps its memory
};

}  // namespace triaxial

#endif  // TRIAXIAL_ENGINE_KV_BACKING_H_
