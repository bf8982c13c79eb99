#include "ops/kv_store.h"

#include <algorithm>
#include <cstring>
#include <vector>

#include "base/check.h"
#include "base/float16.h"
#include "base/parallel.h"

namespace triaxial {
namespace {

// Below this many values a loop costs less than waking the threads.
constexpr int64_t kSerialValues = 16 * 1024;

template <typename Fn>
void ParallelForValues(int64_t n, int64_t values, const Fn& fn) {
  if (values > kSerialValues) return ParallelFor(n, fn);
  for (int64_t i = 0; i < n; ++i) fn(i);
}

uint8_t* HeadOf(const KvGeometry& g, uint8_t* arena_layer, uint32_t unit_row, Format f, int64_t head,
                int capacity = kBlockTokens) {
  return arena_layer + unit_row * UnitRowBytes(g) + head * HeadBytes(g, f, capacity);
}

// A tail is opened or extended in place.
bool Appends(const KvStore& store) {
  return store.format == Format::kBf16 && store.unit_row == store.tail_row;
}

// Writes rows of one head into the places of tokens [from_tail, from_tail + rows) of its tail.
void AppendToTail(const KvGeometry& g, uint8_t* head_bytes, const float* k, const float* v,
                  int64_t row_stride, const KvStore& store) {
  if (store.from_tail == 0) {  // also zeroes the places of the tokens to come
    EncodeBlock(g, Format::kBf16, {}, k, v, row_stride, store.rows, head_bytes, store.capacity);
    return;
  }
  uint8_t* keys = head_bytes;
  uint8_t* values = head_bytes + SideOffset(g, Format::kBf16, Side::kV, store.capacity);
  for (int i = 0; i < store.rows; ++i) {
    const int t = store.from_tail + i;
    for (int c = 0; c < g.head_dim; ++c) {
      const bf16_t key = FloatToBf16(k[i * row_stride + c]), value = FloatToBf16(v[i * row_stride + c]);
      std::memcpy(keys + 2 * PlaceOfBf16(c, t, store.capacity), &key, sizeof(key));
      std::memcpy(values + 2 * PlaceOfBf16(t, c, g.head_dim), &value, sizeof(value));
    }
  }
}

// Encodes a block of one head in a new place from the tail's tokens and the step's rows: a whole one, or a
// tail with more room.
void EncodeFromTail(const KvGeometry& g, const ClipRatios& clip, const uint8_t* tail_bytes,
                    uint8_t* head_bytes, const float* k, const float* v, int64_t row_stride,
                    const KvStore& store) {
  alignas(64) float tile[kBlockTokens * 128];
  for (const Side side : {Side::kK, Side::kV}) {
    if (store.from_tail > 0) {
      DecodeSide(g, Format::kBf16, side, tail_bytes, store.from_tail, tile, store.tail_capacity);
    }
    const float* rows = side == Side::kK ? k : v;
    for (int i = 0; i < store.rows; ++i) {
      RoundToBf16(rows + i * row_stride, g.head_dim, tile + (store.from_tail + i) * g.head_dim);
    }
    EncodeSide(g, store.format, side, clip, tile, g.head_dim, store.from_tail + store.rows, head_bytes,
               store.capacity);
  }
}

void CheckStore(const KvStore& store) {
  const int tokens = store.from_tail + store.rows;
  if (Appends(store)) {
    CHECK(store.rows > 0 && store.capacity == store.tail_capacity);
  } else {
    CHECK(store.from_tail == 0 || store.unit_row != store.tail_row);
    CHECK(store.from_tail <= store.tail_capacity);
  }
  CHECK(store.format == Format::kBf16 ? tokens <= store.capacity : tokens == kBlockTokens);
}

}  // namespace

void StoreKv(const KvGeometry& g, const ClipRatios& clip, uint8_t* arena_layer, const float* k,
             const float* v, std::span<const KvStore> stores) {
  // Runs of stores that depend on each other: those that read or write the same tail.
  std::vector<const KvStore*> ordered;
  int64_t values = 0;
  for (const KvStore& store : stores) {
    CheckStore(store);
    ordered.push_back(&store);
    values += int64_t{2} * store.rows * g.num_kv_heads * g.head_dim;
  }
  std::stable_sort(ordered.begin(), ordered.end(),
                   [](const KvStore* a, const KvStore* b) { return a->tail_row < b->tail_row; });
  std::vector<size_t> begins;
  for (size_t i = 0; i < ordered.size(); ++i) {
    if (i == 0 || ordered[i]->tail_row != ordered[i - 1]->tail_row) begins.push_back(i);
  }
  const int64_t groups = static_cast<int64_t>(begins.size());
  begins.push_back(ordered.size());

  const int64_t row_stride = int64_t{g.num_kv_heads} * g.head_dim;
  ParallelForValues(groups * g.num_kv_heads, values, [&](int64_t task) {
    const size_t group = static_cast<size_t>(task / g.num_kv_heads);
    const int64_t head = task % g.num_kv_heads;
    for (size_t i = begins[group]; i < begins[group + 1]; ++i) {
      const KvStore& store = *ordered[i];
      const int64_t first = store.row_begin * row_stride + head * g.head_dim;
      uint8_t* to = HeadOf(g, arena_layer, store.unit_row, store.format, head, store.capacity);
      if (Appends(store)) {
        AppendToTail(g, to, k + first, v + first, row_stride, store);
      } else {
        const uint8_t* tail =
            HeadOf(g, arena_layer, store.tail_row, Format::kBf16, head, store.tail_capacity);
        EncodeFromTail(g, clip, tail, to, k + first, v + first, row_stride, store);
      }
    }
  });
}

void ConvertKv(const KvGeometry& g, const ClipRatios& clip, uint8_t* arena_layer,
               std::span<const KvConvert> converts) {
  const int64_t values = int64_t{2} * kBlockTokens * g.num_kv_heads * g.head_dim;
  ParallelForValues(
      static_cast<int64_t>(converts.size()), values * static_cast<int64_t>(converts.size()), [&](int64_t i) {
        const KvConvert& convert = converts[static_cast<size_t>(i)];
        alignas(64) float tile[kBlockTokens * 128];
        alignas(64) uint8_t in[kBlockTokens * 128 * 2 * sizeof(uint16_t)];
        CHECK(HeadBytes(g, convert.from) <= static_cast<int64_t>(sizeof(in)));
        for (int head = 0; head < g.num_kv_heads; ++head) {
          // In place, a head ends where it was or before, so that it overwrites at most itself.
          std::memcpy(in, HeadOf(g, arena_layer, convert.from_row, convert.from, head),
                      static_cast<size_t>(HeadBytes(g, convert.from)));
          uint8_t* to = HeadOf(g, arena_layer, convert.to_row, convert.to, head);
          for (const Side side : {Side::kK, Side::kV}) {
            const int bits = Bits(convert.from, side);
            if (bits == Bits(convert.to, side)) {
              std::memcpy(to + SideOffset(g, convert.to, side), in + SideOffset(g, convert.from, side),
                          static_cast<size_t>(SideBytes(g, bits)));
              continue;
            }
            DecodeSide(g, convert.from, side, in, kBlockTokens, tile);
            EncodeSide(g, convert.to, side, clip, tile, g.head_dim, kBlockTokens, to);
          }
        }
      });
}

}  // namespace triaxial
