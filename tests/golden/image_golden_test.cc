// Pictures and patches against references: Pillow's decoded and resized pixels, the Qwen3-VL processor's
// sizes and pixel values.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <string>
#include <vector>

#include "base/file.h"
#include "base/json.h"
#include "io/image.h"
#include "io/image_processor.h"
#include "sha256.h"

namespace triaxial {
namespace {

const std::string kRoot = "tests/data/images/";

std::string ReadOrDie(const std::string& name) {
  Result<std::string> bytes = ReadFile(kRoot + name, size_t{32} << 20);
  EXPECT_TRUE(bytes.ok()) << bytes.status().message();
  return bytes.ok() ? *bytes : std::string();
}

Json JsonOrDie(const std::string& name) {
  Result<Json> json = ReadJsonFile(kRoot + name);
  EXPECT_TRUE(json.ok()) << json.status().message();
  return json.ok() ? *json : Json();
}

Image DecodeOrDie(const std::string& name) {
  Result<Image> image = DecodeImage(ReadOrDie(name), ImageLimits());
  EXPECT_TRUE(image.ok()) << name << ": " << image.status().message();
  return image.ok() ? *image : Image();
}

std::string Digest(const std::vector<uint8_t>& bytes) { return Sha256(bytes.data(), bytes.size()); }

TEST(Sha256, PublishedVector) {
  const std::string abc = "abc";
  EXPECT_EQ(Digest(std::vector<uint8_t>(abc.begin(), abc.end())),
            "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
}

TEST(ImageGolden, GoodFilesDecodeAsThePillowManifestSays) {
  const Json manifest = JsonOrDie("manifest.json");
  ASSERT_EQ(manifest.size(), 23u);
  int exact = 0;
  for (const Json& entry : manifest) {
    const std::string name = entry["file"];
    SCOPED_TRACE(name);
    const Image image = DecodeOrDie(name);
    ASSERT_EQ(image.width, entry["width"].get<int>());
    ASSERT_EQ(image.height, entry["height"].get<int>());
    ASSERT_EQ(image.rgb.size(), size_t{3} * image.width * image.height);

    // Where the reference has an alpha channel, ours is its composition on white.
    const bool white = entry.contains("rgb_mean_on_white");
    const Json& sha = white ? entry.value("rgb_sha256_on_white", Json()) : entry["rgb_sha256_convert"];
    if (sha.is_string()) {
      EXPECT_EQ(Digest(image.rgb), sha.get<std::string>());
      ++exact;
    }
    const Json& mean = entry[white ? "rgb_mean_on_white" : "rgb_mean_convert"];
    for (int c = 0; c < 3; ++c) {
      double sum = 0;
      for (size_t i = c; i < image.rgb.size(); i += 3) sum += image.rgb[i];
      EXPECT_NEAR(sum / (image.width * image.height), mean[c].get<double>(), 0.02) << "channel " << c;
    }
  }
  EXPECT_GE(exact, 13);
}

TEST(ImageGolden, GoodFilesGetTheReferenceSizeAndTokens) {
  const PreprocessorConfig config;
  const Json manifest = JsonOrDie("manifest.json");
  ASSERT_EQ(manifest.size(), 23u);
  for (const Json& entry : manifest) {
    SCOPED_TRACE(entry["file"].get<std::string>());
    const std::string bytes = ReadOrDie(entry["file"]);
    Result<ImageSize> stored = ReadImageSize(bytes, ImageLimits());
    ASSERT_TRUE(stored.ok()) << stored.status().message();
    Result<ImageSize> size = SmartResize(*stored, config);
    if (entry["smart_resize_hw"].is_null()) {
      ASSERT_FALSE(size.ok());
      EXPECT_EQ(size.status().code(), Code::kInvalidArgument);
      EXPECT_EQ(PreprocessImage(bytes, ImageLimits(), config).status().code(), Code::kInvalidArgument);
      continue;
    }
    ASSERT_TRUE(size.ok()) << size.status().message();
    EXPECT_EQ(size->height, entry["smart_resize_hw"][0].get<int>());
    EXPECT_EQ(size->width, entry["smart_resize_hw"][1].get<int>());
    Result<ImagePatches> patches = PreprocessImage(bytes, ImageLimits(), config);
    ASSERT_TRUE(patches.ok()) << patches.status().message();
    EXPECT_EQ(patches->tokens(config.merge_size), entry["image_tokens"].get<int>());
    Result<ImageSize> grid = GridOf(*stored, config);
    ASSERT_TRUE(grid.ok());
    EXPECT_EQ(grid->width, patches->grid_w);
    EXPECT_EQ(grid->height, patches->grid_h);
  }
}

TEST(ImageGolden, BadFilesAreRefusedAsTheirManifestSays) {
  const Json manifest = JsonOrDie("bad/manifest.json");
  ASSERT_EQ(manifest.size(), 13u);
  for (const Json& entry : manifest) {
    const std::string name = entry["file"];
    SCOPED_TRACE(name);
    const std::string bytes = ReadOrDie(name);
    const Result<Image> image = DecodeImage(bytes, ImageLimits());
    if (name == "bad/png_named.jpg") {
      ASSERT_TRUE(image.ok()) << image.status().message();
      EXPECT_EQ(image->width, 9);
      EXPECT_EQ(image->height, 7);
      continue;
    }
    ASSERT_FALSE(image.ok());
    const bool too_large = name.find("huge") != std::string::npos || name.find("bomb") != std::string::npos;
    EXPECT_EQ(image.status().code(), too_large ? Code::kTooLarge : Code::kInvalidArgument)
        << image.status().message();
    // What the header alone condemns, ReadImageSize condemns with the same words.
    const Result<ImageSize> size = ReadImageSize(bytes, ImageLimits());
    if (!size.ok()) {
      EXPECT_EQ(size.status().message(), image.status().message());
    }
    EXPECT_FALSE(too_large && size.ok());
  }
}

TEST(ImageGolden, PixelsMatchPillow) {
  const Json golden = JsonOrDie("resize_golden.json");
  ASSERT_EQ(golden["decode"].size(), 25u);
  for (const Json& entry : golden["decode"]) {
    SCOPED_TRACE(entry["file"].get<std::string>());
    const Image image = DecodeOrDie(entry["file"]);
    ASSERT_EQ(image.width, entry["width"].get<int>());
    ASSERT_EQ(image.height, entry["height"].get<int>());
    for (const Json& pixel : entry["pixels"]) {
      const size_t x = pixel[0], y = pixel[1];
      for (int c = 0; c < 3; ++c) {
        EXPECT_NEAR(image.rgb[(y * image.width + x) * 3 + c], pixel[2 + c].get<int>(),
                    entry["tolerance"].get<int>())
            << "x " << x << " y " << y << " channel " << c;
      }
    }
  }
}

TEST(ImageGolden, ResizeIsPillowsToTheBit) {
  const Json golden = JsonOrDie("resize_golden.json");
  ASSERT_EQ(golden["resize"].size(), 18u);
  for (const Json& entry : golden["resize"]) {
    const ImageSize size{entry["width"], entry["height"]};
    const Image image = ResizeBicubic(DecodeOrDie(entry["file"]), size);
    ASSERT_EQ(image.width, size.width);
    ASSERT_EQ(image.height, size.height);
    EXPECT_EQ(Digest(image.rgb), entry["sha256"].get<std::string>())
        << entry["file"] << " to " << size.width << " x " << size.height;
  }
}

TEST(ImageGolden, ResizeIsWithinOneLevelOfTheReferenceProcessor) {
  const Json golden = JsonOrDie("torchvision_golden.json");
  int samples = 0, equal = 0, within_one = 0;
  for (const Json& entry : golden["cases"]) {
    const Image image = ResizeBicubic(DecodeOrDie(entry["file"]), {entry["width"], entry["height"]});
    for (size_t i = 0; i < entry["indices"].size(); ++i) {
      const int difference = image.rgb.at(entry["indices"][i].get<size_t>()) - entry["values"][i].get<int>();
      samples += 1;
      equal += difference == 0;
      within_one += std::abs(difference) <= 1;
    }
  }
  ASSERT_EQ(samples, 7000);
  EXPECT_GE(within_one, samples * 0.999);
  EXPECT_GE(equal, samples * 0.99);
}

TEST(ImageGolden, SmartResizeMatchesEveryVector) {
  const Json vectors = JsonOrDie("smart_resize.json");
  ASSERT_EQ(vectors.size(), 81u);
  for (const Json& v : vectors) {
    PreprocessorConfig config;
    config.min_pixels = v["min_pixels"];
    config.max_pixels = v["max_pixels"];
    const Result<ImageSize> size = SmartResize({v["w"], v["h"]}, config);
    ASSERT_EQ(size.ok(), !v["out_hw"].is_null()) << v.dump();
    if (!size.ok()) continue;
    EXPECT_EQ(size->height, v["out_hw"][0].get<int>()) << v.dump();
    EXPECT_EQ(size->width, v["out_hw"][1].get<int>()) << v.dump();
  }
}

TEST(ImageGolden, PixelValuesOfThePocketAgentMatchTheReference) {
  PreprocessorConfig config;
  config.min_pixels = 1024;
  const Json prompts = JsonOrDie("pocket_pixels.json");
  ASSERT_EQ(prompts.size(), 5u);
  for (const Json& prompt : prompts) {
    SCOPED_TRACE(prompt["name"].get<std::string>());
    std::vector<float> values;
    for (size_t i = 0; i < prompt["images"].size(); ++i) {
      Result<ImagePatches> patches = PreprocessImage(ReadOrDie(prompt["images"][i]), ImageLimits(), config);
      ASSERT_TRUE(patches.ok()) << patches.status().message();
      EXPECT_EQ(patches->grid_h, prompt["grid_thw"][i][1].get<int>());
      EXPECT_EQ(patches->grid_w, prompt["grid_thw"][i][2].get<int>());
      const int count = patches->grid_h * patches->grid_w;
      std::vector<float> rows(size_t{1536} * count);
      // In two pieces, as chunked prefill reads them.
      NormalizePatches(*patches, config, 0, 7, rows.data());
      NormalizePatches(*patches, config, 7, count - 7, rows.data() + 7 * 1536);
      values.insert(values.end(), rows.begin(), rows.end());
    }
    ASSERT_EQ(values.size(), prompt["shape"][0].get<size_t>() * 1536);

    double sum = 0, abs_sum = 0;
    std::vector<uint8_t> bytes;
    for (const float v : values) {
      sum += v;
      abs_sum += std::fabs(v);
      bytes.push_back(static_cast<uint8_t>(std::lrint((v + 1.0f) * 127.5f)));
    }
    EXPECT_NEAR(sum, prompt["sum"].get<double>(), 1e-7 * values.size());
    EXPECT_NEAR(abs_sum, prompt["abs_sum"].get<double>(), 1e-7 * values.size());
    EXPECT_EQ(Digest(bytes), prompt["uint8_sha256"].get<std::string>());

    float largest = 0;
    for (int row = 0; row < 4; ++row) {
      const std::string letters = prompt["slice_rows"][row];
      ASSERT_EQ(letters.size(), 1536u);
      for (int i = 0; i < 1536; ++i) {
        const float expected = prompt["slice_values"][letters[i] - 'a'];
        largest = std::max(largest, std::fabs(values[row * 1536 + i] - expected));
      }
    }
    EXPECT_LE(largest, 1e-7f);
  }
}

}  // namespace
}  // namespace triaxial
