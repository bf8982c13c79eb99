// For tests only: throw-away directories.
#ifndef TRIAXIAL_BASE_TEMP_DIR_TESTING_H_
#define TRIAXIAL_BASE_TEMP_DIR_TESTING_H_

#include <gtest/gtest.h>
#include <stdlib.h>

#include <filesystem>
#include <fstream>
#include <string>
#include <string_view>

namespace triaxial {

// A directory that exists as long as the object does.
class TempDir {
 public:
  TempDir() {
    std::string pattern = (std::filesystem::temp_directory_path() / "triaxial-test-XXXXXX").string();
    if (mkdtemp(pattern.data()) == nullptr) ADD_FAILURE() << "cannot create " << pattern;
    path_ = pattern;
  }
  TempDir(const TempDir&) = delete;
  TempDir& operator=(const TempDir&) = delete;
  ~TempDir() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }

  const std::string& path() const { return path_; }
  std::string File(std::string_view name) const { return path_ + "/" + std::string(name); }
  void Write(std::string_view name, std::string_view bytes) const {
    // A new file each time: truncating an old one makes some file systems wait for the disk.
    std::filesystem::remove(File(name));
    std::ofstream out(File(name), std::ios::binary | std::ios::trunc);
    out.write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
    if (!out.flush()) ADD_FAILURE() << "cannot write " << File(name);
  }

 private:
  std::string path_;
};

}  // namespace triaxial

#endif  // TRIAXIAL_BASE_TEMP_DIR_TESTING_H_
