#include "apps/bench_screenshot.h"

// clang-format off
#include <cstddef>
#include <cstdio>
#include <jpeglib.h>
// clang-format on

#include <algorithm>
#include <array>
#include <cstdlib>
#include <random>
#include <vector>

namespace triaxial {
namespace {

using Color = std::array<uint8_t, 3>;

class Canvas {
 public:
  Canvas(int width, int height)
      : width_(width),
        height_(height),
        pixels_(static_cast<size_t>(width) * static_cast<size_t>(height) * 3) {}

  void Fill(int x, int y, int w, int h, Color color) {
    const int right = std::min(x + w, width_), bottom = std::min(y + h, height_);
    for (int row = std::max(y, 0); row < bottom; ++row) {
      for (int column = std::max(x, 0); column < right; ++column)
        std::copy(color.begin(), color.end(), &pixels_[Place(column, row)]);
    }
  }
  uint8_t* Row(int y) { return &pixels_[Place(0, y)]; }

 private:
  size_t Place(int x, int y) const {
    return (static_cast<size_t>(y) * static_cast<size_t>(width_) + static_cast<size_t>(x)) * 3;
  }
  int width_, height_;
  std::vector<uint8_t> pixels_;
};

std::string EncodeJpeg(Canvas& canvas, int width, int height) {
  jpeg_compress_struct encoder{};
  jpeg_error_mgr errors{};
  encoder.err = jpeg_std_error(&errors);
  jpeg_create_compress(&encoder);
  unsigned char* data = nullptr;
  unsigned long size = 0;
  jpeg_mem_dest(&encoder, &data, &size);
  encoder.image_width = static_cast<JDIMENSION>(width);
  encoder.image_height = static_cast<JDIMENSION>(height);
  encoder.input_components = 3;
  encoder.in_color_space = JCS_RGB;
  jpeg_set_defaults(&encoder);
  jpeg_set_quality(&encoder, 80, TRUE);
  jpeg_start_compress(&encoder, TRUE);
  for (int y = 0; y < height; ++y) {
    JSAMPROW row = canvas.Row(y);
    jpeg_write_scanlines(&encoder, &row, 1);
  }
  jpeg_finish_compress(&encoder);
  std::string file(reinterpret_cast<const char*>(data), size);
  jpeg_destroy_compress(&encoder);
  std::free(data);
  return file;
}

}  // namespace

std::string DrawScreenshot(int width, int height, uint32_t seed) {
  std::mt19937 random(seed);
  const auto below = [&](int n) {
    return static_cast<int>(random() % static_cast<uint32_t>(std::max(n, 1)));
  };
  const auto color = [&](int low, int high) {
    const auto channel = [&] { return static_cast<uint8_t>(low + below(high - low)); };
    return Color{channel(), channel(), channel()};
  };
  Canvas canvas(width, height);
  canvas.Fill(0, 0, width, height, color(40, 160));
  constexpr int kBar = 32;
  for (int windows = 3 + below(3); windows > 0; --windows) {
    const int w = width / 4 + below(width / 2), h = height / 4 + below(height / 2);
    const int x = below(width - w), y = below(height - h);
    canvas.Fill(x, y, w, kBar, color(60, 120));
    canvas.Fill(x, y + kBar, w, h - kBar, color(225, 255));
    // Lines of words, a word a run of strokes.
    const Color ink = color(0, 90);
    for (int line = y + kBar + 12; line + 12 < y + h; line += 22) {
      for (int at = x + 12; at < x + w - 80 && below(9) > 0; at += 10) {
        for (const int end = at + 10 + below(60); at < end; at += 5)
          canvas.Fill(at, line + below(4), 2, 8, ink);
      }
    }
  }
  canvas.Fill(0, height - kBar, width, kBar, color(20, 60));
  for (int x = 8; x + kBar < width; x += kBar + 8) canvas.Fill(x, height - kBar + 4, 24, 24, color(0, 255));
  return EncodeJpeg(canvas, width, height);
}

}  // namespace triaxial
