// What goes wrong on real machines with a real checkpoint: cut downloads, lost shards, a config of another
// model, a machine without memory or file descriptors to spare.
#include <gtest/gtest.h>
#include <sys/resource.h>

#include <cstdlib>
#include <cstring>

#include "io/checkpoint_testing.h"
#include "io/model_config.h"
#include "io/safetensors.h"

namespace triaxial {
namespace {

namespace fs = std::filesystem;

constexpr const char* kModel = "models/pocket-agent";
constexpr const char* kEmbedding = "model.language_model.embed_tokens.weight";

void CopyModel(const TempDir& dir) {
  fs::copy(kModel, dir.path(), fs::copy_options::recursive | fs::copy_options::overwrite_existing);
}

// The pocket agent's tensors as `count` shards with an index, as large models are published.
void WriteShards(const TempDir& dir, size_t count) {
  const auto whole = Checkpoint::Open(kModel);
  ASSERT_TRUE(whole.ok()) << whole.status().message();
  std::vector<std::string> headers(count, "{");
  std::vector<std::string> data(count);
  std::string weight_map;
  size_t next = 0;
  for (const auto& [name, view] : whole->tensors()) {
    const size_t shard = next++ % count;
    std::string shape;
    for (const int64_t dim : view.shape) shape += (shape.empty() ? "" : ",") + std::to_string(dim);
    const size_t begin = data[shard].size();
    data[shard].append(reinterpret_cast<const char*>(view.data),
                       static_cast<size_t>(view.elements * ByteSize(view.dtype)));
    headers[shard] += (headers[shard].size() > 1 ? ",\"" : "\"") + name + R"(":{"dtype":")" +
                      std::string(Name(view.dtype)) + R"(","shape":[)" + shape + R"(],"data_offsets":[)" +
                      std::to_string(begin) + "," + std::to_string(data[shard].size()) + "]}";
    weight_map += (weight_map.empty() ? "\"" : ",\"") + name + R"(":"shard-)" + std::to_string(shard) +
                  ".safetensors\"";
  }
  for (size_t i = 0; i < count; ++i) {
    dir.Write("shard-" + std::to_string(i) + ".safetensors", SafetensorsFile(headers[i] + "}", data[i]));
  }
  dir.Write("model.safetensors.index.json", R"({"metadata":{},"weight_map":{)" + weight_map + "}}");
}

TEST(CheckpointFaults, ADownloadCutAnywhereIsCalledTruncated) {
  const TempDir dir;
  CopyModel(dir);
  const std::string weights = dir.File("model.safetensors");
  const auto size = static_cast<int64_t>(fs::file_size(weights));
  for (const int64_t left :
       {size - 1, size / 2, int64_t{20000}, int64_t{8192}, int64_t{8}, int64_t{3}, int64_t{0}}) {
    fs::resize_file(weights, static_cast<uintmax_t>(left));
    const auto checkpoint = Checkpoint::Open(dir.path());
    ASSERT_FALSE(checkpoint.ok()) << left;
    EXPECT_EQ(checkpoint.status().code(), Code::kDataLoss) << left;
    EXPECT_TRUE(checkpoint.status().message().starts_with(weights + " is truncated: ")) << left;
  }
}

TEST(CheckpointFaults, ShardsHoldWhatTheSingleFileHolds) {
  const TempDir dir;
  WriteShards(dir, 3);
  const auto whole = Checkpoint::Open(kModel);
  const auto sharded = Checkpoint::Open(dir.path());
  ASSERT_TRUE(sharded.ok()) << sharded.status().message();
  ASSERT_EQ(sharded->tensors().size(), whole->tensors().size());
  for (const auto& [name, view] : whole->tensors()) {
    const auto found = sharded->Get(name, view.shape);
    ASSERT_TRUE(found.ok()) << found.status().message();
    EXPECT_EQ(0, std::memcmp(found->data, view.data, static_cast<size_t>(view.elements * 2))) << name;
  }
}

TEST(CheckpointFaults, ALostShardIsNamed) {
  for (const std::string shard : {"shard-0.safetensors", "shard-1.safetensors", "shard-2.safetensors"}) {
    const TempDir dir;
    WriteShards(dir, 3);
    fs::remove(dir.File(shard));
    const auto checkpoint = Checkpoint::Open(dir.path());
    ASSERT_FALSE(checkpoint.ok()) << shard;
    EXPECT_EQ(checkpoint.status().code(), Code::kNotFound);
    EXPECT_NE(checkpoint.status().message().find(dir.File(shard)), std::string::npos)
        << checkpoint.status().message();
  }
}

TEST(CheckpointFaults, TheConfigOfAnotherModelIsNoticedAtTheFirstTensor) {
  const TempDir dir;
  CopyModel(dir);
  fs::copy_file("tests/data/configs/qwen3-vl-2b.config.json", dir.File("config.json"),
                fs::copy_options::overwrite_existing);
  const auto model = LoadModelConfig(dir.path());
  const auto checkpoint = Checkpoint::Open(dir.path());
  ASSERT_TRUE(model.ok() && checkpoint.ok());
  const auto embedding = checkpoint->Get(kEmbedding, {model->text.vocab_size, model->text.hidden_size});
  ASSERT_FALSE(embedding.ok());
  EXPECT_EQ(embedding.status().message(), dir.File("model.safetensors") + ": tensor \"" + kEmbedding +
                                              "\" must have shape [151936, 2048], found [2048, 320]");
}

TEST(CheckpointFaults, ALinkThatLeadsNowhereOrInCirclesIsAnError) {
  const TempDir dir;
  CopyModel(dir);
  fs::remove(dir.File("model.safetensors"));
  fs::create_symlink("model.safetensors", dir.File("model.safetensors"));
  const auto circle = Checkpoint::Open(dir.path());
  ASSERT_FALSE(circle.ok());
  EXPECT_EQ(circle.status().code(), Code::kInternal);
  EXPECT_TRUE(circle.status().message().starts_with("cannot open " + dir.File("model.safetensors") + ": "));
  fs::remove(dir.File("model.safetensors"));
  fs::create_symlink("blobs/0a1b2c", dir.File("model.safetensors"));
  EXPECT_EQ(Checkpoint::Open(dir.path()).status().code(), Code::kNotFound);
}

// For a child process: exits with 0 if `body` returns true under the limit.
template <typename Body>
[[noreturn]] void RunUnderLimit(__rlimit_resource resource, rlim_t limit, const Body& body) {
  const rlimit values = {limit, limit};
  std::_Exit(setrlimit(resource, &values) == 0 && body() ? 0 : 1);
}

TEST(CheckpointFaultsDeathTest, WithoutAddressSpaceOpenFailsInOneSentence) {
  const auto fails_to_map = [] {
    const auto checkpoint = Checkpoint::Open(kModel);
    return !checkpoint.ok() && checkpoint.status().code() == Code::kInternal &&
           checkpoint.status().message().starts_with("cannot map models/pocket-agent/model.safetensors: ");
  };
  // Less than what the process has mapped already, so that the mapping cannot fit.
  EXPECT_EXIT(RunUnderLimit(RLIMIT_AS, rlim_t{16} << 20, fails_to_map), testing::ExitedWithCode(0), "");
}

TEST(CheckpointFaultsDeathTest, ManyShardsNeedFewFileDescriptors) {
  const TempDir dir;
  WriteShards(dir, 40);
  const auto opens = [&dir] {
    const auto checkpoint = Checkpoint::Open(dir.path());
    return checkpoint.ok() && checkpoint->tensors().size() == 137;
  };
  EXPECT_EXIT(RunUnderLimit(RLIMIT_NOFILE, 16, opens), testing::ExitedWithCode(0), "");
}

}  // namespace
}  // namespace triaxial
