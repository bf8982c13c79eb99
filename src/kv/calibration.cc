#include "kv/calibration.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <string_view>
#include <utility>

#include "base/check.h"
#include "base/file.h"
#include "base/json.h"

namespace triaxial {
namespace {

constexpr int kVersion = 1;
constexpr size_t kMaxFileBytes = size_t{64} << 20;
constexpr std::array<const char*, 5> kFields = {"version", "head_dim", "key_equalization", "clip_k2",
                                                "clip_v2"};
constexpr std::array<const char*, 2> kOptionalFields = {"gain_k2", "gain_v2"};

// A value as an error message shows it.
std::string Shown(const Json& value) {
  std::string text = DumpJsonLikePython(value);
  if (text.size() <= 60) return text;
  size_t end = 57;
  while ((text[end] & 0xc0) == 0x80) --end;  // between characters
  return text.substr(0, end) + "...";
}

Status Wrong(const std::string& path, std::string_view field, const std::string& expected,
             const std::string& found) {
  return InvalidArgument(fmt::format("{}: field '{}': expected {}, found {}.", path, field, expected, found));
}

Status ReadNumber(const std::string& path, const std::string& field, const Json& value, float lo, float hi,
                  float* out) {
  // Compared as double, so that what does not fit a float is out of range too.
  if (!value.is_number() || !(value.get<double>() >= double{lo} && value.get<double>() <= double{hi})) {
    return Wrong(path, field, fmt::format("a number from {} to {}", lo, hi), Shown(value));
  }
  *out = value.get<float>();
  return OkStatus();
}

Status ExpectInteger(const std::string& path, const char* field, const Json& value, int expected,
                     const char* why) {
  if (value.is_number_integer() && value == Json(expected)) return OkStatus();
  return Wrong(path, field, fmt::format("{}{}", expected, why), Shown(value));
}

// The double that prints as shortly as the float does.
double Shortest(float x) {
  std::array<char, 32> text;
  const auto end = std::to_chars(text.data(), text.data() + text.size(), x).ptr;
  double out = 0;
  std::from_chars(text.data(), end, out);
  return out;
}

}  // namespace

Result<KvCalibration> LoadKvCalibration(const std::string& directory, int num_layers, int head_dim) {
  const std::string path = directory + "/kv_calibration.json";
  auto read = ReadJsonFile(path, kMaxFileBytes);
  if (!read.ok() && read.status().code() == Code::kNotFound) return KvCalibration{};
  ASSIGN_OR_RETURN(const Json json, std::move(read));
  if (!json.is_object()) return InvalidArgument(path + ": expected an object, found " + Shown(json) + ".");
  for (const char* field : kFields) {
    if (!json.contains(field)) {
      return InvalidArgument(fmt::format("{}: field '{}' is missing.", path, field));
    }
  }
  for (const auto& [key, value] : json.items()) {
    if (std::find(kFields.begin(), kFields.end(), key) == kFields.end() &&
        std::find(kOptionalFields.begin(), kOptionalFields.end(), key) == kOptionalFields.end()) {
      return InvalidArgument(fmt::format("{}: unknown field '{}'; remove it.", path, key));
    }
  }
  RETURN_IF_ERROR(ExpectInteger(path, "version", json["version"], kVersion, ""));
  RETURN_IF_ERROR(ExpectInteger(path, "head_dim", json["head_dim"], head_dim, " as the checkpoint has"));

  KvCalibration calibration;
  calibration.calibrated = true;
  RETURN_IF_ERROR(ReadNumber(path, "clip_k2", json["clip_k2"], kMinClip, 1.0f, &calibration.clip.k2));
  RETURN_IF_ERROR(ReadNumber(path, "clip_v2", json["clip_v2"], kMinClip, 1.0f, &calibration.clip.v2));

  for (const auto& [field, gain] :
       {std::pair{"gain_k2", &calibration.clip.k2_gain}, std::pair{"gain_v2", &calibration.clip.v2_gain}}) {
    if (json.contains(field)) RETURN_IF_ERROR(ReadNumber(path, field, json[field], 1.0f, kMaxGain, gain));
  }

  const Json& layers = json["key_equalization"];
  if (!layers.is_array() || layers.size() != static_cast<size_t>(num_layers)) {
    return Wrong(path, "key_equalization", fmt::format("a list of {} layers", num_layers),
                 layers.is_array() ? fmt::format("{} layers", layers.size()) : Shown(layers));
  }
  const size_t pairs = static_cast<size_t>(head_dim / 2);
  for (size_t layer = 0; layer < layers.size(); ++layer) {
    const Json& factors = layers[layer];
    const std::string field = fmt::format("key_equalization[{}]", layer);
    if (!factors.is_array() || factors.size() != pairs) {
      return Wrong(path, field, fmt::format("a list of {} factors (head_dim / 2)", pairs),
                   factors.is_array() ? fmt::format("{} factors", factors.size()) : Shown(factors));
    }
    auto& out = calibration.key_equalization.emplace_back(pairs);
    for (size_t i = 0; i < pairs; ++i) {
      RETURN_IF_ERROR(ReadNumber(path, fmt::format("{}[{}]", field, i), factors[i], kMinEqualization,
                                 kMaxEqualization, &out[i]));
    }
  }
  return calibration;
}

Status SaveKvCalibration(const std::string& path, const KvCalibration& calibration, int head_dim) {
  Json layers = Json::array();
  for (const auto& factors : calibration.key_equalization) {
    CHECK(factors.size() == static_cast<size_t>(head_dim / 2));
    Json row = Json::array();
    for (const float factor : factors) row.push_back(Shortest(factor));
    layers.push_back(std::move(row));
  }
  Json json;
  json["version"] = kVersion;
  json["head_dim"] = head_dim;
  json["key_equalization"] = std::move(layers);
  json["clip_k2"] = Shortest(calibration.clip.k2);
  json["clip_v2"] = Shortest(calibration.clip.v2);
  json["gain_k2"] = Shortest(calibration.clip.k2_gain);
  json["gain_v2"] = Shortest(calibration.clip.v2_gain);
  return WriteFile(path, DumpJsonLikePython(json) + "\n");
}

}  // namespace triaxial
