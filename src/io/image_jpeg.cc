#include <fmt/format.h>
#include <jerror.h>
#include <jpeglib.h>

#include <csetjmp>
#include <cstddef>
#include <cstdio>  // jpeglib.h needs FILE

#include "io/exif.h"
#include "io/image_decoder.h"

namespace triaxial {
namespace {

// Each scan of a progressive file costs a pass over all coefficients; encoders write about ten.
constexpr int kMaxScans = 100;

// libjpeg reports an error by a jump, so functions that call setjmp have only trivial locals, none of which
// changes between the call and the jump.
class JpegDecoder : public ImageDecoder {
 public:
  explicit JpegDecoder(std::string_view bytes) : bytes_(bytes) {}
  ~JpegDecoder() override { jpeg_destroy_decompress(&jpeg_); }

  Result<ImageHeader> ReadHeader() override {
    ImageHeader header;
    if (!Header(&header)) return Malformed();
    return header;
  }

  Status ReadPixels(uint8_t* pixels) override { return Pixels(pixels) ? OkStatus() : Malformed(); }

 private:
  bool Header(ImageHeader* header) {
    jpeg_.err = jpeg_std_error(&errors_);
    errors_.error_exit = OnError;
    errors_.emit_message = OnMessage;
    jpeg_.client_data = this;
    if (setjmp(jump_)) return false;
    jpeg_create_decompress(&jpeg_);
    source_.init_source = [](j_decompress_ptr) {};
    source_.fill_input_buffer = OnEndOfInput;
    source_.skip_input_data = OnSkip;
    source_.resync_to_restart = jpeg_resync_to_restart;
    source_.term_source = [](j_decompress_ptr) {};
    source_.next_input_byte = reinterpret_cast<const JOCTET*>(bytes_.data());
    source_.bytes_in_buffer = bytes_.size();
    jpeg_.src = &source_;
    progress_.progress_monitor = OnProgress;
    jpeg_.progress = &progress_;
    jpeg_save_markers(&jpeg_, JPEG_APP0 + 1, 0xffff);
    jpeg_read_header(&jpeg_, TRUE);

    header->width = jpeg_.image_width;
    header->height = jpeg_.image_height;
    for (jpeg_saved_marker_ptr marker = jpeg_.marker_list; marker != nullptr; marker = marker->next) {
      const std::string_view data(reinterpret_cast<const char*>(marker->data), marker->data_length);
      if (data.substr(0, 4) != "Exif") continue;  // APP1 also carries XMP
      header->orientation = ExifOrientation(data);
      break;
    }
    return true;
  }

  bool Pixels(uint8_t* pixels) {
    if (setjmp(jump_)) return false;
    const bool cmyk = jpeg_.jpeg_color_space == JCS_CMYK || jpeg_.jpeg_color_space == JCS_YCCK;
    jpeg_.out_color_space = cmyk ? JCS_CMYK : JCS_RGB;
    jpeg_start_decompress(&jpeg_);
    const size_t stride = static_cast<size_t>(jpeg_.output_width) * 3;
    JSAMPARRAY cmyk_row = nullptr;  // belongs to the decompressor
    if (cmyk) {
      cmyk_row = jpeg_.mem->alloc_sarray(reinterpret_cast<j_common_ptr>(&jpeg_), JPOOL_IMAGE,
                                         jpeg_.output_width * 4, 1);
    }
    while (jpeg_.output_scanline < jpeg_.output_height) {
      JSAMPROW row = pixels + jpeg_.output_scanline * stride;
      jpeg_read_scanlines(&jpeg_, cmyk ? cmyk_row : &row, 1);
      if (cmyk) InvertedCmykToRgb(cmyk_row[0], jpeg_.output_width, row);
    }
    return true;
  }

  // Adobe stores 255 - ink, and so does whoever writes CMYK JPEGs; a file without the Adobe marker is read
  // the same way, as Pillow does.
  static void InvertedCmykToRgb(const uint8_t* in, size_t width, uint8_t* out) {
    for (size_t x = 0; x < width; ++x, in += 4, out += 3) {
      for (int c = 0; c < 3; ++c) {
        const int ink = ((255 - in[c]) * in[3] + 127) / 255;
        out[c] = static_cast<uint8_t>(in[3] - ink);
      }
    }
  }

  Status Malformed() const {
    return InvalidArgument(fmt::format("The JPEG image is malformed ({}); send a valid file.", error_));
  }

  [[noreturn]] static void Fail(j_common_ptr jpeg, const char* message) {
    auto* self = static_cast<JpegDecoder*>(jpeg->client_data);
    std::snprintf(self->error_, sizeof(self->error_), "%s", message);
    std::longjmp(self->jump_, 1);
  }

  [[noreturn]] static void OnError(j_common_ptr jpeg) {
    char message[JMSG_LENGTH_MAX];
    jpeg->err->format_message(jpeg, message);
    Fail(jpeg, message);
  }

  static void OnMessage(j_common_ptr, int) {}

  static boolean OnEndOfInput(j_decompress_ptr jpeg) {
    Fail(reinterpret_cast<j_common_ptr>(jpeg), "it ends early");
  }

  static void OnSkip(j_decompress_ptr jpeg, long count) {  // NOLINT: libjpeg's type
    if (count <= 0) return;
    if (static_cast<size_t>(count) > jpeg->src->bytes_in_buffer) OnEndOfInput(jpeg);
    jpeg->src->next_input_byte += count;
    jpeg->src->bytes_in_buffer -= count;
  }

  static void OnProgress(j_common_ptr jpeg) {
    if (reinterpret_cast<j_decompress_ptr>(jpeg)->input_scan_number > kMaxScans) Fail(jpeg, "too many scans");
  }

  std::string_view bytes_;
  jpeg_decompress_struct jpeg_ = {};
  jpeg_error_mgr errors_ = {};
  jpeg_source_mgr source_ = {};
  jpeg_progress_mgr progress_ = {};
  std::jmp_buf jump_;
  char error_[JMSG_LENGTH_MAX] = "";
};

}  // namespace

std::unique_ptr<ImageDecoder> NewJpegDecoder(std::string_view bytes) {
  return std::make_unique<JpegDecoder>(bytes);
}

}  // namespace triaxial
