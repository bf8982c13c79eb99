#ifndef TRIAXIAL_BASE_FILE_H_
#define TRIAXIAL_BASE_FILE_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "base/status.h"

namespace triaxial {

// Whole file as bytes. Errors: NotFound, TooLarge (more than max_bytes), Internal (read failed).
Result<std::string> ReadFile(const std::string& path, size_t max_bytes);

// Writes through a temporary file and a rename, so that readers see the old or the new file, never half of
// one.
Status WriteFile(const std::string& path, std::string_view bytes);

// A read-only memory mapping of a regular file; unmapped by the destructor. An empty file maps to an empty
// view.
class MappedFile {
 public:
  static Result<MappedFile> Open(const std::string& path);
  MappedFile() = default;
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;
  ~MappedFile();

  const uint8_t* data() const { return data_; }
  size_t size() const { return size_; }
  const std::string& path() const { return path_; }

 private:
  uint8_t* data_ = nullptr;
  size_t size_ = 0;
  std::string path_;
};

}  // namespace triaxial

#endif  // TRIAXIAL_BASE_FILE_H_
