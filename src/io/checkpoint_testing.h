// For tests only: safetensors files made byte by byte, in throw-away directories.
#ifndef TRIAXIAL_IO_CHECKPOINT_TESTING_H_
#define TRIAXIAL_IO_CHECKPOINT_TESTING_H_

#include <cstdint>
#include <string>
#include <string_view>

#include "base/temp_dir_testing.h"

namespace triaxial {

inline std::string LittleEndian64(uint64_t value) {
  std::string bytes;
  for (int i = 0; i < 8; ++i) bytes += static_cast<char>(value >> (8 * i));
  return bytes;
}

// A safetensors file of this header and this data, whether they make sense or not.
inline std::string SafetensorsFile(std::string_view header, std::string_view data) {
  return LittleEndian64(header.size()) + std::string(header) + std::string(data);
}

}  // namespace triaxial

#endif  // TRIAXIAL_IO_CHECKPOINT_TESTING_H_
