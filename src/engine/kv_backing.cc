#include "engine/kv_backing.h"

#include <new>
#include <utility>

#include "base/log.h"

namespace triaxial {

Result<SleepingBlock> KvBacking::Take(const BlockKey&) { return NotFound("no blocks sleep here"); }

void MemoryBacking::Sleep(const KvBlock& block, const BlockKey& key, const BlockKey& parent) {
  if (store_ == nullptr) return;
  const KvGeometry& geometry = memory_->geometry();
  const int rows = UnitsOf(geometry, block.format);
  try {
    SleepingBlock sleeping = store_->Begin();
    sleeping.key = key;
    sleeping.parent = parent;
    sleeping.position = block.position;
    sleeping.format = block.format;
    sleeping.contents = block.contents;
    sleeping.tags = block.tags;
    sleeping.bytes.resize(static_cast<size_t>(rows * UnitRowBytes(geometry) * geometry.num_layers));
    const Status read = memory_->Read(block.unit_row, rows, sleeping.bytes.data());
    if (!read.ok()) {
      spdlog::warn("a block is dropped instead of put to sleep: {}", read.message());
      return store_->GiveBack(std::move(sleeping));
    }
    store_->Put(std::move(sleeping));
  } catch (const std::bad_alloc&) {
    spdlog::warn("a block is dropped instead of put to sleep: out of memory");
  }
}

Status MemoryBacking::Write(uint32_t row, int rows, SleepingBlock&& block) {
  const KvGeometry& geometry = memory_->geometry();
  const auto bytes = static_cast<size_t>(rows * UnitRowBytes(geometry) * geometry.num_layers);
  if (block.bytes.size() != bytes) return Internal("a sleeping block has not the size of its format");
  const Status written = memory_->Write(row, rows, block.bytes.data());
  store_->GiveBack(std::move(block));
  return written;
}

}  // namespace triaxial
