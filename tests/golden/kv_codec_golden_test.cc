// Stored bytes and the Hadamard transform against an independent NumPy implementation of docs/kv-format.md
// (tools/reference/kv_codec_reference.py), for the scalar codec and the one that the machine runs.
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "base/json.h"
#include "kv/codec.h"
#include "ops/kv_codec.h"

namespace triaxial {
namespace {

// The same values, bit for bit, as draw() of the script.
std::vector<float> Draw(const std::string& distribution, uint64_t seed, int tokens, int head_dim) {
  std::vector<float> x;
  uint64_t state = seed;
  for (int i = 0; i < tokens * head_dim; ++i) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    const uint32_t word = static_cast<uint32_t>(state >> 32);
    const float unit = static_cast<float>(static_cast<int32_t>(word >> 8) - (1 << 23)) * 0x1p-23f;
    const int channel = i % head_dim;
    if (distribution == "uniform") {
      x.push_back(unit);
    } else if (distribution == "outliers") {
      x.push_back(channel % 29 == 3 ? unit * 64.0f : unit);
    } else if (distribution == "offset") {
      x.push_back(std::floor(unit * 4096.0f) * 0x1p-12f + static_cast<float>(channel % 3));
    } else if (distribution == "grid") {
      x.push_back(std::floor(unit * 8.0f) * 0.5f);
    } else if (distribution == "tiny") {
      x.push_back(unit * 0x1p-22f);
    } else if (distribution == "huge") {
      x.push_back(unit * 0x1p100f);
    } else if (distribution == "constant") {
      x.push_back(x.empty() ? unit : x[0]);
    } else if (distribution == "zero") {
      x.push_back(word >> 31 == 1 ? -0.0f : 0.0f);
    } else if (distribution == "bits") {
      x.push_back(std::bit_cast<float>(word));
    } else {
      ADD_FAILURE() << "unknown distribution " << distribution;
    }
  }
  return x;
}

std::string Hex(const std::vector<uint8_t>& bytes) {
  constexpr char kDigits[] = "0123456789abcdef";
  std::string out;
  for (const uint8_t byte : bytes) {
    out += kDigits[byte >> 4];
    out += kDigits[byte & 15];
  }
  return out;
}

std::string Fnv1a64(const std::vector<uint8_t>& bytes) {
  uint64_t value = 0xcbf29ce484222325u;
  for (const uint8_t byte : bytes) value = (value ^ byte) * 0x100000001b3u;
  std::vector<uint8_t> big_endian;
  for (int shift = 56; shift >= 0; shift -= 8) big_endian.push_back(static_cast<uint8_t>(value >> shift));
  return Hex(big_endian);
}

Json Golden() {
  auto json = ReadJsonFile("tests/data/kv/codec_golden.json");
  if (!json.ok()) ADD_FAILURE() << json.status().message();
  return json.ok() ? *json : Json::object();
}

TEST(KvCodecGolden, BytesEqualTheReference) {
  const Json golden = Golden();
  ASSERT_GE(golden["cases"].size(), 190u);
  const std::pair<const char*, decltype(&EncodeBlock)> encoders[] = {{"scalar", &EncodeBlockScalar},
                                                                     {"simd", &EncodeBlock}};
  for (const Json& c : golden["cases"]) {
    const KvGeometry g{1, 1, c["head_dim"].get<int>(), *ParseCodec(c["codec"].get<std::string>())};
    const Format f = *ParseFormat(c["format"].get<std::string>());
    const int tokens = c["tokens"].get<int>();
    const uint64_t seed = c["seed"].get<uint64_t>();
    const ClipRatios clip{c["clip_k2"].get<float>(), c["clip_v2"].get<float>(), c.value("gain_k2", 1.0f),
                          c.value("gain_v2", 1.0f)};
    const auto k = Draw(c["distribution"].get<std::string>(), seed, tokens, g.head_dim);
    const auto v = Draw(c["distribution"].get<std::string>(), seed + 1, tokens, g.head_dim);
    const int capacity = c.value("capacity", kBlockTokens);
    ASSERT_EQ(c["size"].get<int>(), HeadBytes(g, f, capacity));
    for (const auto& [name, encode] : encoders) {
      std::vector<uint8_t> block(static_cast<size_t>(HeadBytes(g, f, capacity)), 0xcc);
      encode(g, f, clip, k.data(), v.data(), g.head_dim, tokens, block.data(), capacity);
      Json description = c;
      description.erase("bytes");
      SCOPED_TRACE(std::string(name) + " " + description.dump());
      if (c.contains("bytes")) {
        EXPECT_EQ(Hex(block), c["bytes"].get<std::string>());
      } else {
        EXPECT_EQ(Fnv1a64(block), c["fnv1a64"].get<std::string>());
      }
    }
  }
}

TEST(KvCodecGolden, HadamardEqualsTheReference) {
  const Json golden = Golden();
  ASSERT_GE(golden["hadamard"].size(), 6u);
  for (const Json& c : golden["hadamard"]) {
    const int head_dim = c["head_dim"].get<int>();
    const auto x = Draw(c["distribution"].get<std::string>(), c["seed"].get<uint64_t>(), 1, head_dim);
    auto scalar = x, simd = x;
    HadamardScalar(scalar.data(), head_dim);
    Hadamard(simd.data(), 1, head_dim);
    for (const auto& y : {scalar, simd}) {
      std::vector<uint8_t> bytes(y.size() * 4);
      std::copy_n(reinterpret_cast<const uint8_t*>(y.data()), bytes.size(), bytes.data());
      EXPECT_EQ(Hex(bytes), c["floats"].get<std::string>());
    }
  }
}

}  // namespace
}  // namespace triaxial
