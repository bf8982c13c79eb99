// JSON from files and clients: parsed with bounds, never trusted. Key order is kept, because prompts depend
// on it.
#ifndef TRIAXIAL_BASE_JSON_H_
#define TRIAXIAL_BASE_JSON_H_

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>

#include "base/status.h"

namespace triaxial {

using Json = nlohmann::ordered_json;

// Parses UTF-8 text. Errors (InvalidArgument) name `what` and the byte position: syntax, invalid UTF-8,
// nesting deeper than 128 levels, more than `max_keys` keys in one object (looking one up is linear, so an
// object with many would take quadratic time to build).
Result<Json> ParseJson(std::string_view text, std::string_view what, int max_keys = 1024);

// Reads and parses a file of at most `max_bytes`, with up to 16384 keys in an object. Errors: NotFound,
// TooLarge, InvalidArgument.
Result<Json> ReadJsonFile(const std::string& path, size_t max_bytes = size_t{256} << 20);

// Serializes as Python's json.dumps(ensure_ascii=False) does: ", " and ": " separators, keys in order. The
// chat templates print tools and arguments this way. Text that is not UTF-8 is written with U+FFFD.
std::string DumpJsonLikePython(const Json& json);

}  // namespace triaxial

#endif  // TRIAXIAL_BASE_JSON_H_
