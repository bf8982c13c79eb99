// Blocks by a number that each has, the least first; among equals the lowest id. No insertion asks for memory
// that Reserve has not.
#ifndef TRIAXIAL_KV_BLOCK_HEAP_H_
#define TRIAXIAL_KV_BLOCK_HEAP_H_

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "base/check.h"
#include "base/reserve.h"
#include "kv/block.h"

namespace triaxial {

class BlockHeap {
 public:
  struct Entry {
    double key;
    BlockId id;
    bool operator<(const Entry& other) const { return key != other.key ? key < other.key : id < other.id; }
  };

  // For ids below `blocks`. If memory is missing nothing has changed.
  void Reserve(size_t blocks) {
    ReserveAtLeast(&heap_, blocks);
    ReserveAtLeast(&places_, blocks);
    if (places_.size() < blocks) places_.resize(blocks, kNowhere);
  }
  void Insert(double key, BlockId id) {
    CHECK(!Contains(id) && heap_.size() < heap_.capacity());
    heap_.push_back({key, id});
    Rise(heap_.size() - 1);
  }
  // Nothing if it is not there.
  void Erase(BlockId id) {
    if (!Contains(id)) return;
    const size_t place = std::exchange(PlaceOf(id), kNowhere);
    const Entry last = heap_.back();
    heap_.pop_back();
    if (place == heap_.size()) return;
    heap_[place] = last;
    Rise(Sink(place));
  }
  bool Contains(BlockId id) const { return places_[static_cast<size_t>(id)] != kNowhere; }
  double key(BlockId id) const { return heap_[places_[static_cast<size_t>(id)]].key; }
  bool empty() const { return heap_.empty(); }
  size_t size() const { return heap_.size(); }
  const Entry& least() const { return heap_.front(); }

 private:
  static constexpr size_t kNowhere = SIZE_MAX;

  size_t& PlaceOf(BlockId id) { return places_[static_cast<size_t>(id)]; }
  size_t Rise(size_t place) {
    const Entry entry = heap_[place];
    for (size_t above; place > 0 && entry < heap_[above = (place - 1) / 2]; place = above) {
      Put(heap_[above], place);
    }
    Put(entry, place);
    return place;
  }
  size_t Sink(size_t place) {
    const Entry entry = heap_[place];
    for (size_t below; (below = 2 * place + 1) < heap_.size(); place = below) {
      if (below + 1 < heap_.size() && heap_[below + 1] < heap_[below]) ++below;
      if (!(heap_[below] < entry)) break;
      Put(heap_[below], place);
    }
    Put(entry, place);
    return place;
  }
  void Put(const Entry& entry, size_t place) {
    heap_[place] = entry;
    PlaceOf(entry.id) = place;
  }

  std::vector<Entry> heap_;
  std::vector<size_t> places_;  // by id: where it is in heap_
};

}  // namespace triaxial

#endif  // TRIAXIAL_KV_BLOCK_HEAP_H_
