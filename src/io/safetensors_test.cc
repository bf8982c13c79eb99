#include "io/safetensors.h"

#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <limits>

#include "base/float16.h"
#include "io/checkpoint_testing.h"

namespace triaxial {
namespace {

std::string Bytes(const std::vector<float>& values) {
  return std::string(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(float));
}

std::string Bytes(const std::vector<uint16_t>& values) {
  return std::string(reinterpret_cast<const char*>(values.data()), values.size() * sizeof(uint16_t));
}

std::vector<float> Floats(const TensorView& view) {
  std::vector<float> out(static_cast<size_t>(view.elements));
  CopyToF32(view, out.data());
  return out;
}

TEST(Safetensors, ReadsEveryDTypeAtAnyAlignment) {
  // The header's odd length puts the data at an odd address.
  std::string header =
      R"({"__metadata__":{"format":"pt"},"f32":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]},)"
      R"("bf16":{"dtype":"BF16","shape":[3],"data_offsets":[16,22]},)"
      R"("f16":{"dtype":"F16","shape":[1,4],"data_offsets":[22,30]},)"
      R"("scalar":{"dtype":"F32","shape":[],"data_offsets":[30,34]},)"
      R"("empty":{"dtype":"F32","shape":[0,7],"data_offsets":[34,34]}})";
  if (header.size() % 2 == 0) header += ' ';
  const TempDir dir;
  dir.Write("model.safetensors",
            SafetensorsFile(header, Bytes(std::vector<float>{1, -2.5f, 3e30f, 0}) +
                                        Bytes(std::vector<uint16_t>{0x3f80, 0xc040, 0x7f80}) +
                                        Bytes(std::vector<uint16_t>{0x3c00, 0xc200, 0x0001, 0xfc00}) +
                                        Bytes(std::vector<float>{42})));
  const auto checkpoint = Checkpoint::Open(dir.path());
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status().message();
  EXPECT_EQ(checkpoint->tensors().size(), 5u);
  const float inf = std::numeric_limits<float>::infinity();
  EXPECT_EQ(Floats(*checkpoint->Get("f32", {2, 2})), (std::vector<float>{1, -2.5f, 3e30f, 0}));
  EXPECT_EQ(Floats(*checkpoint->Get("bf16", {3})), (std::vector<float>{1, -3, inf}));
  EXPECT_EQ(Floats(*checkpoint->Get("f16", {1, 4})), (std::vector<float>{1, -3, 0x1p-24f, -inf}));
  EXPECT_EQ(Floats(*checkpoint->Get("scalar", {})), std::vector<float>{42});
  EXPECT_TRUE(Floats(*checkpoint->Get("empty", {0, 7})).empty());
  EXPECT_EQ(checkpoint->Get("f16", {1, 4})->file, dir.File("model.safetensors"));
}

TEST(Safetensors, ConvertsEveryHalfPrecisionValue) {
  std::vector<uint16_t> all(65536);
  for (size_t i = 0; i < all.size(); ++i) all[i] = static_cast<uint16_t>(i);
  const std::string bytes = "x" + Bytes(all);
  for (const DType dtype : {DType::kBf16, DType::kF16}) {
    TensorView view;
    view.dtype = dtype;
    view.elements = static_cast<int64_t>(all.size());
    view.data = reinterpret_cast<const uint8_t*>(bytes.data()) + 1;
    const std::vector<float> out = Floats(view);
    for (size_t i = 0; i < all.size(); ++i) {
      // From the definition: sign, exponent, mantissa.
      const int mantissa_bits = dtype == DType::kBf16 ? 7 : 10;
      const int bias = dtype == DType::kBf16 ? 127 : 15;
      const int exponent = static_cast<int>(i & 0x7fff) >> mantissa_bits;
      const int mantissa = static_cast<int>(i) & ((1 << mantissa_bits) - 1);
      const double sign = i < 0x8000 ? 1 : -1;
      if (exponent == 2 * bias + 1) {
        EXPECT_EQ(std::isnan(out[i]), mantissa != 0) << i;
        EXPECT_EQ(std::isinf(out[i]), mantissa == 0) << i;
      } else {
        const double significand = exponent == 0 ? mantissa : (1 << mantissa_bits) + mantissa;
        EXPECT_EQ(out[i], sign * std::ldexp(significand, std::max(exponent, 1) - bias - mantissa_bits)) << i;
      }
    }
  }
}

class Sharded : public testing::Test {
 protected:
  static constexpr const char* kFirst = R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},)"
                                        R"("both":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})";
  static constexpr const char* kSecond = R"({"b":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},)"
                                         R"("both":{"dtype":"F32","shape":[1],"data_offsets":[8,12]}})";

  void WriteShards() {
    dir_.Write("one.safetensors", SafetensorsFile(kFirst, Bytes(std::vector<float>{1, 10})));
    dir_.Write("two.safetensors", SafetensorsFile(kSecond, Bytes(std::vector<float>{2, 3, 20})));
    WriteIndex(R"("a":"one.safetensors","b":"two.safetensors","both":"two.safetensors")");
  }
  void WriteIndex(const std::string& weight_map) {
    dir_.Write("model.safetensors.index.json",
               R"({"metadata":{"total_size":20},"weight_map":{)" + weight_map + "}}");
  }

  TempDir dir_;
};

TEST_F(Sharded, TakesEachTensorFromTheShardThatTheIndexNames) {
  WriteShards();
  auto opened = Checkpoint::Open(dir_.path());
  ASSERT_TRUE(opened.ok()) << opened.status().message();
  const Checkpoint checkpoint = std::move(opened).value();  // views survive a move
  EXPECT_EQ(Floats(*checkpoint.Get("a", {1})), std::vector<float>{1});
  EXPECT_EQ(Floats(*checkpoint.Get("b", {2})), (std::vector<float>{2, 3}));
  EXPECT_EQ(Floats(*checkpoint.Get("both", {1})), std::vector<float>{20});
  EXPECT_EQ(checkpoint.Get("a", {1})->file, dir_.File("one.safetensors"));
  EXPECT_EQ(checkpoint.Get("b", {2})->file, dir_.File("two.safetensors"));
}

TEST_F(Sharded, NamesAMissingShard) {
  WriteShards();
  std::filesystem::remove(dir_.File("two.safetensors"));
  const auto checkpoint = Checkpoint::Open(dir_.path());
  ASSERT_FALSE(checkpoint.ok());
  EXPECT_EQ(checkpoint.status().code(), Code::kNotFound);
  EXPECT_EQ(checkpoint.status().message(), dir_.File("model.safetensors.index.json") +
                                               " names a shard that cannot be used: cannot open " +
                                               dir_.File("two.safetensors") + ": No such file or directory");
}

TEST_F(Sharded, NamesATensorThatItsShardLacks) {
  WriteShards();
  WriteIndex(R"("a":"one.safetensors","b":"one.safetensors")");
  const auto checkpoint = Checkpoint::Open(dir_.path());
  ASSERT_FALSE(checkpoint.ok());
  EXPECT_EQ(checkpoint.status().code(), Code::kInvalidArgument);
  EXPECT_EQ(checkpoint.status().message(),
            dir_.File("model.safetensors.index.json") +
                R"( places tensor "b" in "one.safetensors", which does not hold it)");
}

TEST(Safetensors, GetSaysWhatWasExpectedAndFound) {
  const TempDir dir;
  dir.Write("model.safetensors",
            SafetensorsFile(R"({"w":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},)"
                            R"("n":{"dtype":"I64","shape":[1],"data_offsets":[24,32]}})",
                            std::string(32, '\0')));
  const auto checkpoint = Checkpoint::Open(dir.path());
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status().message();

  const auto shape = checkpoint->Get("w", {3, 2});
  ASSERT_FALSE(shape.ok());
  EXPECT_EQ(shape.status().code(), Code::kInvalidArgument);
  EXPECT_EQ(shape.status().message(),
            dir.File("model.safetensors") + R"(: tensor "w" must have shape [3, 2], found [2, 3])");

  const auto missing = checkpoint->Get("v", {3, 2});
  ASSERT_FALSE(missing.ok());
  EXPECT_EQ(missing.status().code(), Code::kNotFound);
  EXPECT_EQ(missing.status().message(),
            "the weights in " + dir.path() + R"( lack tensor "v" of shape [3, 2])");

  EXPECT_TRUE(checkpoint->Has("n"));
  EXPECT_FALSE(checkpoint->Has("v"));
  const auto dtype = checkpoint->Get("n", {1});
  ASSERT_FALSE(dtype.ok());
  EXPECT_EQ(dtype.status().code(), Code::kInvalidArgument);
  EXPECT_EQ(dtype.status().message(),
            dir.File("model.safetensors") + R"(: tensor "n" must have dtype F32, BF16 or F16, found "I64")");
}

TEST(Safetensors, SaysWhatADirectoryWithoutWeightsShouldHold) {
  const TempDir dir;
  const auto checkpoint = Checkpoint::Open(dir.path());
  ASSERT_FALSE(checkpoint.ok());
  EXPECT_EQ(checkpoint.status().code(), Code::kNotFound);
  EXPECT_EQ(checkpoint.status().message(),
            "no weights in " + dir.path() +
                ": expected model.safetensors or model.safetensors.index.json with its shards");
}

TEST(Safetensors, OpensThePocketAgent) {
  const auto checkpoint = Checkpoint::Open("models/pocket-agent");
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status().message();
  EXPECT_EQ(checkpoint->tensors().size(), 137u);
  int64_t parameters = 0;
  for (const auto& [name, view] : checkpoint->tensors()) {
    EXPECT_EQ(view.dtype, DType::kBf16) << name;
    parameters += view.elements;
  }
  EXPECT_EQ(parameters, 14'698'560);
  const auto embedding = checkpoint->Get("model.language_model.embed_tokens.weight", {2048, 320});
  ASSERT_TRUE(embedding.ok()) << embedding.status().message();
  for (const float value : Floats(*embedding)) ASSERT_TRUE(std::isfinite(value));
}

}  // namespace
}  // namespace triaxial
