#ifndef TRIAXIAL_SERVE_BASE64_H_
#define TRIAXIAL_SERVE_BASE64_H_

#include <optional>
#include <string>
#include <string_view>

namespace triaxial {

// RFC 4648, with or without padding; white space is skipped. nullopt if malformed.
std::optional<std::string> DecodeBase64(std::string_view text);
std::string EncodeBase64(std::string_view bytes);

}  // namespace triaxial

#endif  // TRIAXIAL_SERVE_BASE64_H_
