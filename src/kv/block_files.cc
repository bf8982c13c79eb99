#include "kv/block_files.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cinttypes>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <string_view>
#include <system_error>
#include <utility>

#include "base/check.h"
#include "base/log.h"
#include "base/reserve.h"

namespace triaxial {
namespace {

constexpr int64_t kMaxFileBytes = int64_t{64} << 20;
constexpr int64_t kHeaderBytes = kFileHeaderBytes;
constexpr int kFilesAtLeast = 10;  // of a full folder: what goes at once is a tenth of it
constexpr std::string_view kSuffix = ".kv";
constexpr size_t kNumberDigits = 16;
constexpr uint64_t kMaxNumber = uint64_t{1} << 62;

std::string NameOf(uint64_t number) {
  char name[kNumberDigits + kSuffix.size() + 1];
  std::snprintf(name, sizeof(name), "%016" PRIx64 "%s", number, kSuffix.data());
  return name;
}

std::optional<uint64_t> NumberOf(std::string_view name) {
  if (name.size() != kNumberDigits + kSuffix.size() || !name.ends_with(kSuffix)) return std::nullopt;
  uint64_t number = 0;
  for (const char c : name.substr(0, kNumberDigits)) {
    const int digit = c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : -1;
    if (digit < 0) return std::nullopt;
    number = number << 4 | static_cast<uint64_t>(digit);
  }
  if (number == 0 || number > kMaxNumber) return std::nullopt;
  return number;
}

// All of them, or false.
bool ReadAt(int fd, int64_t offset, std::span<uint8_t> bytes) {
  while (!bytes.empty()) {
    const ssize_t n = pread(fd, bytes.data(), bytes.size(), offset);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return false;
    bytes = bytes.subspan(static_cast<size_t>(n));
    offset += n;
  }
  return true;
}

bool WriteAt(int fd, int64_t offset, std::span<const uint8_t> bytes) {
  while (!bytes.empty()) {
    const ssize_t n = pwrite(fd, bytes.data(), bytes.size(), offset);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return false;
    bytes = bytes.subspan(static_cast<size_t>(n));
    offset += n;
  }
  return true;
}

Status MakeFolder(const std::string& dir) {
  std::filesystem::path path(dir);
  if (!path.has_filename()) path = path.parent_path();  // it ends in a slash
  std::error_code error;
  if (path.has_parent_path()) std::filesystem::create_directories(path.parent_path(), error);
  if (error) return Internal("cannot make the folder of " + dir + ": " + error.message());
  // What people said will lie in it: for the server's user alone.
  if (mkdir(path.c_str(), 0700) != 0) {
    const int reason = errno;
    if (!std::filesystem::is_directory(path, error)) {
      return Internal("cannot make the folder " + dir + " for blocks at rest: " + std::strerror(reason));
    }
  }
  return OkStatus();
}

}  // namespace

BlockFiles::BlockFiles(std::string dir, int64_t max_bytes, const Sha256Digest& fingerprint)
    : dir_(std::move(dir)),
      max_bytes_(max_bytes),
      file_bytes_(std::min(kMaxFileBytes, max_bytes / kFilesAtLeast)),
      fingerprint_(fingerprint) {}

Result<std::unique_ptr<BlockFiles>> BlockFiles::Open(const std::string& dir, int64_t max_bytes,
                                                     const Sha256Digest& fingerprint) {
  std::unique_ptr<BlockFiles> files(new BlockFiles(dir, max_bytes, fingerprint));
  RETURN_IF_ERROR(MakeFolder(dir));
  files->folder_ = Fd(open(dir.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC));
  if (!files->folder_.ok()) {
    return Internal("cannot open the folder " + dir + " for blocks at rest: " + std::strerror(errno));
  }
  RETURN_IF_ERROR(files->Lock());
  RETURN_IF_ERROR(files->ReadFolder());
  return files;
}

Status BlockFiles::Lock() {
  Fd lock(openat(folder_.get(), "lock", O_RDWR | O_CREAT | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC, 0600));
  if (!lock.ok() || flock(lock.get(), LOCK_EX | LOCK_NB) != 0) {
    if (lock.ok() && errno == EWOULDBLOCK) {
      return Unavailable("the folder " + dir_ +
                         " holds the blocks of another server that is running; give each its own");
    }
    Failed("cannot lock");
    return OkStatus();
  }
  lock_ = std::move(lock);
  return OkStatus();
}

Status BlockFiles::ReadFolder() {
  std::vector<uint64_t> numbers;
  std::error_code error;
  std::filesystem::directory_iterator entry(dir_, error);
  for (; !error && entry != std::filesystem::directory_iterator(); entry.increment(error)) {
    const std::optional<uint64_t> number = NumberOf(entry->path().filename().string());
    if (number.has_value()) numbers.push_back(*number);
  }
  if (error) return Internal("cannot read the folder " + dir_ + ": " + error.message());
  std::sort(numbers.begin(), numbers.end());  // of two records of a key, the later one counts
  for (const uint64_t number : numbers) ReadFile(number);
  if (!numbers.empty()) next_number_ = numbers.back() + 1;
  if (corrupt_ > 0 || foreign_ > 0) {
    spdlog::warn(
        "{}: {} files are damaged, in whole or from some block on; {} are of another model or version and "
        "left "
        "alone",
        dir_, corrupt_, foreign_);
  }

  std::vector<BlockKey> gone;
  for (auto file = files_.begin(); file != files_.end();) {
    const auto next = std::next(file);
    if (file->second.alive == 0) Remove(file, &gone);
    file = next;
  }
  MakeRoom(0, &gone);
  return OkStatus();
}

void BlockFiles::ReadFile(uint64_t number) {
  int64_t size = 0;
  const Fd fd = OpenFile(number, &size);
  std::array<uint8_t, kFileHeaderBytes> header;
  const auto bytes = std::span(header).first(static_cast<size_t>(std::min(size, kHeaderBytes)));
  if (!fd.ok() || !ReadAt(fd.get(), 0, bytes)) {
    ++corrupt_;
    return;
  }
  switch (ReadFileHeader(bytes, fingerprint_, number)) {
    case FileKind::kOurs:
      ReadRecords(number, fd.get(), size);
      return;
    case FileKind::kForeign:
      ++foreign_;
      return;
    case FileKind::kCorrupt:
      ++corrupt_;
      return;
  }
}

void BlockFiles::ReadRecords(uint64_t number, int fd, int64_t size) {
  File& file = files_[number];
  file.bytes = size;
  bytes_ += size;
  Use(number);
  for (int64_t offset = kHeaderBytes; offset < size;) {
    std::array<uint8_t, kRecordHeaderBytes> bytes;
    std::optional<RecordHeader> header;
    if (ReadAt(fd, offset, bytes)) header = ReadRecordHeader(bytes);
    const int64_t record_bytes =
        header.has_value() ? static_cast<int64_t>(kRecordHeaderBytes + header->payload_bytes) : 0;
    if (!header.has_value() || record_bytes > size - offset) {
      ++corrupt_;  // a write that was cut short, or damage: where the next record begins is unknown
      return;
    }
    Insert(header->key, {number, offset, record_bytes, header->checksum});
    offset += record_bytes;
  }
}

// None unless it is a regular file; errno says why, ENOENT if another thing has its name.
Fd BlockFiles::OpenFile(uint64_t number, int64_t* size) const {
  Fd fd(openat(folder_.get(), NameOf(number).c_str(), O_RDONLY | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC));
  struct stat info;
  if (!fd.ok() && errno == ELOOP) errno = ENOENT;
  if (!fd.ok() || fstat(fd.get(), &info) != 0) return Fd();
  if (!S_ISREG(info.st_mode)) {
    errno = ENOENT;
    return Fd();
  }
  *size = info.st_size;
  return fd;
}

void BlockFiles::Insert(const BlockKey& key, const Place& place) {
  std::vector<BlockKey>& keys = files_.at(place.file).keys;
  ReserveAtLeast(&keys, keys.size() + 1);
  const auto [entry, is_new] = index_.try_emplace(key, place);
  if (!is_new) {
    --files_.at(entry->second.file).alive;
    entry->second = place;
  }
  ++files_.at(place.file).alive;
  keys.push_back(key);
}

bool BlockFiles::Contains(const Record& record) const {
  const auto entry = index_.find(record.key);
  return entry != index_.end() && entry->second.checksum == record.checksum;
}

void BlockFiles::Touch(const BlockKey& key) {
  const auto entry = index_.find(key);
  if (entry != index_.end()) Use(entry->second.file);
}

void BlockFiles::Erase(const BlockKey& key) {
  const auto entry = index_.find(key);
  if (entry == index_.end()) return;
  const auto file = files_.find(entry->second.file);
  index_.erase(entry);
  --file->second.alive;
  std::vector<BlockKey> none;
  if (file->second.alive == 0 && file->first != writing_) Remove(file, &none);
}

bool BlockFiles::Append(const Record& record, std::vector<BlockKey>* gone) {
  CHECK(!Contains(record.key));
  const int64_t size = static_cast<int64_t>(record.size);
  if (!lock_.ok() || size > max_bytes_ - kHeaderBytes) return false;
  if (writing_ != 0 && files_.at(writing_).bytes + size > file_bytes_) EndFile();
  if (!MakeRoom(size + kHeaderBytes, gone)) return false;  // as if a file had to be begun
  if (writing_ == 0 && !BeginFile()) return false;

  File& file = files_.at(writing_);
  if (!WriteAt(writing_fd_.get(), file.bytes, record.bytes())) {
    Failed("cannot write to");
    // If this fails too, a torn tail remains: it is never read, and nothing is appended behind it.
    if (ftruncate(writing_fd_.get(), file.bytes) != 0) Failed("cannot truncate a file in");
    EndFile();
    return false;
  }
  Insert(record.key, {writing_, file.bytes, size, record.checksum});
  file.bytes += size;
  file.synced = false;
  bytes_ += size;
  Use(writing_);
  return true;
}

std::optional<SleepingBlock> BlockFiles::Read(const BlockKey& key) {
  const Place place = index_.at(key);
  std::optional<SleepingBlock> block;
  if (ReadRecord(place)) block = DecodeRecord(scratch_, key);
  if (block.has_value()) {
    Use(place.file);
    return block;
  }
  ++corrupt_;
  // If it was replaced while it was written, what is written next could not be found either.
  if (place.file == writing_) EndFile();
  Erase(key);
  return std::nullopt;
}

bool BlockFiles::ReadRecord(const Place& place) {
  int64_t size = 0;
  const Fd fd = OpenFile(place.file, &size);
  scratch_.resize(static_cast<size_t>(place.bytes));
  if (fd.ok() && ReadAt(fd.get(), place.offset, scratch_)) return true;
  if (!fd.ok() && errno == ENOENT) {
    std::vector<BlockKey> gone;
    Forget(files_.find(place.file), &gone);
  }
  return false;
}

Status BlockFiles::Sync() {
  const auto error = [this] {
    return Internal("cannot sync the files in " + dir_ + ": " + std::strerror(errno));
  };
  for (auto& [number, file] : files_) {
    if (file.synced) continue;
    int64_t size = 0;
    const Fd fd = OpenFile(number, &size);
    if (!fd.ok() || fsync(fd.get()) != 0) return error();
    file.synced = true;
  }
  if (!folder_synced_ && fsync(folder_.get()) != 0) return error();
  folder_synced_ = true;
  return OkStatus();
}

int64_t BlockFiles::max_record_bytes() const {
  // Any two files that follow each other have more than file_bytes_ of records, or the next would not have
  // been begun.
  const int64_t files = 2 * (max_bytes_ / std::max<int64_t>(file_bytes_, 1)) + 2;
  return std::max<int64_t>(max_bytes_ - files * kHeaderBytes, 0);
}

// For so many bytes to be appended, which must be less than all of the room.
bool BlockFiles::MakeRoom(int64_t bytes, std::vector<BlockKey>* gone) {
  while (bytes_ + bytes > max_bytes_) {
    const auto file = LeastRecentlyUsed();
    if (file != files_.end()) {
      if (!Remove(file, gone)) return false;
    } else {
      EndFile();
    }
  }
  return true;
}

bool BlockFiles::BeginFile() {
  const uint64_t number = next_number_++;
  const std::string name = NameOf(number);
  Fd fd(openat(folder_.get(), name.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_NOFOLLOW | O_CLOEXEC, 0600));
  if (!fd.ok()) {
    Failed("cannot make a file in");
    return false;
  }
  if (!WriteAt(fd.get(), 0, EncodeFileHeader(fingerprint_, number))) {
    Failed("cannot write to");
    unlinkat(folder_.get(), name.c_str(), 0);
    return false;
  }
  files_[number] = {.bytes = kHeaderBytes, .synced = false};
  bytes_ += kHeaderBytes;
  folder_synced_ = false;
  writing_ = number;
  writing_fd_ = std::move(fd);
  return true;
}

void BlockFiles::EndFile() {
  const auto file = files_.find(std::exchange(writing_, 0));
  writing_fd_.Close();
  std::vector<BlockKey> none;
  if (file->second.alive == 0) Remove(file, &none);
}

// Of those that are not being written.
BlockFiles::Files::iterator BlockFiles::LeastRecentlyUsed() {
  auto least = files_.end();
  for (auto file = files_.begin(); file != files_.end(); ++file) {
    if (file->first == writing_) continue;
    if (least == files_.end() || file->second.last_use < least->second.last_use) least = file;
  }
  return least;
}

bool BlockFiles::Remove(Files::iterator file, std::vector<BlockKey>* gone) {
  if (!lock_.ok()) return false;
  if (unlinkat(folder_.get(), NameOf(file->first).c_str(), 0) != 0 && errno != ENOENT && errno != EISDIR) {
    Failed("cannot remove a file from");
    return false;
  }
  Forget(file, gone);
  return true;
}

void BlockFiles::Forget(Files::iterator file, std::vector<BlockKey>* gone) {
  for (const BlockKey& key : file->second.keys) {
    const auto entry = index_.find(key);
    if (entry == index_.end() || entry->second.file != file->first) continue;
    index_.erase(entry);
    gone->push_back(key);
  }
  if (file->first == writing_) {
    writing_ = 0;
    writing_fd_.Close();
  }
  bytes_ -= file->second.bytes;
  files_.erase(file);
}

void BlockFiles::Failed(const std::string& what) {
  if (!warned_) {
    spdlog::warn("{} {}: {}; blocks that find no room in host memory are dropped, without further warnings",
                 what, dir_, std::strerror(errno));
  }
  warned_ = true;
}

}  // namespace triaxial
