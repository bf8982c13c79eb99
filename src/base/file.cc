#include "base/file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <utility>

#include "base/fd.h"

namespace triaxial {
namespace {

Status OpenError(const std::string& path) {
  const int error = errno;
  const std::string message = "cannot open " + path + ": " + std::strerror(error);
  return error == ENOENT || error == ENOTDIR ? NotFound(message) : Internal(message);
}

// Size of an open regular file.
Result<size_t> RegularFileSize(int fd, const std::string& path) {
  struct stat info;
  if (fstat(fd, &info) != 0) return Internal("cannot stat " + path + ": " + std::strerror(errno));
  if (!S_ISREG(info.st_mode)) return InvalidArgument(path + " is not a regular file");
  return static_cast<size_t>(info.st_size);
}

}  // namespace

Result<std::string> ReadFile(const std::string& path, size_t max_bytes) {
  const Fd fd(open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (fd.get() < 0) return OpenError(path);
  struct stat info;
  if (fstat(fd.get(), &info) == 0 && S_ISDIR(info.st_mode)) return InvalidArgument(path + " is a directory");
  std::string bytes;
  // Read to the end instead of trusting the size: pipes have none, and files may grow.
  char buffer[65536];
  while (true) {
    const ssize_t n = read(fd.get(), buffer, sizeof(buffer));
    if (n < 0) {
      if (errno == EINTR) continue;
      return Internal("cannot read " + path + ": " + std::strerror(errno));
    }
    if (n == 0) return bytes;
    if (bytes.size() + static_cast<size_t>(n) > max_bytes) {
      return TooLarge(path + " is larger than the limit of " + std::to_string(max_bytes) + " bytes");
    }
    bytes.append(buffer, static_cast<size_t>(n));
  }
}

Status WriteFile(const std::string& path, std::string_view bytes) {
  const std::string temporary = path + ".tmp" + std::to_string(getpid());
  {
    const Fd fd(open(temporary.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644));
    if (fd.get() < 0) {
      const int error = errno;
      const Code code = error == ENOENT || error == ENOTDIR ? Code::kNotFound : Code::kInternal;
      return Status(code, "cannot write " + path + ": " + std::strerror(error));
    }
    while (!bytes.empty()) {
      const ssize_t n = write(fd.get(), bytes.data(), bytes.size());
      if (n < 0) {
        if (errno == EINTR) continue;
        const Status status = Internal("cannot write " + path + ": " + std::strerror(errno));
        unlink(temporary.c_str());
        return status;
      }
      bytes.remove_prefix(static_cast<size_t>(n));
    }
  }
  if (std::rename(temporary.c_str(), path.c_str()) != 0) {
    const Status status =
        Internal("cannot rename " + temporary + " to " + path + ": " + std::strerror(errno));
    unlink(temporary.c_str());
    return status;
  }
  return OkStatus();
}

Result<MappedFile> MappedFile::Open(const std::string& path) {
  const Fd fd(open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (fd.get() < 0) return OpenError(path);
  ASSIGN_OR_RETURN(const size_t size, RegularFileSize(fd.get(), path));
  MappedFile file;
  file.path_ = path;
  if (size == 0) return file;
  void* data = mmap(nullptr, size, PROT_READ, MAP_PRIVATE, fd.get(), 0);
  if (data == MAP_FAILED) return Internal("cannot map " + path + ": " + std::strerror(errno));
  file.data_ = static_cast<uint8_t*>(data);
  file.size_ = size;
  return file;
}

MappedFile::MappedFile(MappedFile&& other) noexcept { *this = std::move(other); }

MappedFile& MappedFile::operator=(MappedFile&& other) noexcept {
  if (this != &other) {
    if (data_ != nullptr) munmap(data_, size_);
    data_ = std::exchange(other.data_, nullptr);
    size_ = std::exchange(other.size_, 0);
    path_ = std::move(other.path_);
  }
  return *this;
}

MappedFile::~MappedFile() {
  if (data_ != nullptr) munmap(data_, size_);
}

}  // namespace triaxial
