#include "kv/block_record.h"

#include <xxhash.h>

#include <algorithm>
#include <new>

#include "base/little_endian.h"
#include "kv/tag.h"

namespace triaxial {
namespace {

// Offsets of fields in a file's header.
constexpr std::array<uint8_t, 8> kFileMagic = {'T', 'R', 'I', 'A', 'X', 'K', 'V', '\n'};
constexpr uint32_t kVersion = 1;
constexpr size_t kFileVersion = 8;
constexpr size_t kFileFingerprint = 16;
constexpr size_t kFileNumber = 48;
constexpr size_t kFileChecksum = 56;
static_assert(kFileChecksum + 16 == kFileHeaderBytes);

// And in a record's.
constexpr std::array<uint8_t, 8> kRecordMagic = {'K', 'V', 'B', 'L', 'O', 'C', 'K', '\n'};
constexpr size_t kPayloadBytes = 8;
constexpr size_t kKey = 16;
constexpr size_t kParent = 48;
constexpr size_t kPosition = 80;
constexpr size_t kFormat = 84;
constexpr size_t kContents = 88;
constexpr size_t kTokenTags = kContents + kBlockTokens * 16;
constexpr size_t kPayloadChecksum = kTokenTags + kBlockTokens;
constexpr size_t kHeaderChecksum = kPayloadChecksum + 16;
static_assert(kHeaderChecksum + 16 == kRecordHeaderBytes);
// Formats are stored by these numbers: whoever changes one makes a new version.
static_assert(static_cast<int>(Format::kK2V2) == 0 && static_cast<int>(Format::kK4V2) == 1 &&
              static_cast<int>(Format::kK4V4) == 2 && static_cast<int>(Format::kFp8) == 3 &&
              static_cast<int>(Format::kBf16) == 4 && kFormats == 5);

Checksum ChecksumOf(std::span<const uint8_t> bytes) {
  const XXH128_hash_t hash = XXH3_128bits(bytes.data(), bytes.size());
  return {hash.low64, hash.high64};
}

void Store(const Checksum& checksum, uint8_t* to) {
  StoreLittle(checksum.lo, to);
  StoreLittle(checksum.hi, to + 8);
}

Checksum LoadChecksum(const uint8_t* from) {
  return {LoadLittle<uint64_t>(from), LoadLittle<uint64_t>(from + 8)};
}

BlockKey LoadKey(const uint8_t* from) {
  BlockKey key;
  std::copy_n(from, key.bytes.size(), key.bytes.begin());
  return key;
}

std::array<ContentId, kBlockTokens> LoadContents(const uint8_t* record) {
  std::array<ContentId, kBlockTokens> contents;
  for (size_t i = 0; i < kBlockTokens; ++i) {
    const uint8_t* from = record + kContents + 16 * i;
    contents[i] = {LoadLittle<uint64_t>(from), LoadLittle<uint64_t>(from + 8)};
  }
  return contents;
}

}  // namespace

std::array<uint8_t, kFileHeaderBytes> EncodeFileHeader(const Sha256Digest& fingerprint, uint64_t number) {
  std::array<uint8_t, kFileHeaderBytes> bytes{};
  std::copy(kFileMagic.begin(), kFileMagic.end(), bytes.begin());
  StoreLittle(kVersion, &bytes[kFileVersion]);
  std::copy(fingerprint.begin(), fingerprint.end(), &bytes[kFileFingerprint]);
  StoreLittle(number, &bytes[kFileNumber]);
  Store(ChecksumOf(std::span(bytes).first(kFileChecksum)), &bytes[kFileChecksum]);
  return bytes;
}

FileKind ReadFileHeader(std::span<const uint8_t> bytes, const Sha256Digest& fingerprint, uint64_t number) {
  if (bytes.size() < kFileHeaderBytes || !std::equal(kFileMagic.begin(), kFileMagic.end(), bytes.begin())) {
    return FileKind::kCorrupt;
  }
  // Another version may lay out everything behind this field otherwise.
  if (LoadLittle<uint32_t>(&bytes[kFileVersion]) != kVersion) return FileKind::kForeign;
  if (LoadChecksum(&bytes[kFileChecksum]) != ChecksumOf(bytes.first(kFileChecksum))) {
    return FileKind::kCorrupt;
  }
  if (!std::equal(fingerprint.begin(), fingerprint.end(), &bytes[kFileFingerprint])) {
    return FileKind::kForeign;
  }
  return LoadLittle<uint64_t>(&bytes[kFileNumber]) == number ? FileKind::kOurs : FileKind::kCorrupt;
}

std::optional<Record> EncodeRecord(const SleepingBlock& block) {
  if (block.bytes.size() > kMaxPayloadBytes) return std::nullopt;
  Record record;
  record.key = block.key;
  record.size = kRecordHeaderBytes + block.bytes.size();
  record.data.reset(new (std::nothrow) uint8_t[record.size]);
  if (record.data == nullptr) return std::nullopt;
  uint8_t* to = record.data.get();
  std::copy(kRecordMagic.begin(), kRecordMagic.end(), to);
  StoreLittle(uint64_t{block.bytes.size()}, to + kPayloadBytes);
  std::copy(block.key.bytes.begin(), block.key.bytes.end(), to + kKey);
  std::copy(block.parent.bytes.begin(), block.parent.bytes.end(), to + kParent);
  StoreLittle(static_cast<uint32_t>(block.position), to + kPosition);
  StoreLittle(uint32_t{static_cast<uint8_t>(block.format)}, to + kFormat);
  for (size_t i = 0; i < kBlockTokens; ++i) {
    StoreLittle(block.contents[i].lo, to + kContents + 16 * i);
    StoreLittle(block.contents[i].hi, to + kContents + 16 * i + 8);
  }
  std::copy(block.tags.begin(), block.tags.end(), to + kTokenTags);
  std::copy(block.bytes.begin(), block.bytes.end(), to + kRecordHeaderBytes);
  Store(ChecksumOf(record.bytes().subspan(kRecordHeaderBytes)), to + kPayloadChecksum);
  record.checksum = ChecksumOf(record.bytes().first(kHeaderChecksum));
  Store(record.checksum, to + kHeaderChecksum);
  return record;
}

std::optional<RecordHeader> ReadRecordHeader(std::span<const uint8_t, kRecordHeaderBytes> bytes) {
  const RecordHeader header = {LoadKey(&bytes[kKey]), LoadChecksum(&bytes[kHeaderChecksum]),
                               LoadLittle<uint64_t>(&bytes[kPayloadBytes])};
  if (!std::equal(kRecordMagic.begin(), kRecordMagic.end(), bytes.begin()) ||
      header.checksum != ChecksumOf(bytes.first(kHeaderChecksum)) ||
      header.payload_bytes > kMaxPayloadBytes) {
    return std::nullopt;
  }
  const auto tags = bytes.subspan<kTokenTags, kBlockTokens>();
  if (static_cast<int32_t>(LoadLittle<uint32_t>(&bytes[kPosition])) < 0 ||
      LoadLittle<uint32_t>(&bytes[kFormat]) >= kFormats ||
      std::any_of(tags.begin(), tags.end(), [](uint8_t tag) { return tag >= kTags; })) {
    return std::nullopt;
  }
  if (ChildKey(LoadKey(&bytes[kParent]), LoadContents(bytes.data())) != header.key) return std::nullopt;
  return header;
}

std::optional<SleepingBlock> DecodeRecord(std::span<const uint8_t> bytes, const BlockKey& key) {
  if (bytes.size() < kRecordHeaderBytes) return std::nullopt;
  const std::optional<RecordHeader> header = ReadRecordHeader(bytes.first<kRecordHeaderBytes>());
  const std::span<const uint8_t> payload = bytes.subspan(kRecordHeaderBytes);
  if (!header.has_value() || header->key != key || header->payload_bytes != payload.size() ||
      LoadChecksum(&bytes[kPayloadChecksum]) != ChecksumOf(payload)) {
    return std::nullopt;
  }
  SleepingBlock block;
  block.key = key;
  block.parent = LoadKey(&bytes[kParent]);
  block.position = static_cast<int32_t>(LoadLittle<uint32_t>(&bytes[kPosition]));
  block.format = static_cast<Format>(LoadLittle<uint32_t>(&bytes[kFormat]));
  block.contents = LoadContents(bytes.data());
  std::copy_n(&bytes[kTokenTags], kBlockTokens, block.tags.begin());
  block.bytes.assign(payload.begin(), payload.end());
  return block;
}

}  // namespace triaxial
