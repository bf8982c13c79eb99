#include "kv/store_thread.h"

#include <algorithm>
#include <new>
#include <utility>

#include "base/log.h"
#include "base/reserve.h"

namespace triaxial {
namespace {

bool Among(const BlockKey& key, std::span<const BlockKey> keys) {
  return std::find(keys.begin(), keys.end(), key) != keys.end();
}

}  // namespace

StoreThread::StoreThread(std::unique_ptr<BlockStore> store, int64_t block_bytes)
    : store_(std::move(store)), block_bytes_(block_bytes) {
  spares_.reserve(2 * kUnderWay);
  for (const BlockKey& key : store_->Keys()) keys_.insert(key);
  stats_ = store_->Stats();
  thread_ = std::thread([this] { Run(); });
}

StoreThread::~StoreThread() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
  }
  work_.notify_one();
  thread_.join();
}

SleepingBlock StoreThread::Begin() {
  const std::lock_guard lock(mutex_);
  SleepingBlock block;
  if (puts_.size() >= kUnderWay) {
    block = std::move(puts_.front());
    puts_.pop_front();
    keys_.erase(block.key);
    ++dropped_;
  } else if (!spares_.empty()) {
    block = std::move(spares_.back());
    spares_.pop_back();
  }
  return block;
}

void StoreThread::Put(SleepingBlock&& block) {
  const std::lock_guard lock(mutex_);
  keys_.insert(block.key);
  puts_.push_back(std::move(block));
  work_.notify_one();
}

bool StoreThread::Contains(const BlockKey& key) const {
  const std::lock_guard lock(mutex_);
  return keys_.contains(key);
}

bool StoreThread::empty() const {
  const std::lock_guard lock(mutex_);
  return keys_.empty();
}

void StoreThread::Fetch(std::span<const BlockKey> keys) {
  const std::lock_guard lock(mutex_);
  std::erase_if(fetched_, [&](const auto& fetched) { return !Among(fetched.first, keys); });
  fetches_.clear();
  for (const BlockKey& key : keys) {
    if (!fetched_.contains(key) && fetching_ != key) fetches_.push_back(key);
  }
  work_.notify_one();
}

Result<SleepingBlock> StoreThread::Take(const BlockKey& key) {
  const std::lock_guard lock(mutex_);
  if (auto fetched = fetched_.extract(key)) {
    work_.notify_one();
    return std::move(fetched.mapped());
  }
  return Unavailable("the block has not come yet");
}

void StoreThread::GiveBack(SleepingBlock&& block) {
  const std::lock_guard lock(mutex_);
  if (spares_.size() < spares_.capacity()) spares_.push_back(std::move(block));
}

void StoreThread::Wait() {
  std::unique_lock lock(mutex_);
  done_.wait(lock, [this] { return !fetched_.empty() || (fetches_.empty() && !fetching_); });
}

void StoreThread::Drain() {
  std::unique_lock lock(mutex_);
  done_.wait(lock, [this] { return puts_.empty() && !putting_; });
}

Status StoreThread::Save() {
  std::unique_lock lock(mutex_);
  fetches_.clear();
  done_.wait(lock, [this] { return puts_.empty() && !putting_ && !fetching_; });
  const Status saved = store_->Save();
  stats_ = store_->Stats();
  return saved;
}

BlockStoreStats StoreThread::Stats() const {
  const std::lock_guard lock(mutex_);
  BlockStoreStats stats = stats_;
  stats.dropped += dropped_;
  return stats;
}

void StoreThread::MakeSpares() {
  try {
    for (size_t i = 0; i < kUnderWay; ++i) {
      SleepingBlock block;
      block.bytes.resize(static_cast<size_t>(block_bytes_));
      const std::lock_guard lock(mutex_);
      if (stop_ || spares_.size() >= kUnderWay) return;
      spares_.push_back(std::move(block));
    }
  } catch (const std::bad_alloc&) {  // then blocks bring their own
  }
}

void StoreThread::Run() {
  MakeSpares();
  std::unique_lock lock(mutex_);
  const auto fetches = [this] { return !stop_ && !fetches_.empty() && fetched_.size() < kUnderWay; };
  const auto is_put = [this](const BlockKey& key) {
    return std::any_of(puts_.begin(), puts_.end(), [&](const SleepingBlock& b) { return b.key == key; });
  };
  for (bool fetched_last = false;;) {
    work_.wait(lock, [&] { return stop_ || !puts_.empty() || fetches(); });
    // In turn, so that neither keeps the other waiting; what is to be fetched may have to be put first.
    try {
      if (fetches() && !is_put(fetches_.front()) && (puts_.empty() || !std::exchange(fetched_last, true))) {
        FetchOne(&lock);
      } else if (!puts_.empty()) {
        fetched_last = false;
        PutOne(&lock);
      } else {
        return;
      }
    } catch (const std::bad_alloc&) {
      spdlog::warn("a block that was to sleep or to wake is lost: out of memory");
    }
    done_.notify_all();
    if (spares_.size() <= kUnderWay) continue;
    std::optional<SleepingBlock> excess = std::move(spares_.back());
    spares_.pop_back();
    lock.unlock();
    excess.reset();  // giving memory back takes time, too
    lock.lock();
  }
}

void StoreThread::FetchOne(std::unique_lock<std::mutex>* lock) {
  const BlockKey key = fetches_.front();
  fetches_.pop_front();
  fetching_ = key;
  lock->unlock();
  Result<SleepingBlock> block = Internal("out of memory");
  try {
    block = store_->Get(key);
  } catch (const std::bad_alloc&) {
  }
  lock->lock();
  fetching_.reset();
  Refresh();
  if (!block.ok()) keys_.erase(key);
  fetched_.emplace(key, std::move(block));
}

void StoreThread::PutOne(std::unique_lock<std::mutex>* lock) {
  SleepingBlock block = std::move(puts_.front());
  puts_.pop_front();
  putting_ = true;
  lock->unlock();
  bool stored = false;
  try {
    stored = store_->Put(block);
  } catch (const std::bad_alloc&) {
  }
  lock->lock();
  putting_ = false;
  Refresh();
  if (stored) {
    keys_.insert(block.key);
  } else {
    keys_.erase(block.key);
  }
  if (spares_.size() < spares_.capacity()) spares_.push_back(std::move(block));
}

void StoreThread::Refresh() {
  for (const BlockKey& key : store_->TakeGone()) keys_.erase(key);
  stats_ = store_->Stats();
}

}  // namespace triaxial
