#include "serve/api_keys.h"

#include <fmt/format.h>

#include <algorithm>

#include "base/file.h"
#include "base/sha256.h"

namespace triaxial {
namespace {

// Takes as long for a wrong key as for a right one.
bool SameSecret(std::string_view a, std::string_view b) {
  unsigned difference = a.size() == b.size() ? 0 : 1;
  for (size_t i = 0; i < a.size(); ++i) {
    difference |= static_cast<unsigned>(static_cast<uint8_t>(a[i]) ^
                                        static_cast<uint8_t>(b.empty() ? 0 : b[i % b.size()]));
  }
  return difference == 0;
}

// 64 bits name a key among the few of a server; half a digest says less about a weak key than all of it.
std::string TenantOfKey(std::string_view key) {
  const std::string text = "triaxial tenant " + std::string(key);
  const Sha256Digest digest = Sha256Of({reinterpret_cast<const uint8_t*>(text.data()), text.size()});
  std::string name;
  for (size_t i = 0; i < 8; ++i) name += fmt::format("{:02x}", digest[i]);
  return name;
}

}  // namespace

ApiKeys::ApiKeys(const std::vector<std::string>& keys) {
  for (const std::string& key : keys) tenants_.emplace_back(key, TenantOfKey(key));
}

std::optional<std::string> ApiKeys::Tenant(std::string_view authorization) const {
  if (tenants_.empty()) return "";
  constexpr std::string_view kScheme = "Bearer ";
  if (!authorization.starts_with(kScheme)) return std::nullopt;
  const std::string_view key = authorization.substr(kScheme.size());
  std::optional<std::string> tenant;
  for (const auto& [candidate, name] : tenants_) {
    if (SameSecret(key, candidate)) tenant = name;
  }
  return tenant;
}

std::string SaltOf(std::string_view tenant, std::string_view cache_salt) {
  return fmt::format("{}:{}{}", tenant.size(), tenant, cache_salt);
}

Result<std::vector<std::string>> LoadApiKeys(const std::string& path) {
  ASSIGN_OR_RETURN(const std::string text, ReadFile(path, size_t{1} << 20));
  std::vector<std::string> keys;
  size_t begin = 0;
  while (begin < text.size()) {
    const size_t end = std::min(text.find('\n', begin), text.size());
    std::string line = text.substr(begin, end - begin);
    begin = end + 1;
    while (!line.empty() && (line.back() == '\r' || line.back() == ' ' || line.back() == '\t'))
      line.pop_back();
    if (!line.empty() && line.front() != '#') keys.push_back(std::move(line));
  }
  if (keys.empty()) return InvalidArgument(path + " holds no API key; put one key on each line");
  return keys;
}

}  // namespace triaxial
