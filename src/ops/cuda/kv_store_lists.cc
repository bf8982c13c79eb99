#include <algorithm>

#include "base/check.h"
#include "ops/cuda/kv_store.h"

namespace triaxial::cuda {
namespace {

bool InPlace(const KvStore& store) {
  return store.format == Format::kBf16 && store.unit_row == store.tail_row;
}

}  // namespace

void ListStores(std::span<const KvStore> stores, StoreList* list) {
  list->stores.assign(stores.begin(), stores.end());
  std::stable_sort(list->stores.begin(), list->stores.end(),
                   [](const KvStore& a, const KvStore& b) { return a.tail_row < b.tail_row; });
  list->groups.assign(1, 0);
  for (size_t i = 0; i < list->stores.size(); ++i) {
    const KvStore& store = list->stores[i];
    CHECK(store.rows > 0 && store.from_tail + store.rows <= kBlockTokens);
    CHECK(store.format == Format::kBf16 ? store.from_tail + store.rows <= store.capacity
                                        : store.from_tail + store.rows == kBlockTokens);
    if (i == 0 || store.tail_row != list->stores[i - 1].tail_row)
      list->groups.push_back(static_cast<int32_t>(i));
  }
  list->groups[0] = static_cast<int32_t>(list->groups.size()) - 1;
  list->groups.push_back(static_cast<int32_t>(list->stores.size()));
}

void SplitStores(std::span<const KvStore> stores, std::span<RowPlace> places, StoreList* at_the_end) {
  at_the_end->stores.clear();
  at_the_end->groups.assign(1, 0);
  for (const KvStore& store : stores) {
    CHECK(store.rows == 1 && store.row_begin >= 0 && static_cast<size_t>(store.row_begin) < places.size());
    RowPlace& place = places[static_cast<size_t>(store.row_begin)];
    place.token = store.from_tail;
    KvStore later = store;
    if (store.format == Format::kBf16) {
      place.unit_row = store.unit_row;
      place.capacity = store.capacity;
      if (InPlace(store)) continue;
      later.row_begin = kRowsInPlace;
    } else {  // the last row of a block goes through the tail, where it has its place
      CHECK(store.from_tail == kBlockTokens - 1 && store.tail_capacity == kBlockTokens);
      place.unit_row = store.tail_row;
      place.capacity = store.tail_capacity;
      later.from_tail = kBlockTokens;
      later.rows = 0;
      later.row_begin = kRowsInPlace;
    }
    at_the_end->groups.push_back(static_cast<int32_t>(at_the_end->stores.size()));
    at_the_end->stores.push_back(later);
  }
  at_the_end->groups[0] = static_cast<int32_t>(at_the_end->stores.size());
  at_the_end->groups.push_back(static_cast<int32_t>(at_the_end->stores.size()));
}

}  // namespace triaxial::cuda
