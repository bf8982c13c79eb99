// One byte arena for all formats: equal units, blocks as runs of unit rows. Allocation is pure bookkeeping
// (UnitAllocator); the bytes are a backend's KvMemory, on the CPU a KvArena.
#ifndef TRIAXIAL_KV_ARENA_H_
#define TRIAXIAL_KV_ARENA_H_

#include <cstdint>
#include <map>
#include <optional>
#include <set>
#include <string_view>
#include <utility>
#include <vector>

#include "base/status.h"
#include "kv/format.h"

namespace triaxial {

// Runs of unit rows in [0, total). Best fit with coalescing; large (BF16) runs are cut from the top of a run
// and the small ones from its bottom, so that they do not cut each other's space. Only Reserve, and Allocate
// beyond what was reserved, ask the machine for memory.
class UnitAllocator {
 public:
  explicit UnitAllocator(int64_t total_rows);  // at most kMaxRows (CHECK)
  // Memory to keep books of so many allocations more.
  void Reserve(size_t allocations);
  // First row of a free run of `rows`, or nullopt if no run is long enough (free_rows() may still be larger:
  // compact).
  std::optional<uint32_t> Allocate(int rows, bool from_top);
  // Returns an allocation, or what FreeEnd left of it. Rows that are free already are a CHECK.
  void Free(uint32_t row, int rows);
  // Returns the last `rows` of an allocation, from `row` on; it keeps the others.
  void FreeEnd(uint32_t row, int rows);
  // Slides all allocations away from one free run.
  void Reset(uint32_t free_row, int64_t free_rows);
  int64_t total_rows() const { return total_; }
  int64_t free_rows() const { return free_; }
  int64_t largest_run() const;
  const std::map<uint32_t, uint32_t>& free_runs() const { return by_row_; }  // row -> length

  static constexpr int64_t kMaxRows = UINT32_MAX;

 private:
  using ByRow = std::map<uint32_t, uint32_t>;
  using ByLength = std::set<std::pair<uint32_t, uint32_t>>;
  struct Spare {
    ByRow::node_type by_row;
    ByLength::node_type by_length;
  };

  void Insert(uint32_t row, uint32_t length);
  void Erase(ByRow::iterator run);

  int64_t total_;
  int64_t free_ = 0;
  size_t allocations_ = 0;
  ByRow by_row_;               // free runs: row -> length
  ByLength by_length_;         // the same: (length, row)
  std::vector<Spare> spares_;  // for runs to come: there is at most one more than allocations
};

// The memory behind the rows, wherever a model keeps its cache. Everything here waits for what the model has
// been asked to do before.
class KvMemory {
 public:
  virtual ~KvMemory() = default;
  virtual const KvGeometry& geometry() const = 0;
  virtual int64_t total_rows() const = 0;
  int64_t bytes() const { return total_rows() * UnitRowBytes(geometry()) * geometry().num_layers; }
  // Names the order of bytes within a block ("cpu-1"): stored blocks fit only a memory of the same layout.
  virtual std::string_view layout() const = 0;
  // Copies a block's rows (all layers) to another place; source and destination may overlap.
  virtual void Move(uint32_t from_row, uint32_t to_row, int rows) = 0;
  // Copies rows, as stored, to and from host memory: [num_layers][rows][UnitRowBytes]. ResourceExhausted or
  // Internal if a device refuses.
  virtual Status Read(uint32_t row, int rows, uint8_t* out) const = 0;
  virtual Status Write(uint32_t row, int rows, const uint8_t* in) = 0;
};

// num_layers regions of total_rows * UnitRowBytes, zero-filled lazily by the kernel.
class KvArena final : public KvMemory {
 public:
  // `bytes` is rounded down to whole unit rows over all layers. ResourceExhausted if the machine refuses it,
  // InvalidArgument if it is less than one BF16 block or more rows than a block table can name.
  static Result<KvArena> Create(const KvGeometry& geometry, int64_t bytes);
  KvArena(KvArena&& other) noexcept;
  KvArena& operator=(KvArena&& other) noexcept;
  ~KvArena() override;

  const KvGeometry& geometry() const override { return geometry_; }
  int64_t total_rows() const override { return rows_; }
  std::string_view layout() const override { return "cpu-1"; }
  void Move(uint32_t from_row, uint32_t to_row, int rows) override;
  Status Read(uint32_t row, int rows, uint8_t* out) const override;
  Status Write(uint32_t row, int rows, const uint8_t* in) override;

  // Start of a layer's region; unit row r lies at LayerData(l) + r * UnitRowBytes(geometry()).
  uint8_t* LayerData(int layer) { return data_ + layer * rows_ * UnitRowBytes(geometry_); }
  const uint8_t* LayerData(int layer) const { return data_ + layer * rows_ * UnitRowBytes(geometry_); }

 private:
  KvArena() = default;
  KvGeometry geometry_;
  int64_t rows_ = 0;
  uint8_t* data_ = nullptr;
};

// How many unit rows `bytes` make; the errors of KvArena::Create that need no memory. For every backend.
Result<int64_t> RowsOfMemory(const KvGeometry& geometry, int64_t bytes);

}  // namespace triaxial

#endif  // TRIAXIAL_KV_ARENA_H_
