// Which engine request an answer's id stands for, and whose it is: for GET /v1/kv/{id}.
#ifndef TRIAXIAL_SERVE_COMPLETION_IDS_H_
#define TRIAXIAL_SERVE_COMPLETION_IDS_H_

#include <cstddef>
#include <deque>
#include <mutex>
#include <optional>
#include <string>
#include <unordered_map>

#include "engine/request.h"

namespace triaxial {

// Remembers the newest ones only. Thread-safe.
class CompletionIds {
 public:
  static constexpr size_t kKept = 1024;

  void Add(const std::string& id, const std::string& tenant, RequestId request);
  // Nothing for an unknown or forgotten id, and for another tenant's.
  std::optional<RequestId> Find(const std::string& id, const std::string& tenant) const;

 private:
  struct Entry {
    std::string tenant;
    RequestId request;
  };
  mutable std::mutex mutex_;  // guards all below
  std::unordered_map<std::string, Entry> entries_;
  std::deque<std::string> order_;  // oldest first
};

}  // namespace triaxial

#endif  // TRIAXIAL_SERVE_COMPLETION_IDS_H_
