#include "kv/calibration.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <limits>
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
constexpr std::array<const char*, 3> kOptionalFields = {"gain_k2", "gain_v2", "value_equalization"};

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
  // What does not fit a float is out of range; of what does, the float counts, as it is written shortest.
  constexpr double kLargest = std::numeric_limits<float>::max();
  const double number = value.is_number() ? value.get<double>() : NAN;
  *out = std::abs(number) <= kLargest ? static_cast<float>(number) : NAN;
  if (!(*out >= lo && *out <= hi)) {
    return Wrong(path, field, fmt::format("a number from {} to {}", lo, hi), Shown(value));
  }
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

Status ReadFactors(const std::string& path, const std::string& name, const Json& layers, int num_layers,
                   size_t count, const char* what, std::vector<std::vector<float>>* out) {
  if (!layers.is_array() || layers.size() != static_cast<size_t>(num_layers)) {
    return Wrong(path, name, fmt::format("a list of {} layers", num_layers),
                 layers.is_array() ? fmt::format("{} layers", layers.size()) : Shown(layers));
  }
  for (size_t layer = 0; layer < layers.size(); ++layer) {
    const Json& factors = layers[layer];
    const std::string field = fmt::format("{}[{}]", name, layer);
    if (!factors.is_array() || factors.size() != count) {
      return Wrong(path, field, fmt::format("a list of {} factors ({})", count, what),
                   factors.is_array() ? fmt::format("{} factors", factors.size()) : Shown(factors));
    }
    std::vector<float>& row = out->emplace_back(count);
    for (size_t i = 0; i < count; ++i) {
      RETURN_IF_ERROR(ReadNumber(path, fmt::format("{}[{}]", field, i), factors[i], kMinEqualization,
                                 kMaxEqualization, &row[i]));
    }
  }
  return OkStatus();
}

Status ExpectPowersOfTwo(const std::string& path, const std::vector<std::vector<float>>& layers) {
  for (size_t layer = 0; layer < layers.size(); ++layer) {
    for (size_t i = 0; i < layers[layer].size(); ++i) {
      int exponent;
      if (std::frexp(layers[layer][i], &exponent) == 0.5f) continue;
      return Wrong(path, fmt::format("value_equalization[{}][{}]", layer, i), "a power of two",
                   fmt::format("{}", layers[layer][i]));
    }
  }
  return OkStatus();
}

Json FactorsJson(const std::vector<std::vector<float>>& layers) {
  Json json = Json::array();
  for (const std::vector<float>& factors : layers) {
    Json row = Json::array();
    for (const float factor : factors) row.push_back(Shortest(factor));
    json.push_back(std::move(row));
  }
  return json;
}

}  // namespace

Result<KvCalibration> LoadKvCalibration(const std::string& directory, int num_layers, int num_kv_heads,
                                        int head_dim) {
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

  RETURN_IF_ERROR(ReadFactors(path, "key_equalization", json["key_equalization"], num_layers,
                              static_cast<size_t>(head_dim / 2), "head_dim / 2",
                              &calibration.key_equalization));
  if (json.contains("value_equalization")) {
    RETURN_IF_ERROR(ReadFactors(path, "value_equalization", json["value_equalization"], num_layers,
                                static_cast<size_t>(num_kv_heads * head_dim), "KV heads * head_dim",
                                &calibration.value_equalization));
    RETURN_IF_ERROR(ExpectPowersOfTwo(path, calibration.value_equalization));
  }
  return calibration;
}

Status SaveKvCalibration(const std::string& path, const KvCalibration& calibration, int head_dim) {
  for (const auto& factors : calibration.key_equalization) {
    CHECK(factors.size() == static_cast<size_t>(head_dim / 2));
  }
  Json json;
  json["version"] = kVersion;
  json["head_dim"] = head_dim;
  json["key_equalization"] = FactorsJson(calibration.key_equalization);
  json["clip_k2"] = Shortest(calibration.clip.k2);
  json["clip_v2"] = Shortest(calibration.clip.v2);
  json["gain_k2"] = Shortest(calibration.clip.k2_gain);
  json["gain_v2"] = Shortest(calibration.clip.v2_gain);
  if (!calibration.value_equalization.empty()) {
    json["value_equalization"] = FactorsJson(calibration.value_equalization);
  }
  return WriteFile(path, DumpJsonLikePython(json) + "\n");
}

}  // namespace triaxial
