#include "engine/kv_backing.h"

#include "base/log.h"

namespace triaxial {

Result<SleepingBlock> KvBacking::Get(const BlockKey&) { return NotFound("no blocks sleep here"); }

void MemoryBacking::Sleep(const KvBlock& block, const BlockKey& key, const BlockKey& parent) {
  if (store_ == nullptr) return;
  const KvGeometry& geometry = memory_->geometry();
  const int rows = UnitsOf(geometry, block.format);
  sleeping_.key = key;
  sleeping_.parent = parent;
  sleeping_.position = block.position;
  sleeping_.format = block.format;
  sleeping_.contents = block.contents;
  sleeping_.tags = block.tags;
  sleeping_.bytes.resize(static_cast<size_t>(rows * UnitRowBytes(geometry) * geometry.num_layers));
  const Status read = memory_->Read(block.unit_row, rows, sleeping_.bytes.data());
  if (!read.ok()) {
    spdlog::warn("a block is dropped instead of put to sleep: {}", read.message());
    return;
  }
  store_->Put(sleeping_);
}

bool MemoryBacking::asleep() const {
  if (store_ == nullptr) return false;
  const BlockStoreStats stats = store_->Stats();
  return stats.host_blocks + stats.disk_blocks > 0;
}

Status MemoryBacking::Write(uint32_t row, int rows, const SleepingBlock& block) {
  const KvGeometry& geometry = memory_->geometry();
  const auto bytes = static_cast<size_t>(rows * UnitRowBytes(geometry) * geometry.num_layers);
  if (block.bytes.size() != bytes) return Internal("a sleeping block has not the size of its format");
  return memory_->Write(row, rows, block.bytes.data());
}

}  // namespace triaxial
