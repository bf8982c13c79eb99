#include "apps/checkpoint_identity.h"

#include <gtest/gtest.h>

#include <filesystem>
#include <functional>

#include "base/temp_dir_testing.h"

namespace triaxial {
namespace {

void WriteCheckpoint(const TempDir& directory) {
  directory.Write("config.json", "{\"layers\": 2}");
  directory.Write("tokenizer.json", "{}");
  directory.Write("model-00001-of-00002.safetensors", std::string(40 << 20, 'a'));  // of several chunks
  directory.Write("model-00002-of-00002.safetensors", "b");
  directory.Write("README.md", "a checkpoint");
}

std::string IdentityOf(const std::string& directory) {
  const auto identity = CheckpointIdentity(directory, "");
  EXPECT_TRUE(identity.ok()) << identity.status().message();
  return identity.ok() ? *identity : "";
}

TEST(CheckpointIdentityTest, FollowsFromContentsAlone) {
  const TempDir one, two;
  WriteCheckpoint(one);
  WriteCheckpoint(two);
  const std::string identity = IdentityOf(one.path());
  EXPECT_EQ(identity.size(), 64u);
  EXPECT_EQ(IdentityOf(two.path()), identity);
  two.Write("README.md", "the same checkpoint");
  EXPECT_EQ(IdentityOf(two.path()), identity);
}

TEST(CheckpointIdentityTest, EveryByteOfTheModelCounts) {
  TempDir directory;
  WriteCheckpoint(directory);
  const std::string identity = IdentityOf(directory.path());
  std::string weights(40 << 20, 'a');
  weights[35 << 20] = 'b';
  const std::function<void()> changes[] = {
      [&] { directory.Write("model-00001-of-00002.safetensors", weights); },
      [&] { directory.Write("model-00001-of-00002.safetensors", std::string((40 << 20) - 1, 'a')); },
      [&] { directory.Write("model-00002-of-00002.safetensors", "c"); },
      [&] { directory.Write("config.json", "{\"layers\": 3}"); },
      [&] { directory.Write("tokenizer.json", "{ }"); },
      [&] { directory.Write("kv_calibration.json", "{}"); },
      [&] { directory.Write("model-00003-of-00003.safetensors", ""); },
      [&] { std::filesystem::remove(directory.File("model-00002-of-00002.safetensors")); },
  };
  for (size_t i = 0; i < std::size(changes); ++i) {
    WriteCheckpoint(directory);
    std::filesystem::remove(directory.File("kv_calibration.json"));
    std::filesystem::remove(directory.File("model-00003-of-00003.safetensors"));
    ASSERT_EQ(IdentityOf(directory.path()), identity);
    changes[i]();
    EXPECT_NE(IdentityOf(directory.path()), identity) << "change " << i;
  }
}

TEST(CheckpointIdentityTest, TheTokenizerMayLieElsewhere) {
  const TempDir model, text;
  WriteCheckpoint(model);
  text.Write("tokenizer.json", "{\"other\": 1}");
  const auto identity = CheckpointIdentity(model.path(), text.path());
  ASSERT_TRUE(identity.ok());
  EXPECT_NE(*identity, IdentityOf(model.path()));
}

TEST(CheckpointIdentityTest, AMissingDirectoryIsAnError) {
  const TempDir directory;
  const auto identity = CheckpointIdentity(directory.File("none"), "");
  ASSERT_FALSE(identity.ok());
  EXPECT_NE(identity.status().message().find("none"), std::string::npos);
}

}  // namespace
}  // namespace triaxial
