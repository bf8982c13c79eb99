// Who asks: API keys, the tenant that each stands for, and the salt under which a tenant's blocks are shared.
#ifndef TRIAXIAL_SERVE_API_KEYS_H_
#define TRIAXIAL_SERVE_API_KEYS_H_

#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/status.h"

namespace triaxial {

// One key a line; empty lines and lines that begin with # are skipped. InvalidArgument if there is none.
Result<std::vector<std::string>> LoadApiKeys(const std::string& path);

class ApiKeys {
 public:
  explicit ApiKeys(const std::vector<std::string>& keys);
  bool empty() const { return tenants_.empty(); }
  // The tenant behind an Authorization header: a name that follows from the key and does not give it away,
  // the same in every run; "" for everybody where there are no keys. Nothing for a missing or wrong key.
  std::optional<std::string> Tenant(std::string_view authorization) const;

 private:
  std::vector<std::pair<std::string, std::string>> tenants_;  // by key
};

// Differs whenever the tenant or the request's cache_salt differs, whatever characters they hold.
std::string SaltOf(std::string_view tenant, std::string_view cache_salt);

}  // namespace triaxial

#endif  // TRIAXIAL_SERVE_API_KEYS_H_
