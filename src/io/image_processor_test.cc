#include "io/image_processor.h"

#include <gtest/gtest.h>

#include <vector>

#include "base/file.h"
#include "base/sha256.h"

namespace triaxial {
namespace {

PreprocessorConfig SmallConfig() {
  PreprocessorConfig config;
  config.min_pixels = 1;
  return config;
}

TEST(SmartResize, RoundsHalfToEven) {
  const Result<ImageSize> size = SmartResize({1280, 720}, PreprocessorConfig());  // 720 = 22.5 * 32
  ASSERT_TRUE(size.ok());
  EXPECT_EQ(size->width, 1280);
  EXPECT_EQ(size->height, 704);
}

TEST(SmartResize, RefusesSliversAndEmptyPictures) {
  EXPECT_TRUE(SmartResize({6400, 32}, PreprocessorConfig()).ok());  // 200 to 1
  for (const ImageSize size : {ImageSize{6401, 32}, ImageSize{1, 201}, ImageSize{0, 5}, ImageSize{5, 0}}) {
    EXPECT_EQ(SmartResize(size, PreprocessorConfig()).status().code(), Code::kInvalidArgument)
        << size.width << " x " << size.height;
  }
}

TEST(ResizeBicubic, KeepsAFlatColour) {
  const Image flat{5, 4, std::vector<uint8_t>(60, 77)};
  for (const ImageSize size : {ImageSize{5, 4}, ImageSize{64, 96}, ImageSize{1, 1}, ImageSize{3, 40}}) {
    const Image out = ResizeBicubic(flat, size);
    EXPECT_EQ(out.rgb, std::vector<uint8_t>(size_t{3} * size.width * size.height, 77));
  }
}

TEST(PreprocessImage, PatchesLieInMergeBlockOrder) {
  Result<std::string> bytes = ReadFile("tests/data/images/pocket/standard-00-00.png", 1 << 20);
  ASSERT_TRUE(bytes.ok()) << bytes.status().message();
  const Result<Image> image = DecodeImage(*bytes, ImageLimits());
  ASSERT_TRUE(image.ok());
  ASSERT_EQ(image->width, 320);
  ASSERT_EQ(image->height, 192);
  const Result<ImagePatches> patches = PreprocessImage(*bytes, ImageLimits(), SmallConfig());
  ASSERT_TRUE(patches.ok()) << patches.status().message();
  ASSERT_EQ(patches->grid_w, 20);
  ASSERT_EQ(patches->grid_h, 12);
  EXPECT_EQ(patches->tokens(2), 60);
  ASSERT_EQ(patches->samples.size(), image->rgb.size());
  for (int row = 0; row < 12; ++row) {
    for (int column = 0; column < 20; ++column) {
      const int block = row / 2 * 10 + column / 2;
      const int patch = block * 4 + row % 2 * 2 + column % 2;
      for (int i = 0; i < 768; ++i) {
        const int c = i / 256, y = row * 16 + i / 16 % 16, x = column * 16 + i % 16;
        ASSERT_EQ(patches->samples[patch * 768 + i], image->rgb[(y * 320 + x) * 3 + c]);
      }
    }
  }
}

TEST(PreprocessImage, EqualPicturesAndOnlyTheyHaveEqualHashes) {
  std::vector<ImagePatches> all;
  for (const char* name :
       {"pocket/standard-00-00.png", "pocket/standard-01-00.png", "tiny_1x1.png", "tiny_9x7.png"}) {
    Result<std::string> bytes = ReadFile(std::string("tests/data/images/") + name, 1 << 20);
    ASSERT_TRUE(bytes.ok());
    for (int repeat = 0; repeat < 2; ++repeat) {
      Result<ImagePatches> patches = PreprocessImage(*bytes, ImageLimits(), SmallConfig());
      ASSERT_TRUE(patches.ok()) << patches.status().message();
      all.push_back(std::move(*patches));
    }
  }
  for (size_t i = 0; i < all.size(); ++i) {
    for (size_t j = 0; j < all.size(); ++j) {
      const bool same = all[i].hash_lo == all[j].hash_lo && all[i].hash_hi == all[j].hash_hi;
      EXPECT_EQ(same, i / 2 == j / 2) << i << " " << j;
    }
  }
}

// Keys of blocks at rest are made of it, so it must not change unnoticed.
TEST(PreprocessImage, TheHashIsAsDocumented) {
  Result<std::string> bytes = ReadFile("tests/data/images/pocket/standard-00-00.png", 1 << 20);
  ASSERT_TRUE(bytes.ok());
  const Result<ImagePatches> patches = PreprocessImage(*bytes, ImageLimits(), SmallConfig());
  ASSERT_TRUE(patches.ok());
  const std::string head("triaxial image1\0\x0c\0\0\0\x14\0\0\0", 24);  // 12 rows of 20 patches
  std::vector<uint8_t> hashed(head.begin(), head.end());
  hashed.insert(hashed.end(), patches->samples.begin(), patches->samples.end());
  const Sha256Digest digest = Sha256Of(hashed);
  for (int i = 0; i < 8; ++i) {
    EXPECT_EQ(patches->hash_lo >> (8 * i) & 0xff, digest[static_cast<size_t>(i)]);
    EXPECT_EQ(patches->hash_hi >> (8 * i) & 0xff, digest[static_cast<size_t>(8 + i)]);
  }
}

TEST(PreprocessImage, TheSameSamplesInAnotherShapeAreAnotherPicture) {
  PreprocessorConfig config = SmallConfig();
  config.patch_size = 1;
  config.merge_size = 1;
  // Equal samples: one pixel after the other, in a row and in a column.
  const auto png = [](const char* name) {
    return ReadFile(std::string("tests/data/images/made/") + name, 1 << 20);
  };
  const Result<std::string> wide = png("flat_6x2.png"), tall = png("flat_2x6.png");
  ASSERT_TRUE(wide.ok() && tall.ok());
  const Result<ImagePatches> a = PreprocessImage(*wide, ImageLimits(), config);
  const Result<ImagePatches> b = PreprocessImage(*tall, ImageLimits(), config);
  ASSERT_TRUE(a.ok() && b.ok());
  EXPECT_EQ(a->samples, b->samples);
  EXPECT_FALSE(a->hash_lo == b->hash_lo && a->hash_hi == b->hash_hi);
}

TEST(NormalizePatches, AppliesMeanAndDeviationAndRepeatsTheFrame) {
  PreprocessorConfig config;
  config.patch_size = 2;
  config.image_mean = {0.5f, 0.25f, 0.0f};
  config.image_std = {0.5f, 0.25f, 1.0f};
  ImagePatches patches;
  patches.grid_h = patches.grid_w = 2;
  for (int i = 0; i < 48; ++i) patches.samples.push_back(static_cast<uint8_t>(i * 5));
  std::vector<float> out(24);
  NormalizePatches(patches, config, 3, 1, out.data());
  for (int c = 0; c < 3; ++c) {
    for (int frame = 0; frame < 2; ++frame) {
      for (int i = 0; i < 4; ++i) {
        const double sample = patches.samples[36 + c * 4 + i] / 255.0;
        EXPECT_NEAR(out[(c * 2 + frame) * 4 + i], (sample - config.image_mean[c]) / config.image_std[c],
                    1e-6);
      }
    }
  }
}

}  // namespace
}  // namespace triaxial
