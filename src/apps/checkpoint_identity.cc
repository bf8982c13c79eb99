#include "apps/checkpoint_identity.h"

#include <fmt/format.h>

#include <algorithm>
#include <filesystem>
#include <span>
#include <string_view>
#include <vector>

#include "base/file.h"
#include "base/parallel.h"
#include "base/sha256.h"

namespace triaxial {
namespace {

constexpr size_t kChunk = size_t{16} << 20;

std::span<const uint8_t> AsBytes(std::string_view text) {
  return {reinterpret_cast<const uint8_t*>(text.data()), text.size()};
}

// Adds name, size and contents; of large files the digests of their chunks, which are computed in parallel.
Status AddFile(const std::string& directory, const std::string& name, Sha256* hash) {
  const std::string path = directory + "/" + name;
  MappedFile file;
  if (std::error_code error; std::filesystem::exists(path, error)) {
    ASSIGN_OR_RETURN(file, MappedFile::Open(path));
  }
  hash->Update(AsBytes(fmt::format("{} {} ", name, file.size())));
  const std::span<const uint8_t> bytes(file.data(), file.size());
  std::vector<Sha256Digest> digests((bytes.size() + kChunk - 1) / kChunk);
  ParallelFor(static_cast<int64_t>(digests.size()), [&](int64_t i) {
    const size_t begin = static_cast<size_t>(i) * kChunk;
    digests[static_cast<size_t>(i)] = Sha256Of(bytes.subspan(begin, std::min(kChunk, bytes.size() - begin)));
  });
  for (const Sha256Digest& digest : digests) hash->Update(digest);
  return OkStatus();
}

}  // namespace

Result<std::string> CheckpointIdentity(const std::string& directory, const std::string& tokenizer_directory) {
  std::vector<std::string> weights;
  std::error_code error;
  for (auto it = std::filesystem::directory_iterator(directory, error);
       !error && it != std::filesystem::directory_iterator(); it.increment(error)) {
    if (it->path().extension() == ".safetensors") weights.push_back(it->path().filename().string());
  }
  if (error) return Internal("cannot list " + directory + ": " + error.message());
  std::sort(weights.begin(), weights.end());
  Sha256 hash;
  for (const char* name : {"config.json", "kv_calibration.json"}) {
    RETURN_IF_ERROR(AddFile(directory, name, &hash));
  }
  RETURN_IF_ERROR(
      AddFile(tokenizer_directory.empty() ? directory : tokenizer_directory, "tokenizer.json", &hash));
  for (const std::string& name : weights) RETURN_IF_ERROR(AddFile(directory, name, &hash));
  std::string hex;
  for (const uint8_t byte : hash.Finish()) hex += fmt::format("{:02x}", byte);
  return hex;
}

}  // namespace triaxial
