// A block store on a thread of its own, so that nobody waits for checksums, fresh memory and the disk:
// whoever decodes hands over copies of blocks, and takes what was fetched when it has come.
//
// At most kUnderWay blocks are on their way to sleep, and as many back, each a copy in memory (1 to 8 MB for
// a model of 2B parameters). Where blocks go to sleep faster than the store can take them, the one that has
// waited longest is dropped and counted: a conversation goes to sleep from its end, so that its beginning is
// kept, and what is lost can be computed again.
#ifndef TRIAXIAL_KV_STORE_THREAD_H_
#define TRIAXIAL_KV_STORE_THREAD_H_

#include <condition_variable>
#include <deque>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <thread>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "kv/block_store.h"

namespace triaxial {

class StoreThread {
 public:
  // `block_bytes`: of a usual block. Memory for kUnderWay of these is made ready ahead, since the first touch
  // of a megabyte takes longer than copying it.
  StoreThread(std::unique_ptr<BlockStore> store, int64_t block_bytes);
  ~StoreThread();  // what was handed over is stored first

  // All by one thread, which waits for the store only in Wait, Drain and Save. Stats by any.

  // A block to fill in and Put, whose memory has mostly been used before.
  SleepingBlock Begin();
  // Takes a block from Begin. Its key may be fetched from now on.
  void Put(SleepingBlock&& block);
  bool Contains(const BlockKey& key) const;
  bool empty() const;  // nothing sleeps

  // Asks for the blocks of these keys, in this order; those that were asked for already are under way. What
  // others were fetched and never taken is given up.
  void Fetch(std::span<const BlockKey> keys);
  // As BlockStore::Get; Unavailable if the block has not come yet, or not been asked for. A block comes once;
  // give it back for its memory.
  Result<SleepingBlock> Take(const BlockKey& key);
  void GiveBack(SleepingBlock&& block);
  // Until something that was asked for has come, or nothing is under way.
  void Wait();

  // When all that was handed over is stored.
  void Drain();
  // That, and then BlockStore::Save.
  Status Save();
  BlockStoreStats Stats() const;

  static constexpr size_t kUnderWay = 64;

 private:
  void Run();
  void MakeSpares();
  void FetchOne(std::unique_lock<std::mutex>* lock);
  void PutOne(std::unique_lock<std::mutex>* lock);
  void Refresh();

  const std::unique_ptr<BlockStore> store_;  // the thread's
  const int64_t block_bytes_;
  mutable std::mutex mutex_;      // guards all below
  std::condition_variable work_;  // for the thread
  std::condition_variable done_;  // by it
  std::deque<SleepingBlock> puts_;
  std::deque<BlockKey> fetches_;
  std::unordered_map<BlockKey, Result<SleepingBlock>, BlockKeyHash> fetched_;
  std::optional<BlockKey> fetching_;
  bool putting_ = false;
  std::vector<SleepingBlock> spares_;
  std::unordered_set<BlockKey, BlockKeyHash> keys_;  // that sleep, or are about to
  BlockStoreStats stats_;
  int64_t dropped_ = 0;
  bool stop_ = false;
  std::thread thread_;
};

}  // namespace triaxial

#endif  // TRIAXIAL_KV_STORE_THREAD_H_
