// The bytes of blocks at rest: the header of a file, and records. docs/kv-format.md, "Blocks at rest",
// defines every one of them. Nothing here trusts what it reads.
#ifndef TRIAXIAL_KV_BLOCK_RECORD_H_
#define TRIAXIAL_KV_BLOCK_RECORD_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string_view>

#include "base/sha256.h"
#include "kv/block_store.h"

namespace triaxial {

inline constexpr size_t kFileHeaderBytes = 72;
inline constexpr size_t kRecordHeaderBytes = 1208;
inline constexpr uint64_t kMaxPayloadBytes = uint64_t{1} << 30;  // of one block

// XXH3-128, against accidents.
struct Checksum {
  uint64_t lo = 0;
  uint64_t hi = 0;
  bool operator==(const Checksum&) const = default;
};

// `number`: which file of its folder it is; also in its name.
std::array<uint8_t, kFileHeaderBytes> EncodeFileHeader(const Sha256Digest& fingerprint, uint64_t number);
enum class FileKind {
  kOurs,
  kForeign,  // of another fingerprint or version
  kCorrupt,  // anything else
};
// `bytes`: the first kFileHeaderBytes of a file, or all of a shorter one.
FileKind ReadFileHeader(std::span<const uint8_t> bytes, const Sha256Digest& fingerprint, uint64_t number);

// A block as it is stored, in memory and in files.
struct Record {
  BlockKey key;
  Checksum checksum;  // of its header, which holds the payload's: equal for equal records only
  std::unique_ptr<uint8_t[]> data;
  size_t size = 0;

  std::span<const uint8_t> bytes() const { return {data.get(), size}; }
};
// Copies the block. Nothing if there is no memory for it, or if it has more than kMaxPayloadBytes.
std::optional<Record> EncodeRecord(const SleepingBlock& block);

struct RecordHeader {
  BlockKey key;
  Checksum checksum;  // of the header
  uint64_t payload_bytes = 0;
};
// Of the first kRecordHeaderBytes of a record: nothing unless its checksum holds, all fields are within their
// ranges and the key is that of the contents behind the parent. The payload is not looked at.
std::optional<RecordHeader> ReadRecordHeader(std::span<const uint8_t, kRecordHeaderBytes> bytes);
// The whole block: nothing unless, besides, its key is `key` and the payload is complete and holds.
std::optional<SleepingBlock> DecodeRecord(std::span<const uint8_t> bytes, const BlockKey& key);

}  // namespace triaxial

#endif  // TRIAXIAL_KV_BLOCK_RECORD_H_
