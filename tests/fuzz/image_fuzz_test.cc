// Some thousands of damaged pictures, the same ones in every run: none may crash, hang, leak (the sanitizers
// tell) or take more memory than its limits allow, and each ends in a picture or in a sentence.
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <zlib.h>

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <random>
#include <string>
#include <vector>

#include "base/file.h"
#include "io/image.h"
#include "io/image_processor.h"

namespace triaxial {
namespace {

constexpr size_t kMaxSeedBytes = 40000;
constexpr int kMutationsPerSeed = 200;

// Sorted, so that runs are equal.
std::vector<std::string> SeedPaths() {
  std::vector<std::string> paths;
  for (const char* directory : {"tests/data/images", "tests/data/images/made"}) {
    for (const auto& entry : std::filesystem::directory_iterator(directory)) {
      const std::string extension = entry.path().extension();
      if (extension != ".png" && extension != ".jpg" && extension != ".webp" && extension != ".gif") continue;
      if (entry.file_size() <= kMaxSeedBytes) paths.push_back(entry.path());
    }
  }
  std::sort(paths.begin(), paths.end());
  return paths;
}

uint32_t BigEndian(const std::string& bytes, size_t at) {
  uint32_t value = 0;
  for (size_t i = 0; i < 4; ++i) value = value << 8 | static_cast<uint8_t>(bytes[at + i]);
  return value;
}

// Makes every chunk's checksum right, so that damage gets past it.
void RepairPngChecksums(std::string* png) {
  for (size_t at = 8; at + 12 <= png->size();) {
    const size_t length = BigEndian(*png, at);
    if (length > png->size() - at - 12) return;
    const auto* chunk = reinterpret_cast<const Bytef*>(png->data() + at + 4);
    const uLong checksum = crc32(0, chunk, static_cast<uInt>(length + 4));
    for (int i = 0; i < 4; ++i) (*png)[at + 8 + length + i] = static_cast<char>(checksum >> (24 - 8 * i));
    at += length + 12;
  }
}

class Mutator {
 public:
  std::string Mutate(const std::string& seed, const std::string& other) {
    std::string bytes = seed;
    const size_t edits = 1 + Below(4);
    for (size_t i = 0; i < edits && !bytes.empty(); ++i) EditOnce(other, &bytes);
    if (Below(4) != 0 && bytes.starts_with("\x89PNG")) RepairPngChecksums(&bytes);
    return bytes;
  }

  size_t Below(size_t n) { return random_() % n; }

 private:
  void EditOnce(const std::string& other, std::string* bytes) {
    static constexpr unsigned char kExtremes[] = {0x00, 0x01, 0x7f, 0x80, 0xfe, 0xff};
    // Half of the places are in the header, where every byte means something.
    const size_t reach = Below(2) == 0 ? std::min<size_t>(bytes->size(), 64) : bytes->size();
    const size_t at = Below(reach);
    const size_t length = std::min(1 + Below(64), bytes->size() - at);
    switch (Below(7)) {
      case 0:
        (*bytes)[at] = static_cast<char>((*bytes)[at] ^ (1 << Below(8)));
        break;
      case 1:
        (*bytes)[at] = static_cast<char>(Below(256));
        break;
      case 2:
        for (size_t i = at; i < at + std::min<size_t>(length, 4); ++i) {
          (*bytes)[i] = static_cast<char>(kExtremes[Below(std::size(kExtremes))]);
        }
        break;
      case 3:
        bytes->resize(at);
        break;
      case 4:
        bytes->erase(at, length);
        break;
      case 5:
        bytes->insert(at, *bytes, at, length);
        break;
      default:
        bytes->replace(at, length, other, Below(other.size()), length);
        break;
    }
  }

  std::mt19937 random_{20240229};
};

int64_t PeakMemoryBytes() {
  rusage usage = {};
  getrusage(RUSAGE_SELF, &usage);
  return int64_t{usage.ru_maxrss} * 1024;
}

TEST(ImageFuzz, DamagedPicturesEndInAPictureOrASentence) {
  std::vector<std::string> seeds;
  for (const std::string& path : SeedPaths()) {
    Result<std::string> bytes = ReadFile(path, kMaxSeedBytes);
    ASSERT_TRUE(bytes.ok()) << bytes.status().message();
    seeds.push_back(*bytes);
  }
  ASSERT_GE(seeds.size(), 30u);

  ImageLimits limits;
  limits.max_pixels = 1 << 20;
  PreprocessorConfig config;
  config.max_pixels = 1 << 17;
  [[maybe_unused]] const int64_t memory_before = PeakMemoryBytes();
  Mutator mutator;
  int decoded = 0, refused = 0;
  for (size_t s = 0; s < seeds.size(); ++s) {
    for (int i = 0; i < kMutationsPerSeed; ++i) {
      const std::string bytes = mutator.Mutate(seeds[s], seeds[mutator.Below(seeds.size())]);
      SCOPED_TRACE("seed " + std::to_string(s) + " mutation " + std::to_string(i));
      const Result<ImageSize> size = ReadImageSize(bytes, limits);
      const Result<Image> image = DecodeImage(bytes, limits);
      if (image.ok()) {
        ++decoded;
        ASSERT_TRUE(size.ok());
        EXPECT_EQ(size->width, image->width);
        EXPECT_EQ(size->height, image->height);
        EXPECT_LE(int64_t{image->width} * image->height, limits.max_pixels);
        EXPECT_EQ(image->rgb.size(), size_t{3} * image->width * image->height);
        if (i % 8 == 0) {
          const Result<ImagePatches> patches = PreprocessImage(bytes, limits, config);
          EXPECT_EQ(patches.ok(), SmartResize(*size, config).ok());
        }
      } else {
        ++refused;
        EXPECT_TRUE(image.status().code() == Code::kInvalidArgument ||
                    image.status().code() == Code::kTooLarge)
            << image.status().message();
        if (!size.ok()) {
          EXPECT_EQ(size.status().message(), image.status().message());
        }
      }
    }
  }
  // Both ends are reached, or the mutations are too mild or too wild to test anything.
  EXPECT_GT(decoded, refused / 20);
  EXPECT_GT(refused, decoded / 20);
  RecordProperty("decoded", decoded);
  RecordProperty("refused", refused);
#ifndef __SANITIZE_ADDRESS__  // whose quarantine counts as memory
  EXPECT_LT(PeakMemoryBytes() - memory_before, int64_t{64} << 20);
#endif
}

}  // namespace
}  // namespace triaxial
