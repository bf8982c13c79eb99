#include "base/json.h"

#include <charconv>
#include <cmath>

#include "base/file.h"

namespace triaxial {
namespace {

constexpr int kMaxDepth = 128;

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

Result<Json> ParseJson(std::string_view text, std::string_view what) {
  bool too_deep = false;
  const auto limit_depth = [&too_deep](int depth, Json::parse_event_t, Json&) {
    if (depth > kMaxDepth) {
      too_deep = true;
      return false;  // the subtree is dropped, so memory stays bounded; the whole document is refused below
    }
    return true;
  };
  try {
    Json json = Json::parse(text.begin(), text.end(), limit_depth);
    if (too_deep) {
      return InvalidArgument(std::string(what) + " nests JSON deeper than " + std::to_string(kMaxDepth) +
                             " levels");
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
  return ParseJson(text, path);
}

std::string DumpJsonLikePython(const Json& json) {
  std::string out;
  Append(json, &out);
  return out;
}

}  // namespace triaxial
