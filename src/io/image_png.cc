#include <fmt/format.h>
#include <png.h>

#include <csetjmp>
#include <cstdio>
#include <cstring>

#include "io/exif.h"
#include "io/image_decoder.h"

namespace triaxial {
namespace {

// libpng reports an error by a jump, so functions that call setjmp have only trivial locals, none of which
// changes between the call and the jump.
class PngDecoder : public ImageDecoder {
 public:
  explicit PngDecoder(std::string_view bytes) : rest_(bytes) {}
  ~PngDecoder() override { png_destroy_read_struct(&png_, &info_, nullptr); }

  Result<ImageHeader> ReadHeader() override {
    ImageHeader header;
    if (!Header(&header)) return Malformed();
    return header;
  }

  Status ReadPixels(uint8_t* pixels) override { return Pixels(pixels) ? OkStatus() : Malformed(); }

 private:
  bool Header(ImageHeader* header) {
    png_ = png_create_read_struct(PNG_LIBPNG_VER_STRING, this, OnError, OnWarning);
    if (png_ == nullptr) return false;
    if (setjmp(png_jmpbuf(png_))) return false;
    info_ = png_create_info_struct(png_);
    if (info_ == nullptr) return false;
    png_set_read_fn(png_, this, OnRead);
    // The caller checks width and height against its own limits, with a better message.
    png_set_user_limits(png_, PNG_UINT_31_MAX, PNG_UINT_31_MAX);
    // Of the ancillary chunks only eXIf matters; all others (profiles and texts that inflate) are skipped, so
    // no chunk takes more memory than it has in the file and long ones need not be refused.
    png_set_chunk_malloc_max(png_, 0);
    png_set_keep_unknown_chunks(png_, PNG_HANDLE_CHUNK_NEVER, nullptr, -1);
    png_set_keep_unknown_chunks(png_, PNG_HANDLE_CHUNK_AS_DEFAULT, reinterpret_cast<png_const_bytep>("eXIf"),
                                1);
    png_read_info(png_, info_);

    const int color_type = png_get_color_type(png_, info_);
    const bool alpha =
        (color_type & PNG_COLOR_MASK_ALPHA) != 0 || png_get_valid(png_, info_, PNG_INFO_tRNS) != 0;
    header->width = png_get_image_width(png_, info_);
    header->height = png_get_image_height(png_, info_);
    header->channels = alpha ? 4 : 3;
    png_bytep exif = nullptr;
    png_uint_32 exif_size = 0;
    if (png_get_eXIf_1(png_, info_, &exif_size, &exif) != 0) {
      header->orientation = ExifOrientation({reinterpret_cast<const char*>(exif), exif_size});
    }
    return true;
  }

  bool Pixels(uint8_t* pixels) {
    if (setjmp(png_jmpbuf(png_))) return false;
    png_set_expand(png_);       // palette, 1 to 4 bits of gray, tRNS
    png_set_gray_to_rgb(png_);  // has no effect on colour
    png_set_strip_16(png_);     // the high byte
    const int passes = png_set_interlace_handling(png_);
    png_read_update_info(png_, info_);
    const size_t stride = png_get_rowbytes(png_, info_);
    const png_uint_32 height = png_get_image_height(png_, info_);
    for (int pass = 0; pass < passes; ++pass) {
      for (png_uint_32 y = 0; y < height; ++y) png_read_row(png_, pixels + y * stride, nullptr);
    }
    return true;
  }

  Status Malformed() const {
    return InvalidArgument(fmt::format("The PNG image is malformed ({}); send a valid file.", error_));
  }

  static void OnRead(png_structp png, png_bytep out, size_t count) {
    auto* self = static_cast<PngDecoder*>(png_get_io_ptr(png));
    if (count > self->rest_.size()) png_error(png, "it ends early");
    std::memcpy(out, self->rest_.data(), count);
    self->rest_.remove_prefix(count);
  }

  [[noreturn]] static void OnError(png_structp png, png_const_charp message) {
    auto* self = static_cast<PngDecoder*>(png_get_error_ptr(png));
    std::snprintf(self->error_, sizeof(self->error_), "%s", message);
    png_longjmp(png, 1);
  }

  static void OnWarning(png_structp, png_const_charp) {}

  std::string_view rest_;
  png_structp png_ = nullptr;
  png_infop info_ = nullptr;
  char error_[128] = "libpng does not start";
};

}  // namespace

std::unique_ptr<ImageDecoder> NewPngDecoder(std::string_view bytes) {
  return std::make_unique<PngDecoder>(bytes);
}

}  // namespace triaxial
