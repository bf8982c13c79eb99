#include "io/image.h"

#include <gtest/gtest.h>

#include <string>

#include "base/file.h"
#include "io/exif.h"

namespace triaxial {
namespace {

std::string ReadOrDie(const std::string& name) {
  Result<std::string> bytes = ReadFile("tests/data/images/" + name, size_t{32} << 20);
  EXPECT_TRUE(bytes.ok()) << bytes.status().message();
  return bytes.ok() ? *bytes : std::string();
}

std::string LittleEndianExif(int tag, int value) {
  std::string block("Exif\0\0II*\0\x08\0\0\0\x01\0", 16);
  block += {static_cast<char>(tag & 255), static_cast<char>(tag >> 8), 3, 0, 1, 0, 0, 0};
  block += {static_cast<char>(value), 0, 0, 0};
  return block;
}

TEST(Exif, ReadsTheOrientationInBothByteOrders) {
  EXPECT_EQ(ExifOrientation(LittleEndianExif(0x0112, 6)), 6);
  EXPECT_EQ(ExifOrientation(LittleEndianExif(0x0112, 6).substr(6)), 6);  // as PNG stores it
  const std::string big("MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x08\0\0", 22);
  EXPECT_EQ(ExifOrientation(big), 8);
}

TEST(Exif, ABlockThatSaysNothingUsefulIsUpright) {
  EXPECT_EQ(ExifOrientation(""), 1);
  EXPECT_EQ(ExifOrientation(LittleEndianExif(0x0112, 0)), 1);
  EXPECT_EQ(ExifOrientation(LittleEndianExif(0x0112, 9)), 1);
  EXPECT_EQ(ExifOrientation(LittleEndianExif(0x0110, 6)), 1);
  const std::string block = LittleEndianExif(0x0112, 6);
  for (size_t size = 0; size < 26; ++size) EXPECT_EQ(ExifOrientation(block.substr(0, size)), 1) << size;
  std::string far = block;
  far[6 + 4] = far[6 + 5] = far[6 + 6] = far[6 + 7] = '\xff';  // the directory lies outside
  EXPECT_EQ(ExifOrientation(far), 1);
}

TEST(Image, TypesAreSniffedFromTheContent) {
  for (const char* name : {"tiny_9x7.png", "photo_progressive.jpg", "photo_lossy.webp", "photo.gif"}) {
    EXPECT_TRUE(DecodeImage(ReadOrDie(name), ImageLimits()).ok()) << name;
  }
  const Result<Image> text = DecodeImage("hello", ImageLimits());
  ASSERT_FALSE(text.ok());
  EXPECT_EQ(text.status().code(), Code::kInvalidArgument);
  EXPECT_EQ(text.status().message(), "The image is of an unknown type; send a PNG, JPEG, WebP or GIF file.");
}

TEST(Image, EveryLimitIsCheckedFromTheHeader) {
  struct Case {
    const char* file;
    int width, height;
  };
  // The headers of these files are intact; their pixels are cut off, so that only the header can speak.
  for (const Case& c : {Case{"ui_palette64.png", 640, 400}, Case{"ui_real_1024x768.jpg", 1024, 768},
                        Case{"photo.gif", 128, 128}}) {
    SCOPED_TRACE(c.file);
    std::string bytes = ReadOrDie(c.file);
    bytes.resize(bytes.size() / 2);
    ImageLimits limits;
    const Result<ImageSize> size = ReadImageSize(bytes, limits);
    ASSERT_TRUE(size.ok()) << size.status().message();
    EXPECT_EQ(size->width, c.width);
    EXPECT_EQ(size->height, c.height);
    EXPECT_EQ(DecodeImage(bytes, limits).status().code(), Code::kInvalidArgument);  // truncated

    limits.max_side = c.width;
    limits.max_pixels = c.width * c.height;
    limits.max_bytes = static_cast<int64_t>(bytes.size());
    EXPECT_TRUE(ReadImageSize(bytes, limits).ok()) << "a limit may be reached";
    ImageLimits one_less = limits;
    one_less.max_side -= 1;
    EXPECT_EQ(DecodeImage(bytes, one_less).status().code(), Code::kTooLarge);
    one_less = limits;
    one_less.max_pixels -= 1;
    EXPECT_EQ(DecodeImage(bytes, one_less).status().code(), Code::kTooLarge);
    one_less = limits;
    one_less.max_bytes -= 1;
    EXPECT_EQ(DecodeImage(bytes, one_less).status().code(), Code::kTooLarge);
  }
}

TEST(Image, SizeFromTheHeaderIsTheSizeOfTheUprightPicture) {
  for (int orientation = 1; orientation <= 8; ++orientation) {
    const std::string bytes = ReadOrDie("made/orientation" + std::to_string(orientation) + ".png");
    const Result<ImageSize> size = ReadImageSize(bytes, ImageLimits());
    ASSERT_TRUE(size.ok()) << size.status().message();
    EXPECT_EQ(size->width, orientation < 5 ? 10 : 6);
    EXPECT_EQ(size->height, orientation < 5 ? 6 : 10);
  }
}

TEST(Image, EveryTruncationOfASmallFileIsRefusedOrComplete) {
  for (const char* name : {"tiny_9x7.png", "palette_trns.png", "exif_orientation6.jpg",
                           "made/orientation8.webp", "made/partial_interlaced.gif"}) {
    const std::string bytes = ReadOrDie(name);
    const Result<Image> whole = DecodeImage(bytes, ImageLimits());
    ASSERT_TRUE(whole.ok()) << whole.status().message();
    for (size_t size = 0; size < bytes.size(); ++size) {
      const Result<Image> image = DecodeImage(std::string_view(bytes).substr(0, size), ImageLimits());
      if (image.ok()) {
        EXPECT_EQ(image->rgb, whole->rgb) << name << " cut to " << size;
      }
    }
    EXPECT_FALSE(DecodeImage(std::string_view(bytes).substr(0, bytes.size() / 2), ImageLimits()).ok())
        << name;
  }
}

}  // namespace
}  // namespace triaxial
