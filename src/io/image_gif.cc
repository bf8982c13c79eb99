#include <fmt/format.h>
#include <gif_lib.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "io/image_decoder.h"

namespace triaxial {
namespace {

// The first frame, on a canvas that holds both the screen and the frame; what the frame leaves open is
// transparent.
class GifDecoder : public ImageDecoder {
 public:
  explicit GifDecoder(std::string_view bytes) : rest_(bytes) {}
  ~GifDecoder() override { DGifCloseFile(gif_, nullptr); }

  Result<ImageHeader> ReadHeader() override {
    int error = 0;
    gif_ = DGifOpen(this, OnRead, &error);
    if (gif_ == nullptr) return Malformed(error);
    RETURN_IF_ERROR(SeekFirstFrame());
    const GifImageDesc& frame = gif_->Image;
    if (frame.Width <= 0 || frame.Height <= 0) {
      return InvalidArgument("The first frame of the GIF image has no pixels; send a file that has some.");
    }
    ImageHeader header;
    header.width = std::max<int64_t>(gif_->SWidth, int64_t{frame.Left} + frame.Width);
    header.height = std::max<int64_t>(gif_->SHeight, int64_t{frame.Top} + frame.Height);
    header.channels = 4;
    header_ = header;
    return header;
  }

  Status ReadPixels(uint8_t* pixels) override {
    const GifImageDesc& frame = gif_->Image;
    const std::vector<Rgba> colors = Palette();
    std::vector<GifPixelType> indices(frame.Width);
    const auto read_row = [&](int y) {
      if (DGifGetLine(gif_, indices.data(), frame.Width) != GIF_OK) return false;
      uint8_t* out = pixels + ((int64_t{frame.Top} + y) * header_.width + frame.Left) * 4;
      for (int x = 0; x < frame.Width; ++x, out += 4) std::memcpy(out, &colors[indices[x]], 4);
      return true;
    };
    struct Pass {
      int first, step;
    };
    constexpr Pass kInterlaced[] = {{0, 8}, {4, 8}, {2, 4}, {1, 2}};
    constexpr Pass kPlain[] = {{0, 1}};
    const Pass* passes = frame.Interlace ? kInterlaced : kPlain;
    const int num_passes = frame.Interlace ? 4 : 1;
    for (int pass = 0; pass < num_passes; ++pass) {
      for (int y = passes[pass].first; y < frame.Height; y += passes[pass].step) {
        if (!read_row(y)) return Malformed(gif_->Error);
      }
    }
    return OkStatus();
  }

 private:
  struct Rgba {
    uint8_t r, g, b, a;
  };
  static_assert(sizeof(Rgba) == 4);

  // Stops after the descriptor of the first frame, before its pixels.
  Status SeekFirstFrame() {
    for (;;) {
      GifRecordType type;
      if (DGifGetRecordType(gif_, &type) != GIF_OK) return Malformed(gif_->Error);
      if (type == IMAGE_DESC_RECORD_TYPE) {
        return DGifGetImageDesc(gif_) == GIF_OK ? OkStatus() : Malformed(gif_->Error);
      }
      if (type == TERMINATE_RECORD_TYPE) {
        return InvalidArgument("The GIF image has no frame; send a file that has one.");
      }
      if (type == EXTENSION_RECORD_TYPE) RETURN_IF_ERROR(ReadExtension());
    }
  }

  Status ReadExtension() {
    int code = 0;
    GifByteType* block = nullptr;  // a length byte and that many bytes; belongs to gif_
    if (DGifGetExtension(gif_, &code, &block) != GIF_OK) return Malformed(gif_->Error);
    while (block != nullptr) {
      GraphicsControlBlock control;
      if (code == GRAPHICS_EXT_FUNC_CODE && DGifExtensionToGCB(block[0], block + 1, &control) == GIF_OK) {
        transparent_ = control.TransparentColor;
      }
      if (DGifGetExtensionNext(gif_, &block) != GIF_OK) return Malformed(gif_->Error);
    }
    return OkStatus();
  }

  // All 256 indices: those past the file's palette are black; without any palette they are shades of gray.
  std::vector<Rgba> Palette() const {
    std::vector<Rgba> colors(256, Rgba{0, 0, 0, 255});
    const ColorMapObject* map = gif_->Image.ColorMap != nullptr ? gif_->Image.ColorMap : gif_->SColorMap;
    for (int i = 0; i < 256; ++i) {
      if (map == nullptr) {
        const auto gray = static_cast<uint8_t>(i);
        colors[i] = {gray, gray, gray, 255};
      } else if (i < map->ColorCount) {
        const GifColorType& color = map->Colors[i];
        colors[i] = {color.Red, color.Green, color.Blue, 255};
      }
    }
    if (transparent_ >= 0 && transparent_ < 256) colors[transparent_].a = 0;
    return colors;
  }

  static Status Malformed(int error) {
    const char* why = GifErrorString(error);
    return InvalidArgument(fmt::format("The GIF image is malformed or ends early ({}); send a valid file.",
                                       why != nullptr ? why : "unknown error"));
  }

  static int OnRead(GifFileType* gif, GifByteType* out, int count) {
    auto* self = static_cast<GifDecoder*>(gif->UserData);
    const size_t given = std::min(static_cast<size_t>(count), self->rest_.size());
    std::memcpy(out, self->rest_.data(), given);
    self->rest_.remove_prefix(given);
    return static_cast<int>(given);
  }

  std::string_view rest_;
  GifFileType* gif_ = nullptr;
  int transparent_ = NO_TRANSPARENT_COLOR;
  ImageHeader header_;
};

}  // namespace

std::unique_ptr<ImageDecoder> NewGifDecoder(std::string_view bytes) {
  return std::make_unique<GifDecoder>(bytes);
}

}  // namespace triaxial
