// Blocks in host memory, in order of their last use.
#ifndef TRIAXIAL_KV_HOST_BLOCKS_H_
#define TRIAXIAL_KV_HOST_BLOCKS_H_

#include <cstdint>
#include <list>
#include <unordered_map>
#include <utility>

#include "base/check.h"
#include "kv/block_record.h"

namespace triaxial {

class HostBlocks {
 public:
  // Nothing if it is not there; else it becomes the most recently used one.
  const Record* Use(const BlockKey& key) {
    const auto entry = index_.find(key);
    if (entry == index_.end()) return nullptr;
    order_.splice(order_.end(), order_, entry->second);
    return &*entry->second;
  }
  bool Contains(const BlockKey& key) const { return index_.contains(key); }
  // Its key must not be there.
  void Insert(Record record) {
    CHECK(!Contains(record.key));
    std::list<Record> last;
    last.push_back(std::move(record));
    index_.emplace(last.back().key, last.begin());
    bytes_ += static_cast<int64_t>(last.back().size);
    order_.splice(order_.end(), last);
  }
  void Erase(const BlockKey& key) {
    const auto entry = index_.find(key);
    if (entry == index_.end()) return;
    bytes_ -= static_cast<int64_t>(entry->second->size);
    order_.erase(entry->second);
    index_.erase(entry);
  }
  // The least recently used one; there must be one.
  Record TakeOldest() {
    CHECK(!order_.empty());
    Record record = std::move(order_.front());
    bytes_ -= static_cast<int64_t>(record.size);
    index_.erase(record.key);
    order_.pop_front();
    return record;
  }

  const std::list<Record>& order() const { return order_; }  // the least recently used one first
  int64_t blocks() const { return static_cast<int64_t>(index_.size()); }
  int64_t bytes() const { return bytes_; }

 private:
  std::list<Record> order_;
  std::unordered_map<BlockKey, std::list<Record>::iterator, BlockKeyHash> index_;
  int64_t bytes_ = 0;
};

}  // namespace triaxial

#endif  // TRIAXIAL_KV_HOST_BLOCKS_H_
