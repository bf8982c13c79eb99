#include "kv/arena.h"

#include <sys/mman.h>

#include <cerrno>
#include <cstring>
#include <string>
#include <utility>

#include "base/check.h"
#include "base/checked_math.h"
#include "base/reserve.h"

namespace triaxial {

UnitAllocator::UnitAllocator(int64_t total_rows) : total_(total_rows) {
  CHECK(total_rows >= 0 && total_rows <= kMaxRows);
  Reserve(0);
  Reset(0, total_rows);
}

void UnitAllocator::Reserve(size_t allocations) {
  const size_t runs = allocations_ + allocations + 1;
  ReserveAtLeast(&spares_, runs);
  while (by_row_.size() + spares_.size() < runs) {
    ByRow row{{0, 0}};
    ByLength length{{0, 0}};
    spares_.push_back({row.extract(row.begin()), length.extract(length.begin())});
  }
}

void UnitAllocator::Insert(uint32_t row, uint32_t length) {
  CHECK(!spares_.empty());
  Spare& spare = spares_.back();
  spare.by_row.key() = row;
  spare.by_row.mapped() = length;
  spare.by_length.value() = {length, row};
  by_row_.insert(std::move(spare.by_row));
  by_length_.insert(std::move(spare.by_length));
  spares_.pop_back();
}

void UnitAllocator::Erase(ByRow::iterator run) {
  ByLength::node_type by_length = by_length_.extract({run->second, run->first});
  spares_.push_back({by_row_.extract(run), std::move(by_length)});
}

std::optional<uint32_t> UnitAllocator::Allocate(int rows, bool from_top) {
  CHECK(rows > 0);
  const uint32_t wanted = static_cast<uint32_t>(rows);
  auto fit = by_length_.lower_bound({wanted, 0});
  if (fit == by_length_.end()) return std::nullopt;
  Reserve(1);
  ++allocations_;
  // Among runs of one length the small take the lowest, the large the highest.
  if (from_top) fit = std::prev(by_length_.upper_bound({fit->first, UINT32_MAX}));
  const auto [length, row] = *fit;
  Erase(by_row_.find(row));
  const uint32_t rest = length - wanted;
  if (rest > 0) Insert(from_top ? row : row + wanted, rest);
  free_ -= rows;
  return from_top ? row + rest : row;
}

void UnitAllocator::Free(uint32_t row, int rows) {
  CHECK(allocations_ > 0);
  FreeEnd(row, rows);
  --allocations_;
}

void UnitAllocator::FreeEnd(uint32_t row, int rows) {
  CHECK(rows > 0 && int64_t{row} + rows <= total_);
  uint32_t length = static_cast<uint32_t>(rows);
  auto next = by_row_.lower_bound(row);
  CHECK(next == by_row_.end() || next->first - row >= length);
  if (next != by_row_.begin()) {
    const auto before = std::prev(next);
    CHECK(before->first + before->second <= row);
    if (before->first + before->second == row) {
      row = before->first;
      length += before->second;
      Erase(before);
    }
  }
  if (next != by_row_.end() && next->first == row + length) {
    length += next->second;
    Erase(next);
  }
  Insert(row, length);
  free_ += rows;
}

void UnitAllocator::Reset(uint32_t free_row, int64_t free_rows) {
  CHECK(free_rows >= 0 && free_row + free_rows <= total_);
  while (!by_row_.empty()) Erase(by_row_.begin());
  free_ = free_rows;
  if (free_rows > 0) Insert(free_row, static_cast<uint32_t>(free_rows));
}

int64_t UnitAllocator::largest_run() const { return by_length_.empty() ? 0 : by_length_.rbegin()->first; }

Result<int64_t> RowsOfMemory(const KvGeometry& geometry, int64_t bytes) {
  CHECK(geometry.num_layers > 0 && geometry.num_kv_heads > 0 && geometry.head_dim > 0);
  uint64_t checked_row = 0, checked_block = 0;
  if (!CheckedMul(static_cast<uint64_t>(UnitRowBytes(geometry)), static_cast<uint64_t>(geometry.num_layers),
                  &checked_row) ||
      !CheckedMul(checked_row, static_cast<uint64_t>(UnitsOf(geometry, Format::kBf16)), &checked_block) ||
      checked_block > static_cast<uint64_t>(INT64_MAX)) {
    return InvalidArgument("a block of " + std::to_string(geometry.num_layers) + " layers and " +
                           std::to_string(geometry.num_kv_heads) +
                           " KV heads has more bytes than 63 bits can count; check the model's config.json");
  }
  const int64_t row_bytes = static_cast<int64_t>(checked_row);
  const int64_t block_bytes = static_cast<int64_t>(checked_block);
  if (bytes < block_bytes) {
    return InvalidArgument("a KV memory of " + std::to_string(bytes) +
                           " bytes holds no block of this model (" + std::to_string(block_bytes) +
                           " bytes in bf16); raise --kv-memory");
  }
  if (bytes / row_bytes > UnitAllocator::kMaxRows) {
    return InvalidArgument("a KV memory of " + std::to_string(bytes) + " bytes is more than " +
                           std::to_string(UnitAllocator::kMaxRows) + " units of " +
                           std::to_string(row_bytes) + " bytes; lower --kv-memory");
  }
  return bytes / row_bytes;
}

Result<KvArena> KvArena::Create(const KvGeometry& geometry, int64_t bytes) {
  KvArena arena;
  ASSIGN_OR_RETURN(arena.rows_, RowsOfMemory(geometry, bytes));
  arena.geometry_ = geometry;
  const size_t size = static_cast<size_t>(arena.bytes());
  // Without MAP_NORESERVE: what the machine cannot hold is refused here rather than killed for later.
  void* data = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (data == MAP_FAILED) {
    return ResourceExhausted("the machine refuses " + std::to_string(size) + " bytes of KV memory (" +
                             std::strerror(errno) + "); lower --kv-memory");
  }
  madvise(data, size, MADV_HUGEPAGE);  // a wish: where it is not granted, only time is lost
  arena.data_ = static_cast<uint8_t*>(data);
  return arena;
}

KvArena::KvArena(KvArena&& other) noexcept
    : geometry_(other.geometry_),
      rows_(std::exchange(other.rows_, 0)),
      data_(std::exchange(other.data_, nullptr)) {}

KvArena& KvArena::operator=(KvArena&& other) noexcept {
  std::swap(geometry_, other.geometry_);
  std::swap(rows_, other.rows_);
  std::swap(data_, other.data_);
  return *this;
}

KvArena::~KvArena() {
  if (data_ != nullptr) munmap(data_, static_cast<size_t>(bytes()));
}

void KvArena::Move(uint32_t from_row, uint32_t to_row, int rows) {
  CHECK(rows >= 0 && int64_t{from_row} + rows <= rows_ && int64_t{to_row} + rows <= rows_);
  const int64_t row_bytes = UnitRowBytes(geometry_);
  for (int layer = 0; layer < geometry_.num_layers; ++layer) {
    uint8_t* data = LayerData(layer);
    std::memmove(data + to_row * row_bytes, data + from_row * row_bytes,
                 static_cast<size_t>(rows * row_bytes));
  }
}

Status KvArena::Read(uint32_t row, int rows, uint8_t* out) const {
  CHECK(rows >= 0 && int64_t{row} + rows <= rows_);
  const int64_t row_bytes = UnitRowBytes(geometry_);
  for (int layer = 0; layer < geometry_.num_layers; ++layer, out += rows * row_bytes) {
    std::memcpy(out, LayerData(layer) + row * row_bytes, static_cast<size_t>(rows * row_bytes));
  }
  return OkStatus();
}

Status KvArena::Write(uint32_t row, int rows, const uint8_t* in) {
  CHECK(rows >= 0 && int64_t{row} + rows <= rows_);
  const int64_t row_bytes = UnitRowBytes(geometry_);
  for (int layer = 0; layer < geometry_.num_layers; ++layer, in += rows * row_bytes) {
    std::memcpy(LayerData(layer) + row * row_bytes, in, static_cast<size_t>(rows * row_bytes));
  }
  return OkStatus();
}

}  // namespace triaxial
