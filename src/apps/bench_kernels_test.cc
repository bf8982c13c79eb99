#include "apps/bench_kernels.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>

namespace triaxial {
namespace {

TEST(FormatMix, NamesAndSpreads) {
  EXPECT_EQ(ParseFormatMix("k4v4").value().Name(), "k4v4");
  const FormatMix mix = ParseFormatMix("25k4v4+75k2v2").value();
  EXPECT_EQ(mix.Name(), "75k2v2+25k4v4");
  const std::vector<Format> formats = mix.Spread(100);
  EXPECT_EQ(std::count(formats.begin(), formats.end(), Format::kK2V2), 75);
  EXPECT_EQ(std::count(formats.begin(), formats.end(), Format::kK4V4), 25);
  // Evenly: no eight in a row without both.
  for (size_t i = 0; i + 8 <= formats.size(); ++i) {
    const auto begin = formats.begin() + static_cast<int64_t>(i);
    EXPECT_NE(std::count(begin, begin + 8, Format::kK4V4), 0);
    EXPECT_NE(std::count(begin, begin + 8, Format::kK2V2), 0);
  }
  for (const char* bad : {"", "k3v3", "50k2v2", "60k2v2+60k4v4", "k2v2+k4v4", "-100k2v2", "75k2v2+"})
    EXPECT_EQ(ParseFormatMix(bad).status().code(), Code::kInvalidArgument) << bad;
}

TEST(AttentionError, IsTheRelativeDistance) {
  // Two equal keys weigh their values equally.
  const std::vector<float> keys = {1, 0, 1, 0}, values = {2, 0, 4, 2};
  const float q[] = {3, 1};
  const float right[] = {3, 1}, wrong[] = {3, 2};
  EXPECT_NEAR(AttentionError(q, 1, keys, values, 2, right), 0, 1e-12);
  EXPECT_NEAR(AttentionError(q, 1, keys, values, 2, wrong), 1 / std::sqrt(10.0), 1e-12);
}

TEST(CpuKernelBench, MeasuresWhatIsRight) {
  const std::unique_ptr<KernelBench> bench = CpuKernelBench(1 << 20);
  for (const Codec codec : {Codec::kRotated, Codec::kPaper}) {
    const KvGeometry g{1, 2, 128, codec};
    AttentionCase attention{g, 4, 2, 1024, 1, ParseFormatMix("50k2v2+25fp8+25bf16").value()};
    const Result<KernelTime> decode = bench->TimeAttention(attention, 0.01);
    ASSERT_TRUE(decode.ok()) << decode.status().message();
    EXPECT_GT(decode->seconds, 0);
    EXPECT_EQ(decode->bytes, 2 * 2 *
                                 (8 * HeadBytes(g, Format::kK2V2) + 4 * HeadBytes(g, Format::kFp8) +
                                  4 * HeadBytes(g, Format::kBf16)));
    using Op = CodecCase::Op;
    for (const CodecCase& c :
         {CodecCase{g, Op::kAppend, 16}, CodecCase{g, Op::kStore, 16, Format::kBf16, Format::kK4V2},
          CodecCase{g, Op::kConvert, 16, Format::kBf16, Format::kFp8},
          CodecCase{g, Op::kConvert, 16, Format::kK4V4, Format::kK2V2}}) {
      const Result<KernelTime> time = bench->TimeCodec(c, 0.01);
      ASSERT_TRUE(time.ok()) << time.status().message();
      EXPECT_GT(time->seconds, 0);
    }
  }
}

}  // namespace
}  // namespace triaxial
