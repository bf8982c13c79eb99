#include "base/json.h"

#include <array>
#include <charconv>
#include <cmath>

#include "base/file.h"

namespace triaxial {
namespace {

constexpr int kMaxDepth = 128;
constexpr int kMaxFileKeys = 16384;

void AppendQuoted(const std::string& text, std::string* out) {
  // nlohmann escapes as Python does when ensure_ascii is off, except for DEL, which neither escapes.
  *out += Json(text).dump(-1, ' ', false, Json::error_handler_t::replace);
}

// Python prints floats by repr(): shortest digits that round-trip, exponent from 1e16 on and below 1e-4.
void AppendFloat(double value, std::string* out) {
  if (std::isnan(value)) {
    *out += "NaN";
    return;
  }
  if (std::isinf(value)) {
    *out += value > 0 ? "Infinity" : "-Infinity";
    return;
  }
  const double magnitude = std::fabs(value);
  const bool scientific = magnitude != 0 && (magnitude >= 1e16 || magnitude < 1e-4);
  char buffer[64];
  const auto end = std::to_chars(buffer, buffer + sizeof(buffer), value,
                                 scientific ? std::chars_format::scientific : std::chars_format::fixed);
  std::string digits(buffer, end.ptr);
  if (!scientific && digits.find('.') == std::string::npos) digits += ".0";
  *out += digits;
}

void Append(const Json& json, std::string* out) {
  switch (json.type()) {
    case Json::value_t::object: {
      *out += '{';
      bool first = true;
      for (const auto& [key, value] : json.items()) {
        if (!first) *out += ", ";
        first = false;
        AppendQuoted(key, out);
        *out += ": ";
        Append(value, out);
      }
      *out += '}';
      return;
    }
    case Json::value_t::array: {
      *out += '[';
      bool first = true;
      for (const Json& value : json) {
        if (!first) *out += ", ";
        first = false;
        Append(value, out);
      }
      *out += ']';
      return;
    }
    case Json::value_t::string:
      AppendQuoted(json.get_ref<const std::string&>(), out);
      return;
    case Json::value_t::number_float:
      AppendFloat(json.get<double>(), out);
      return;
    default:
      *out += json.dump();
      return;
  }
}

}  // namespace

Result<Json> ParseJson(std::string_view text, std::string_view what, int max_keys) {
  bool too_deep = false, too_many = false;
  std::array<int, kMaxDepth + 2> keys{};  // of the object that is open at each depth
  const auto limit = [&](int depth, Json::parse_event_t event, Json&) {
    too_deep = too_deep || depth > kMaxDepth;
    if (!too_deep && event == Json::parse_event_t::object_start) keys[static_cast<size_t>(depth) + 1] = 0;
    if (!too_deep && event == Json::parse_event_t::key)
      too_many = too_many || ++keys[static_cast<size_t>(depth)] > max_keys;
    // What is dropped costs neither memory nor time; the whole document is refused below.
    return !too_deep && !too_many;
  };
  try {
    Json json = Json::parse(text.begin(), text.end(), limit);
    if (too_deep) {
      return InvalidArgument(std::string(what) + " nests JSON deeper than " + std::to_string(kMaxDepth) +
                             " levels");
    }
    if (too_many) {
      return InvalidArgument(std::string(what) + " has an object with more than " + std::to_string(max_keys) +
                             " keys");
    }
    return json;
  } catch (const Json::exception& error) {
    std::string reason = error.what();
    // Drop the library's own "[json.exception.parse_error.101] " prefix: it says nothing to a user.
    if (const size_t end = reason.find("] "); reason.starts_with('[') && end != std::string::npos) {
      reason.erase(0, end + 2);
    }
    return InvalidArgument(std::string(what) + " is not valid JSON: " + reason);
  }
}

Result<Json> ReadJsonFile(const std::string& path, size_t max_bytes) {
  ASSIGN_OR_RETURN(const std::string text, ReadFile(path, max_bytes));
  return ParseJson(text, path, kMaxFileKeys);
}

std::string DumpJsonLikePython(const Json& json) {
  std::string out;
  Append(json, &out);
  return out;
}

}  // namespace triaxial
