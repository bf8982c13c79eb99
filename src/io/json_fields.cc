#include "io/json_fields.h"

#include <utility>

namespace triaxial {
namespace {

std::string Range(double lo, double hi) {
  return "from " + DumpJsonLikePython(lo) + " to " + DumpJsonLikePython(hi);
}

std::string Range(int64_t lo, int64_t hi) {
  return "from " + std::to_string(lo) + " to " + std::to_string(hi);
}

std::string AnInteger(int64_t lo, int64_t hi) {
  return lo == hi ? std::to_string(lo) : "an integer " + Range(lo, hi);
}

// Integers above 2^63 - 1 are unsigned in the DOM and are never in range.
bool IsIntIn(const Json& value, int64_t lo, int64_t hi) {
  if (!value.is_number_integer()) return false;
  if (value.is_number_unsigned() && value.get<uint64_t>() > static_cast<uint64_t>(INT64_MAX)) return false;
  const int64_t number = value.get<int64_t>();
  return lo <= number && number <= hi;
}

bool IsNumberIn(const Json& value, double lo, double hi) {
  return value.is_number() && lo <= value.get<double>() && value.get<double>() <= hi;
}

}  // namespace

JsonFields::JsonFields(const Json& object, std::string path, std::string prefix)
    : object_(&object), path_(std::move(path)), prefix_(std::move(prefix)) {}

const Json* JsonFields::Find(const char* key) const {
  const auto it = object_->find(key);
  return it == object_->end() || it->is_null() ? nullptr : &*it;
}

Status JsonFields::Wrong(const char* key, const std::string& expected) const {
  constexpr size_t kMaxShown = 80;
  const Json* value = Find(key);
  std::string found = value == nullptr ? "nothing" : DumpJsonLikePython(*value);
  if (found.size() > kMaxShown) found = found.substr(0, kMaxShown) + "...";
  return InvalidArgument(path_ + ": " + prefix_ + key + " must be " + expected + ", found " + found);
}

Status JsonFields::Int(const char* key, int64_t lo, int64_t hi, int64_t* out, Presence presence) const {
  const Json* value = Find(key);
  if (value == nullptr && presence == Presence::kOptional) return OkStatus();
  if (value == nullptr || !IsIntIn(*value, lo, hi)) return Wrong(key, AnInteger(lo, hi));
  *out = value->get<int64_t>();
  return OkStatus();
}

Status JsonFields::Int(const char* key, int64_t lo, int64_t hi, int* out, Presence presence) const {
  int64_t wide = *out;
  RETURN_IF_ERROR(Int(key, lo, hi, &wide, presence));
  *out = static_cast<int>(wide);
  return OkStatus();
}

Status JsonFields::Number(const char* key, double lo, double hi, double* out, Presence presence) const {
  const Json* value = Find(key);
  if (value == nullptr && presence == Presence::kOptional) return OkStatus();
  if (value == nullptr || !IsNumberIn(*value, lo, hi)) return Wrong(key, "a number " + Range(lo, hi));
  *out = value->get<double>();
  return OkStatus();
}

Status JsonFields::Number(const char* key, double lo, double hi, float* out, Presence presence) const {
  double wide = *out;
  RETURN_IF_ERROR(Number(key, lo, hi, &wide, presence));
  *out = static_cast<float>(wide);
  return OkStatus();
}

Status JsonFields::Bool(const char* key, bool* out, Presence presence) const {
  const Json* value = Find(key);
  if (value == nullptr && presence == Presence::kOptional) return OkStatus();
  if (value == nullptr || !value->is_boolean()) return Wrong(key, "true or false");
  *out = value->get<bool>();
  return OkStatus();
}

Status JsonFields::String(const char* key, std::string* out, Presence presence) const {
  const Json* value = Find(key);
  if (value == nullptr && presence == Presence::kOptional) return OkStatus();
  if (value == nullptr || !value->is_string()) return Wrong(key, "a string");
  *out = value->get<std::string>();
  return OkStatus();
}

Status JsonFields::Ints(const char* key, int64_t lo, int64_t hi, std::vector<int>* out,
                        Presence presence) const {
  const Json* value = Find(key);
  if (value == nullptr && presence == Presence::kOptional) return OkStatus();
  const std::string expected = "a list of integers " + Range(lo, hi);
  if (value == nullptr || !value->is_array()) return Wrong(key, expected);
  std::vector<int> numbers;
  for (const Json& item : *value) {
    if (!IsIntIn(item, lo, hi)) return Wrong(key, expected);
    numbers.push_back(static_cast<int>(item.get<int64_t>()));
  }
  *out = std::move(numbers);
  return OkStatus();
}

Status JsonFields::Triple(const char* key, double lo, double hi, std::array<float, 3>* out,
                          Presence presence) const {
  const Json* value = Find(key);
  if (value == nullptr && presence == Presence::kOptional) return OkStatus();
  const std::string expected = "three numbers " + Range(lo, hi);
  if (value == nullptr || !value->is_array() || value->size() != 3) return Wrong(key, expected);
  for (const Json& item : *value) {
    if (!IsNumberIn(item, lo, hi)) return Wrong(key, expected);
  }
  for (size_t i = 0; i < 3; ++i) (*out)[i] = (*value)[i].get<float>();
  return OkStatus();
}

Result<JsonFields> JsonFields::Object(const char* key) const {
  const Json* value = Find(key);
  if (value == nullptr || !value->is_object()) return Wrong(key, "an object");
  return JsonFields(*value, path_, prefix_ + key + ".");
}

}  // namespace triaxial
