// Hostile weights: each file has one defect and one expected error; then random damage, which may be refused
// or not, but must never be read out of bounds (the sanitizer build watches).
#include <gtest/gtest.h>

#include <random>

#include "io/checkpoint_testing.h"
#include "io/safetensors.h"

namespace triaxial {
namespace {

constexpr const char* kFile = "model.safetensors";
constexpr const char* kIndex = "model.safetensors.index.json";

// The whole path of a checkpoint: open, then read every byte of every tensor.
Status OpenAndRead(const std::string& directory) {
  ASSIGN_OR_RETURN(const Checkpoint checkpoint, Checkpoint::Open(directory));
  for (const auto& [name, view] : checkpoint.tensors()) {
    ASSIGN_OR_RETURN(const TensorView found, checkpoint.Get(name, view.shape));
    std::vector<float> values(static_cast<size_t>(found.elements));
    CopyToF32(found, values.data());
  }
  return OkStatus();
}

struct Hostile {
  const char* what;
  std::string bytes;
  Code code;
  const char* message;  // a part that tells this error from every other
};

std::string Zeros(size_t n) { return std::string(n, '\0'); }

// One F32 tensor "t" of four elements, with this dtype, shape and offsets, before `data_bytes` bytes.
std::string One(const std::string& dtype, const std::string& shape, const std::string& offsets,
                size_t data_bytes = 16) {
  return SafetensorsFile(
      R"({"t":{"dtype":)" + dtype + R"(,"shape":)" + shape + R"(,"data_offsets":)" + offsets + "}}",
      Zeros(data_bytes));
}

std::string Two(const std::string& first_offsets, const std::string& second_offsets, size_t data_bytes) {
  return SafetensorsFile(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":)" + first_offsets +
                             R"(},"b":{"dtype":"F32","shape":[2],"data_offsets":)" + second_offsets + "}}",
                         Zeros(data_bytes));
}

std::vector<Hostile> HostileFiles() {
  const std::string good = One(R"("F32")", "[4]", "[0,16]");
  const std::string f32 = R"("F32")";
  const Code bad = Code::kInvalidArgument;
  const Code cut = Code::kDataLoss;
  return {
      {"no bytes", "", cut, "expected at least 8 bytes, found 0"},
      {"half a length", good.substr(0, 7), cut, "expected at least 8 bytes, found 7"},
      {"a length and nothing else", good.substr(0, 8), cut, "its header takes"},
      {"half a header", good.substr(0, 30), cut, "its header takes"},
      {"header without data", good.substr(0, good.size() - 16), cut, "16 bytes of tensors, the file has 0"},
      {"one byte short", good.substr(0, good.size() - 1), cut, "16 bytes of tensors, the file has 15"},
      {"one byte more", good + "x", bad, "1 bytes behind the last tensor"},
      {"header length 2^64 - 1", LittleEndian64(UINT64_MAX) + good, bad, "18446744073709551615 bytes"},
      {"header length that wraps with the prefix", LittleEndian64(UINT64_MAX - 7) + good, bad,
       "the limit is"},
      {"header length just above the limit", LittleEndian64(100'000'001) + good, bad,
       "the limit is 100000000"},
      {"header length within the limit, beyond the file", LittleEndian64(100'000'000) + good, cut,
       "truncated"},
      {"a ZIP archive", "PK\x03\x04" + Zeros(100), cut, "truncated"},
      {"empty header", SafetensorsFile("", ""), bad, "must begin with '{'"},
      {"header of spaces", SafetensorsFile("    ", ""), bad, "must begin with '{'"},
      {"header is an array", SafetensorsFile("[1,2]", ""), bad, "must begin with '{'"},
      {"header is cut inside", SafetensorsFile(R"({"t":{"dtype":"F32")", ""), bad, "not valid JSON"},
      {"two headers", SafetensorsFile("{}{}", ""), bad, "not valid JSON"},
      {"name is not UTF-8", SafetensorsFile("{\"\xff\xfe\":1}", ""), bad, "not valid JSON"},
      {"NUL in the header", SafetensorsFile(std::string("{\0}", 3), ""), bad, "not valid JSON"},
      {"number beyond double", SafetensorsFile(R"({"t":1e999})", ""), bad, "a number is out of range"},
      {"deep nesting", SafetensorsFile("{\"t\":" + std::string(100000, '['), ""), bad, "JSON"},
      {"deep nesting, closed",
       SafetensorsFile("{\"t\":" + std::string(100000, '[') + std::string(100000, ']') + "}", ""), bad,
       "nests deeper"},
      {"tensor is a number", SafetensorsFile(R"({"t":1})", ""), bad, R"(tensor "t" lacks a dtype)"},
      {"tensor is null", SafetensorsFile(R"({"t":null})", ""), bad, R"(tensor "t" lacks a dtype)"},
      {"no dtype", SafetensorsFile(R"({"t":{"shape":[4],"data_offsets":[0,16]}})", Zeros(16)), bad,
       "lacks a dtype"},
      {"dtype is a number", One("32", "[4]", "[0,16]"), bad, "lacks a dtype"},
      {"no shape", SafetensorsFile(R"({"t":{"dtype":"F32","data_offsets":[0,16]}})", Zeros(16)), bad,
       "lacks a shape"},
      {"shape is a number", One(f32, "4", "[0,16]"), bad, "lacks a shape"},
      {"negative dimension", One(f32, "[-4]", "[0,16]"), bad, "not an integer from 0"},
      {"fractional dimension", One(f32, "[4.0]", "[0,16]"), bad, "not an integer from 0"},
      {"dimension 2^63", One(f32, "[9223372036854775808]", "[0,16]"), bad, "not an integer from 0"},
      {"dimension 2^64", One(f32, "[18446744073709551616]", "[0,16]"), bad, "not an integer from 0"},
      {"no offsets", SafetensorsFile(R"({"t":{"dtype":"F32","shape":[4]}})", Zeros(16)), bad,
       "lacks data_offsets"},
      {"one offset", One(f32, "[4]", "[16]"), bad, "lacks data_offsets"},
      {"three offsets", One(f32, "[4]", "[0,16,16]"), bad, "lacks data_offsets"},
      {"negative offset", One(f32, "[4]", "[-16,0]"), bad, "lacks data_offsets"},
      {"fractional offset", One(f32, "[4]", "[0.0,16.0]"), bad, "lacks data_offsets"},
      {"offset 2^64", One(f32, "[4]", "[0,18446744073709551616]"), bad, "lacks data_offsets"},
      {"end before begin", Two("[0,8]", "[8,0]", 8), bad, R"(tensor "b" must begin at byte 8)"},
      {"end far beyond the file", One(f32, "[4611686018427387900]", "[0,18446744073709551600]"), cut,
       "18446744073709551600 bytes of tensors"},
      {"hole at the front", One(f32, "[4]", "[4,20]", 20), bad, R"(tensor "t" must begin at byte 0)"},
      {"hole in between", Two("[0,8]", "[12,20]", 20), bad, R"(tensor "b" must begin at byte 8)"},
      {"overlap", Two("[0,8]", "[4,12]", 12), bad, R"(tensor "b" must begin at byte 8)"},
      {"same bytes twice", Two("[0,8]", "[0,8]", 8), bad, R"(tensor "b" must begin at byte 8)"},
      {"fewer bytes than the shape", One(f32, "[5]", "[0,16]"), bad, "shape [5] does not fit its 16 bytes"},
      {"more bytes than the shape", One(f32, "[3]", "[0,16]"), bad, "shape [3] does not fit its 16 bytes"},
      {"bytes of another dtype", One(R"("BF16")", "[4]", "[0,16]"), bad, "does not fit its 16 bytes"},
      {"shape product wraps to the right size", One(f32, "[4294967296,4294967296,4]", "[0,0]", 0), bad,
       "does not fit its 0 bytes"},
      {"shape product wraps, then a zero",
       One(f32, "[9223372036854775807,9223372036854775807,0]", "[0,0]", 0), bad, "does not fit its 0 bytes"},
      {"name twice",
       SafetensorsFile(R"({"t":{"dtype":"F32","shape":[4],"data_offsets":[0,16]},)"
                       R"("t":{"dtype":"F32","shape":[4],"data_offsets":[0,16]}})",
                       Zeros(16)),
       bad, R"(names "t" twice)"},
      {"shape twice",
       SafetensorsFile(R"({"t":{"dtype":"F32","shape":[9],"shape":[4],"data_offsets":[0,16]}})", Zeros(16)),
       bad, R"(names "shape" twice)"},
      {"name with line breaks and of endless length",
       SafetensorsFile("{\"" + std::string("\\n\\u0000") + std::string(100000, 'x') + "\":1}", ""), bad,
       R"(tensor "\n\u0000xxx)"},
  };
}

TEST(HostileSafetensors, EachDefectIsNamedInOneLine) {
  for (const Hostile& hostile : HostileFiles()) {
    SCOPED_TRACE(hostile.what);
    const TempDir dir;
    dir.Write(kFile, hostile.bytes);
    const Status status = OpenAndRead(dir.path());
    ASSERT_FALSE(status.ok());
    EXPECT_EQ(status.code(), hostile.code) << status.message();
    EXPECT_TRUE(status.message().starts_with(dir.File(kFile))) << status.message();
    EXPECT_NE(status.message().find(hostile.message), std::string::npos) << status.message();
    EXPECT_EQ(status.message().find('\n'), std::string::npos);
    EXPECT_LT(status.message().size(), 500u);
  }
  EXPECT_GE(HostileFiles().size(), 35u);
}

TEST(HostileSafetensors, OddButValidFilesAreRead) {
  for (const std::string& bytes :
       {SafetensorsFile("{}", ""), SafetensorsFile("{}      ", ""),
        SafetensorsFile(R"({"__metadata__":{"a":"b"}})", ""),
        One(R"("F32")", "[0,9223372036854775807]", "[0,0]", 0),
        One(R"("F4_OF_THE_FUTURE")", "[32]", "[0,16]"), One(R"("F32")", "[1,1,1,1,1,1,1,1,1,4]", "[0,16]")}) {
    const TempDir dir;
    dir.Write(kFile, bytes);
    EXPECT_EQ(OpenAndRead(dir.path()).message(), "");
  }
}

TEST(HostileSafetensors, IndexCannotLeadOutOfItsDirectoryOrAstray) {
  const auto index = [](const std::string& shard_json) {
    return R"({"weight_map":{"t":)" + shard_json + "}}";
  };
  const struct {
    std::string index;
    Code code;
    const char* message;
  } cases[] = {
      {"", Code::kInvalidArgument, "not valid JSON"},
      {"[]", Code::kInvalidArgument, "must be a JSON object"},
      {"{}", Code::kInvalidArgument, "weight_map must be an object"},
      {R"({"weight_map":[]})", Code::kInvalidArgument, "weight_map must be an object"},
      {R"({"weight_map":{}})", Code::kInvalidArgument, "weight_map must be an object"},
      {R"({"weight_map":{"t":"good.safetensors","t":"other.safetensors"}})", Code::kInvalidArgument,
       R"(names "t" twice)"},
      {index("1"), Code::kInvalidArgument, "found number"},
      {index("null"), Code::kInvalidArgument, "found null"},
      {index(R"("")"), Code::kInvalidArgument, R"(found "")"},
      {index(R"(".")"), Code::kInvalidArgument, R"(found ".")"},
      {index(R"("..")"), Code::kInvalidArgument, R"(found "..")"},
      {index(R"("/etc/passwd")"), Code::kInvalidArgument, R"(found "/etc/passwd")"},
      {index(R"("../good.safetensors")"), Code::kInvalidArgument, R"(found "../good.safetensors")"},
      {index(R"("sub/../good.safetensors")"), Code::kInvalidArgument, "name of a file in the same directory"},
      {index(R"("good.safetensors\u0000.png")"), Code::kInvalidArgument,
       "name of a file in the same directory"},
      {index(R"("absent.safetensors")"), Code::kNotFound, "absent.safetensors: No such file"},
      {index(R"("directory")"), Code::kInvalidArgument, "directory is not a regular file"},
      {index(R"("text.safetensors")"), Code::kDataLoss, "text.safetensors is truncated"},
      {R"({"weight_map":{"u":"good.safetensors"}})", Code::kInvalidArgument, R"(places tensor "u")"},
  };
  for (const auto& hostile : cases) {
    SCOPED_TRACE(hostile.index);
    const TempDir dir;
    dir.Write("good.safetensors", One(R"("F32")", "[4]", "[0,16]"));
    dir.Write("text.safetensors", "hello");
    std::filesystem::create_directory(dir.File("directory"));
    dir.Write(kIndex, hostile.index);
    const Status status = OpenAndRead(dir.path());
    ASSERT_FALSE(status.ok());
    EXPECT_EQ(status.code(), hostile.code) << status.message();
    EXPECT_NE(status.message().find(hostile.message), std::string::npos) << status.message();
    dir.Write(kIndex, index(R"("good.safetensors")"));
    EXPECT_EQ(OpenAndRead(dir.path()).message(), "");
  }
}

// A file with every dtype, names that sort unlike their offsets, and metadata.
std::string Seed() {
  return SafetensorsFile(
      R"({"__metadata__":{"format":"pt"},"z":{"dtype":"BF16","shape":[3,2],"data_offsets":[0,12]},)"
      R"("a":{"dtype":"F32","shape":[2,2],"data_offsets":[12,28]},)"
      R"("m":{"dtype":"F16","shape":[5],"data_offsets":[28,38]},)"
      R"("i":{"dtype":"I64","shape":[1],"data_offsets":[38,46]}})",
      Zeros(46));
}

std::string Mutate(std::string bytes, std::mt19937* random) {
  const auto below = [random](size_t n) { return std::uniform_int_distribution<size_t>(0, n - 1)(*random); };
  static constexpr std::string_view kPieces[] = {"0",
                                                 "9",
                                                 "-",
                                                 "18446744073709551615",
                                                 "9223372036854775808",
                                                 "[",
                                                 "]",
                                                 "{",
                                                 "}",
                                                 ",",
                                                 ":",
                                                 "\"",
                                                 "null",
                                                 "[0,16]",
                                                 "\"F32\"",
                                                 "\"BF16\"",
                                                 "shape",
                                                 "data_offsets",
                                                 "e9",
                                                 ".5",
                                                 "\\u0000",
                                                 "\xff"};
  for (size_t edits = 1 + below(2); edits > 0 && !bytes.empty(); --edits) {
    const size_t at = below(bytes.size());
    switch (below(5)) {
      case 0:
        bytes[at] = static_cast<char>(below(256));
        break;
      case 1:
        bytes.insert(at, kPieces[below(std::size(kPieces))]);
        break;
      case 2:
        bytes.erase(at, 1 + below(8));
        break;
      case 3:
        bytes.resize(at);
        break;
      case 4:
        bytes.insert(at, bytes.substr(below(bytes.size()), below(32)));
        break;
    }
  }
  return bytes;
}

TEST(HostileSafetensors, RandomDamageIsSurvived) {
  std::mt19937 random(20240);
  const std::string seed = Seed();
  const std::string header = seed.substr(8, seed.size() - 8 - 46);
  int read = 0;
  int refused = 0;
  const TempDir dir;
  for (int i = 0; i < 6000; ++i) {
    // Half of the time the length stays true, so that the damage reaches the header's meaning.
    const std::string bytes =
        i % 2 == 0 ? Mutate(seed, &random) : SafetensorsFile(Mutate(header, &random), Zeros(46));
    dir.Write(kFile, bytes);
    const Status status = OpenAndRead(dir.path());
    (status.ok() ? read : refused) += 1;
    EXPECT_EQ(status.message().find('\n'), std::string::npos) << status.message();
  }
  // Damage to names or data leaves a valid file; most other damage does not.
  EXPECT_GT(read, 100);
  EXPECT_GT(refused, 3000);
}

}  // namespace
}  // namespace triaxial
