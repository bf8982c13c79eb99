#include "ops/cuda/layout_convert.h"

#include <cstring>

#include "base/check.h"
#include "ops/cuda/layout.h"

namespace triaxial::cuda {
namespace {

struct Element {
  Side side;
  int token;
  int channel;
};

BitPlace CpuPlace(const KvGeometry& g, int bits, int capacity, const Element& e) {
  const bool keys = e.side == Side::kK;
  const int depth = keys ? e.channel : e.token, lane = keys ? e.token : e.channel;
  if (bits == 16) return {2 * PlaceOfBf16(depth, lane, keys ? capacity : g.head_dim), 0};
  const CodePlace place = PlaceOfCode(depth, lane, keys ? kBlockTokens : g.head_dim, bits);
  return {place.byte, place.shift};
}

MetaPlace CpuMeta(const KvGeometry& g, int bits, const Element& e) {
  const int scale = CodeBytes(g, bits) + 2 * PlaceOfMeta(g, e.side, bits, e.token, e.channel);
  return {scale, scale + 2 * MetaGroups(g, bits)};
}

void CopyBits(const uint8_t* in, const BitPlace& from, uint8_t* out, const BitPlace& to, int bits) {
  if (bits == 16) {
    std::memcpy(out + to.byte, in + from.byte, 2);
    return;
  }
  const int code = in[from.byte] >> from.shift & ((1 << bits) - 1);
  out[to.byte] = static_cast<uint8_t>(out[to.byte] | code << to.shift);
}

void Convert(const KvGeometry& g, Format f, int capacity, bool to_cuda, const uint8_t* in, uint8_t* out) {
  if (f != Format::kBf16) capacity = kBlockTokens;
  CHECK(capacity > 0 && capacity <= kBlockTokens && capacity % kTileTokens == 0);
  for (int head = 0; head < g.num_kv_heads; ++head) {
    for (const Side side : {Side::kK, Side::kV}) {
      const int bits = Bits(f, side);
      const int size = SideSize(g.codec, g.head_dim, bits, capacity);
      std::memset(out, 0, static_cast<size_t>(size));
      for (int token = 0; token < capacity; ++token) {
        for (int channel = 0; channel < g.head_dim; ++channel) {
          const Element e = {side, token, channel};
          const BitPlace cpu = CpuPlace(g, bits, capacity, e);
          const BitPlace cuda = PlaceOfElement(g.head_dim, bits, side, token, channel);
          CopyBits(in, to_cuda ? cpu : cuda, out, to_cuda ? cuda : cpu, bits);
          if (bits == 16) continue;
          const MetaPlace cpu_meta = CpuMeta(g, bits, e);
          const MetaPlace cuda_meta = PlaceOfScale(g.codec, g.head_dim, bits, side, token, channel);
          const MetaPlace& from = to_cuda ? cpu_meta : cuda_meta;
          const MetaPlace& to = to_cuda ? cuda_meta : cpu_meta;
          std::memcpy(out + to.scale, in + from.scale, 2);
          std::memcpy(out + to.minimum, in + from.minimum, 2);
        }
      }
      in += size;
      out += size;
    }
  }
}

}  // namespace

void CudaFromCpu(const KvGeometry& g, Format f, int capacity, const uint8_t* in, uint8_t* out) {
  Convert(g, f, capacity, /*to_cuda=*/true, in, out);
}

void CpuFromCuda(const KvGeometry& g, Format f, int capacity, const uint8_t* in, uint8_t* out) {
  Convert(g, f, capacity, /*to_cuda=*/false, in, out);
}

}  // namespace triaxial::cuda
