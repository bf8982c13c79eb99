#include "ops/cuda/layout_convert.h"

#include <gtest/gtest.h>

#include <cstring>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "kv/codec.h"
#include "ops/cuda/element_at.h"

namespace triaxial::cuda {
namespace {

constexpr Codec kCodecs[] = {Codec::kRotated, Codec::kPaper};

std::vector<int> BitsOfFormats() {
  std::set<int> bits;
  for (int f = 0; f < kFormats; ++f) bits.insert(Bits(static_cast<Format>(f), Side::kK));
  return {bits.begin(), bits.end()};
}

// Every element has bits of its own, and with the metadata they fill the side.
TEST(CudaLayout, ElementsAndMetadataFillASide) {
  for (const Codec codec : kCodecs) {
    for (const int dim : {64, 128}) {
      for (const int bits : BitsOfFormats()) {
        for (const Side side : {Side::kK, Side::kV}) {
          const int size = SideSize(codec, dim, bits);
          EXPECT_EQ(size, SideBytes({1, 1, dim, codec}, bits));
          std::vector<uint8_t> used(static_cast<size_t>(size));
          const auto take = [&](int byte, int mask) {
            ASSERT_TRUE(byte >= 0 && byte < size);
            EXPECT_EQ(used[static_cast<size_t>(byte)] & mask, 0);
            used[static_cast<size_t>(byte)] |= static_cast<uint8_t>(mask);
          };
          std::set<int> metas;
          for (int t = 0; t < kBlockTokens; ++t) {
            for (int c = 0; c < dim; ++c) {
              const BitPlace place = PlaceOfElement(dim, bits, side, t, c);
              if (bits == 16) {
                take(place.byte, 255);
                take(place.byte + 1, 255);
                continue;
              }
              take(place.byte, ((1 << bits) - 1) << place.shift);
              const MetaPlace meta = PlaceOfScale(codec, dim, bits, side, t, c);
              metas.insert(meta.scale);
              metas.insert(meta.minimum);
            }
          }
          for (const int meta : metas) {
            take(meta, 255);
            take(meta + 1, 255);
          }
          for (const uint8_t byte : used) ASSERT_EQ(byte, 255);
        }
      }
    }
  }
}

TEST(CudaLayout, ElementAtIsTheInverseOfPlaceOfElement) {
  for (const int dim : {64, 128}) {
    for (const int bits : BitsOfFormats()) {
      for (const Side side : {Side::kK, Side::kV}) {
        for (int chunk = 0; chunk < ChunksOf(dim, bits, kBlockTokens); ++chunk) {
          for (int word = 0; word < 4; ++word) {
            for (int item = 0; item < 32 / bits; ++item) {
              const ElementPlace e = ElementAt(dim, bits, side, chunk, word, item);
              const BitPlace place = PlaceOfElement(dim, bits, side, e.token, e.channel);
              ASSERT_EQ(place.byte * 8 + place.shift,
                        (ChunkOffset(dim, bits, chunk) + word * 4) * 8 + item * bits)
                  << "bits " << bits << " chunk " << chunk << " word " << word << " item " << item;
            }
          }
        }
      }
    }
  }
}

// A block that the scalar codec wrote comes back from "cuda-1" as it was, and there holds the same codes and
// metadata.
TEST(CudaLayout, ConvertsBlocksThereAndBack) {
  std::mt19937 random(7);
  std::normal_distribution<float> normal;
  for (const Codec codec : kCodecs) {
    for (const int dim : {64, 128}) {
      const KvGeometry g{1, 3, dim, codec};
      std::vector<float> k(static_cast<size_t>(3 * kBlockTokens * dim)), v(k.size());
      for (float& x : k) x = normal(random);
      for (float& x : v) x = normal(random);
      for (int f = 0; f < kFormats; ++f) {
        const auto format = static_cast<Format>(f);
        const int head_bytes = HeadBytes(g, format);
        std::vector<uint8_t> cpu(static_cast<size_t>(3 * head_bytes)), cuda(cpu.size(), 0xaa),
            back(cpu.size(), 0x55);
        for (int h = 0; h < 3; ++h) {
          const size_t at = static_cast<size_t>(h * kBlockTokens * dim);
          EncodeBlockScalar(g, format, {}, k.data() + at, v.data() + at, dim, kBlockTokens,
                            cpu.data() + h * head_bytes);
        }
        CudaFromCpu(g, format, kBlockTokens, cpu.data(), cuda.data());
        CpuFromCuda(g, format, kBlockTokens, cuda.data(), back.data());
        EXPECT_EQ(cpu, back) << Name(format);
        EXPECT_NE(cpu, cuda) << Name(format);
        if (format != Format::kBf16) continue;
        uint16_t found;
        std::memcpy(&found, cuda.data() + 2 * head_bytes + PlaceOfElement(dim, 16, Side::kK, 37, 5).byte, 2);
        uint32_t bits;
        std::memcpy(&bits, &k[static_cast<size_t>((2 * kBlockTokens + 37) * dim + 5)], 4);
        EXPECT_EQ(found, (bits + 0x7fffu + (bits >> 16 & 1)) >> 16);
      }
    }
  }
}

// A tail of 16 tokens takes a quarter of the bytes, keys first.
TEST(CudaLayout, ConvertsTailsOfAnyCapacity) {
  const KvGeometry g{1, 2, 64, Codec::kRotated};
  for (const int capacity : {16, 32, 48, 64}) {
    std::vector<uint8_t> cpu(static_cast<size_t>(g.num_kv_heads * 2 * capacity * g.head_dim * 2));
    for (size_t i = 0; i < cpu.size(); ++i) cpu[i] = static_cast<uint8_t>(i * 131 >> 3);
    std::vector<uint8_t> cuda(cpu.size()), back(cpu.size());
    CudaFromCpu(g, Format::kBf16, capacity, cpu.data(), cuda.data());
    CpuFromCuda(g, Format::kBf16, capacity, cuda.data(), back.data());
    EXPECT_EQ(cpu, back);
    // Value of head 1, token 9, channel 33: channels are rows, tokens columns.
    const size_t head = static_cast<size_t>(2 * capacity * g.head_dim * 2), side = head + head / 2;
    EXPECT_EQ(std::memcmp(&cuda[side + static_cast<size_t>(PlaceOfElement(64, 16, Side::kV, 9, 33).byte)],
                          &cpu[side + static_cast<size_t>(2 * PlaceOfBf16(9, 33, 64))], 2),
              0);
  }
}

}  // namespace
}  // namespace triaxial::cuda
