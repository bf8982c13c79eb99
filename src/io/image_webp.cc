#include <fmt/format.h>
#include <webp/decode.h>
#include <webp/demux.h>

#include "io/exif.h"
#include "io/image_decoder.h"

namespace triaxial {
namespace {

class WebpDecoder : public ImageDecoder {
 public:
  explicit WebpDecoder(std::string_view bytes) : bytes_(bytes) {}

  ~WebpDecoder() override {
    WebPDemuxReleaseIterator(&frame_);
    WebPDemuxDelete(demuxer_);
  }

  Result<ImageHeader> ReadHeader() override {
    const WebPData data{reinterpret_cast<const uint8_t*>(bytes_.data()), bytes_.size()};
    demuxer_ = WebPDemux(&data);
    if (demuxer_ == nullptr || WebPDemuxGetFrame(demuxer_, 1, &frame_) == 0) {
      return InvalidArgument("The WebP image is malformed or ends early; send a valid file.");
    }
    ImageHeader header;
    header.width = WebPDemuxGetI(demuxer_, WEBP_FF_CANVAS_WIDTH);
    header.height = WebPDemuxGetI(demuxer_, WEBP_FF_CANVAS_HEIGHT);
    // The first frame of an animation need not cover the canvas; the rest is transparent.
    const bool covers = frame_.width == header.width && frame_.height == header.height;
    header.channels = frame_.has_alpha != 0 || !covers ? 4 : 3;
    WebPChunkIterator exif = {};
    if (WebPDemuxGetChunk(demuxer_, "EXIF", 1, &exif) != 0) {
      header.orientation =
          ExifOrientation({reinterpret_cast<const char*>(exif.chunk.bytes), exif.chunk.size});
    }
    WebPDemuxReleaseChunkIterator(&exif);
    header_ = header;
    return header;
  }

  Status ReadPixels(uint8_t* pixels) override {
    WebPDecoderConfig config;
    if (WebPInitDecoderConfig(&config) == 0) return Malformed("libwebp does not start");
    const size_t channels = header_.channels;
    const size_t stride = header_.width * channels;
    config.output.colorspace = channels == 4 ? MODE_RGBA : MODE_RGB;
    config.output.is_external_memory = 1;
    // The demuxer has checked that the frame lies inside the canvas.
    config.output.u.RGBA.rgba = pixels + frame_.y_offset * stride + frame_.x_offset * channels;
    config.output.u.RGBA.stride = static_cast<int>(stride);
    config.output.u.RGBA.size = (frame_.height - 1) * stride + frame_.width * channels;
    const VP8StatusCode code = WebPDecode(frame_.fragment.bytes, frame_.fragment.size, &config);
    WebPFreeDecBuffer(&config.output);
    switch (code) {
      case VP8_STATUS_OK:
        return OkStatus();
      case VP8_STATUS_OUT_OF_MEMORY:
        return ResourceExhausted("There is no memory to decode the WebP image; try again later.");
      case VP8_STATUS_SUSPENDED:
      case VP8_STATUS_NOT_ENOUGH_DATA:
        return Malformed("it ends early");
      default:
        return Malformed("its picture data is invalid");
    }
  }

 private:
  static Status Malformed(std::string_view why) {
    return InvalidArgument(fmt::format("The WebP image is malformed ({}); send a valid file.", why));
  }

  std::string_view bytes_;
  WebPDemuxer* demuxer_ = nullptr;
  WebPIterator frame_ = {};
  ImageHeader header_;
};

}  // namespace

std::unique_ptr<ImageDecoder> NewWebpDecoder(std::string_view bytes) {
  return std::make_unique<WebpDecoder>(bytes);
}

}  // namespace triaxial
