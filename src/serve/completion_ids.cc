#include "serve/completion_ids.h"

namespace triaxial {

void CompletionIds::Add(const std::string& id, const std::string& tenant, RequestId request) {
  const std::lock_guard lock(mutex_);
  if (!entries_.emplace(id, Entry{tenant, request}).second) return;
  order_.push_back(id);
  if (order_.size() > kKept) {
    entries_.erase(order_.front());
    order_.pop_front();
  }
}

std::optional<RequestId> CompletionIds::Find(const std::string& id, const std::string& tenant) const {
  const std::lock_guard lock(mutex_);
  const auto it = entries_.find(id);
  if (it == entries_.end() || it->second.tenant != tenant) return std::nullopt;
  return it->second.request;
}

}  // namespace triaxial
