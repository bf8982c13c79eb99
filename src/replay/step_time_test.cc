#include "replay/step_time.h"

#include <gtest/gtest.h>

#include "io/checkpoint_testing.h"

namespace triaxial {
namespace {

ModelConfig Qwen32B() { return *LoadModelConfigFile("tests/data/configs/qwen3-vl-32b.config.json"); }

TEST(ModelCost, CountsTheWeightsOfQwen3Vl32B) {
  const ModelCost cost = CostOf(Qwen32B());
  // By hand: 64 layers of 2 * 5120 * 8192 + 2 * 5120 * 1024 + 3 * 5120 * 25600.
  EXPECT_EQ(cost.layer_weights, 64 * (2LL * 5120 * 8192 + 2LL * 5120 * 1024 + 3LL * 5120 * 25600));
  EXPECT_EQ(cost.head_weights, 151936LL * 5120);
  EXPECT_EQ(cost.kv_bytes_per_row, 2LL * 2 * 64 * 8 * 128);
  EXPECT_EQ(cost.attention_flops, 4.0 * 64 * 64 * 128);
  // The published checkpoint has 33.4 billion parameters.
  EXPECT_NEAR(static_cast<double>(cost.total_weights), 33.4e9, 0.1e9);
}

TEST(StepSeconds, IsTheSumOfTwoRooflinesAndTheRest) {
  ModelCost model;
  model.layer_weights = 1000;
  model.head_weights = 500;
  model.attention_flops = 8;
  model.kv_bytes_per_row = 20;
  DeviceSpec device;
  device.bandwidth = 100;
  device.flops = 10000;
  device.bandwidth_share = 0.5;
  device.quantized_share = {0.1, 0.2, 0.5};
  device.flops_share = 0.8;
  device.step_seconds = 1;

  StepWork decode{.rows = 1, .logits_rows = 1, .contexts = 10};
  decode.kv_bytes[static_cast<size_t>(Format::kBf16)] = 100;
  decode.kv_bytes[static_cast<size_t>(Format::kK4V2)] = 30;
  // Weights: 2 * 1500 / 50 against 2 * 1500 / 8000. Attention: 20 / 50 + 100 / 50 + 30 / 15 against 80 /
  // 8000.
  EXPECT_DOUBLE_EQ(StepSeconds(model, device, decode), 60 + 4.4 + 1);

  const StepWork prefill{.rows = 1000, .contexts = 500000};
  // Weights: 2 * 1000 / 50 against 2 * 1000 * 1000 / 8000. Attention: 20000 / 50 against 8 * 500000 / 8000.
  EXPECT_DOUBLE_EQ(StepSeconds(model, device, prefill), 250 + 500 + 1);

  const StepWork moving{.moved_bytes = 200};
  EXPECT_DOUBLE_EQ(StepSeconds(model, device, moving), 200 / 50. + 1);
}

TEST(StepSeconds, IsWithinAFifthOfMeasuredDecodeSteps) {
  // docs/kernels.md, Qwen3-VL-32B on an H200: sequences, context, bytes per token of BF16, milliseconds.
  const ModelCost model = CostOf(Qwen32B());
  const DeviceSpec device = *LoadDevice("h200");
  const KvGeometry geometry = {64, 8, 128, Codec::kRotated};
  const struct {
    int sequences, context;
    Format format;
    double milliseconds;
  } cases[] = {{1, 4096, Format::kBf16, 18.03},  {4, 8000, Format::kBf16, 20.00},
               {16, 4096, Format::kBf16, 21.94}, {16, 4096, Format::kK4V4, 18.95},
               {64, 4096, Format::kBf16, 35.00}, {64, 4096, Format::kK4V4, 23.69},
               {64, 4096, Format::kK2V2, 22.20}};
  for (const auto& c : cases) {
    StepWork work{.rows = c.sequences, .logits_rows = c.sequences, .contexts = 1.0 * c.sequences * c.context};
    work.kv_bytes[static_cast<size_t>(c.format)] =
        int64_t{c.sequences} * c.context * BlockBytes(geometry, c.format) / kBlockTokens;
    EXPECT_NEAR(1e3 * StepSeconds(model, device, work) / c.milliseconds, 1, 0.2)
        << c.sequences << " x " << c.context << " " << Name(c.format);
  }
}

TEST(Device, ReadsAFileAndRefusesNonsense) {
  const TempDir dir;
  dir.Write("mine.json", R"({"memory": 48e9, "bandwidth": 0.8e12, "flops": 180e12, "k2_share": 0.3})");
  const auto device = LoadDevice(dir.File("mine.json"));
  ASSERT_TRUE(device.ok()) << device.status().message();
  EXPECT_EQ(device->name, "mine");
  EXPECT_EQ(device->memory, 48e9);
  EXPECT_EQ(device->KvShare(Format::kK2V2), 0.3);
  EXPECT_EQ(device->flops_share, LoadDevice("h200")->flops_share);
  for (const char* bad : {"[]", "{}", R"({"memory": 48e9, "bandwidth": -1, "flops": 180e12})",
                          R"({"memory": 48e9, "bandwidth": 1e12, "flops": 180e12, "usable": 2})"}) {
    dir.Write("bad.json", bad);
    EXPECT_FALSE(LoadDevice(dir.File("bad.json")).ok()) << bad;
  }
  EXPECT_EQ(LoadDevice("h1000").status().code(), Code::kNotFound);
}

}  // namespace
}  // namespace triaxial
