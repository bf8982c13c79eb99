#include "io/exif.h"

#include <cstddef>

namespace triaxial {
namespace {

constexpr uint32_t kOrientationTag = 0x0112;
constexpr uint32_t kShortType = 3;

// Unsigned integers of a TIFF block; what lies outside reads as 0.
struct Tiff {
  std::string_view bytes;
  bool big_endian = false;

  uint32_t Read(size_t at, size_t size) const {
    if (at > bytes.size() || bytes.size() - at < size) return 0;
    uint32_t value = 0;
    for (size_t i = 0; i < size; ++i) {
      const uint32_t byte = static_cast<uint8_t>(bytes[at + (big_endian ? i : size - 1 - i)]);
      value = value << 8 | byte;
    }
    return value;
  }
};

}  // namespace

int ExifOrientation(std::string_view exif) {
  constexpr std::string_view kPrefix("Exif\0\0", 6);
  if (exif.substr(0, kPrefix.size()) == kPrefix) exif.remove_prefix(kPrefix.size());
  const std::string_view order = exif.substr(0, 2);
  if (order != "II" && order != "MM") return 1;
  const Tiff tiff{exif, order == "MM"};
  if (tiff.Read(2, 2) != 42) return 1;
  const size_t directory = tiff.Read(4, 4);
  const size_t entries = tiff.Read(directory, 2);
  for (size_t i = 0; i < entries; ++i) {
    const size_t entry = directory + 2 + i * 12;
    if (tiff.Read(entry, 2) != kOrientationTag || tiff.Read(entry + 2, 2) != kShortType) continue;
    const uint32_t value = tiff.Read(entry + 8, 2);
    return value >= 1 && value <= 8 ? static_cast<int>(value) : 1;
  }
  return 1;
}

std::vector<uint8_t> TurnUpright(const std::vector<uint8_t>& rgb, int width, int height, int orientation) {
  // The upright pixel (x, y) lies at (u, v) = swapped ? (y, x) : (x, y) of the stored picture, counted from
  // the right if mirror_u, from the bottom if mirror_v.
  const bool swapped = SwapsSides(orientation);
  const bool mirror_u = orientation == 2 || orientation == 3 || orientation == 7 || orientation == 8;
  const bool mirror_v = orientation == 3 || orientation == 4 || orientation == 6 || orientation == 7;
  const int upright_width = swapped ? height : width;
  const int upright_height = swapped ? width : height;
  std::vector<uint8_t> upright(rgb.size());
  uint8_t* out = upright.data();
  for (int y = 0; y < upright_height; ++y) {
    for (int x = 0; x < upright_width; ++x, out += 3) {
      int u = swapped ? y : x;
      int v = swapped ? x : y;
      if (mirror_u) u = width - 1 - u;
      if (mirror_v) v = height - 1 - v;
      const uint8_t* in = &rgb[(static_cast<size_t>(v) * width + u) * 3];
      out[0] = in[0];
      out[1] = in[1];
      out[2] = in[2];
    }
  }
  return upright;
}

}  // namespace triaxial
