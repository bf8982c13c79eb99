// Reads the fields of a JSON object from a file, each with its type and its range checked. Every error is one
// sentence that names file, field, what was expected and what was found.
#ifndef TRIAXIAL_IO_JSON_FIELDS_H_
#define TRIAXIAL_IO_JSON_FIELDS_H_

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "base/json.h"
#include "base/status.h"

namespace triaxial {

enum class Presence {
  kRequired,
  kOptional,  // the output keeps its value when the field is absent or null
};

// Refers to `object`, which must outlive it.
class JsonFields {
 public:
  // `path` is the file's, `prefix` the field that `object` is the value of, with its dot ("text_config."), or
  // empty.
  JsonFields(const Json& object, std::string path, std::string prefix = "");

  // Present and not null.
  bool Has(const char* key) const { return Find(key) != nullptr; }

  // All return InvalidArgument if a required field is absent, the type is wrong or the range [lo, hi] is
  // left.
  Status Int(const char* key, int64_t lo, int64_t hi, int64_t* out,
             Presence presence = Presence::kRequired) const;
  Status Int(const char* key, int64_t lo, int64_t hi, int* out,
             Presence presence = Presence::kRequired) const;
  Status Number(const char* key, double lo, double hi, double* out,
                Presence presence = Presence::kRequired) const;
  Status Number(const char* key, double lo, double hi, float* out,
                Presence presence = Presence::kRequired) const;
  Status Bool(const char* key, bool* out, Presence presence = Presence::kRequired) const;
  Status String(const char* key, std::string* out, Presence presence = Presence::kRequired) const;
  Status Ints(const char* key, int64_t lo, int64_t hi, std::vector<int>* out,
              Presence presence = Presence::kRequired) const;
  // Exactly three numbers.
  Status Triple(const char* key, double lo, double hi, std::array<float, 3>* out, Presence presence) const;
  // The object that is the value of `key`.
  Result<JsonFields> Object(const char* key) const;

  // "FILE: PREFIXkey must be EXPECTED, found VALUE".
  Status Wrong(const char* key, const std::string& expected) const;

 private:
  const Json* Find(const char* key) const;

  const Json* object_;
  std::string path_;
  std::string prefix_;
};

}  // namespace triaxial

#endif  // TRIAXIAL_IO_JSON_FIELDS_H_
