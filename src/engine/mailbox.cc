#include "engine/mailbox.h"

#include <fmt/format.h>

#include <chrono>

#include "base/reserve.h"

namespace triaxial {

template <typename Change>
void Mailbox::Post(const Change& change) {
  const std::lock_guard lock(mutex_);
  change();
  has_mail_ = true;
  wake_.notify_one();
}

Result<RequestId> Mailbox::Submit(std::unique_ptr<RequestState> request) {
  const std::lock_guard lock(mutex_);
  if (closed_) return Unavailable("the server is shutting down; send the request elsewhere");
  const int32_t free = max_queued_ - queued_;
  if (free <= 0) {
    return ResourceExhausted(fmt::format("{} requests are waiting already; retry later", queued_));
  }
  ReserveAtLeast(&mail_.submitted, mail_.submitted.size() + 1);
  int32_t& own = queued_by_tenant_[request->tenant];
  if (!request->tenant.empty() && own >= free) {
    return ResourceExhausted(
        fmt::format("{} requests of this API key are waiting already, and the {} places that are left in the "
                    "queue are for others; retry later",
                    own, free));
  }
  ++own;
  const RequestId id = request->id = next_id_;
  mail_.submitted.push_back(std::move(request));
  ++next_id_;
  ++queued_;
  has_mail_ = true;
  wake_.notify_one();
  return id;
}

void Mailbox::LeaveQueue(const std::string& tenant) {
  const std::lock_guard lock(mutex_);
  --queued_;
  const auto own = queued_by_tenant_.find(tenant);
  if (--own->second == 0) queued_by_tenant_.erase(own);
}

void Mailbox::Cancel(RequestId id) {
  Post([&] { mail_.cancelled.push_back(id); });
}

std::future<std::vector<KvBlock>> Mailbox::Inspect(RequestId id) {
  Inspection inspection{id, {}};
  std::future<std::vector<KvBlock>> blocks = inspection.blocks.get_future();
  Post([&] { mail_.inspections.push_back(std::move(inspection)); });
  return blocks;
}

std::future<Status> Mailbox::Check() {
  std::promise<Status> check;
  std::future<Status> result = check.get_future();
  Post([&] { mail_.checks.push_back(std::move(check)); });
  return result;
}

void Mailbox::Close() {
  const std::lock_guard lock(mutex_);
  closed_ = true;
}

void Mailbox::CancelAll() {
  Post([&] { mail_.cancel_all = true; });
}

void Mailbox::Stop() {
  Post([&] { closed_ = stop_ = mail_.cancel_all = true; });
}

bool Mailbox::WaitUntilIdle(double seconds) {
  std::unique_lock lock(mutex_);
  return idle_changed_.wait_for(lock, std::chrono::duration<double>(seconds),
                                [this] { return idle_ && !has_mail_; });
}

void Mailbox::Take(Mail* mail) {
  const std::lock_guard lock(mutex_);
  std::swap(mail_, *mail);
  has_mail_ = false;
}

bool Mailbox::Wait() {
  std::unique_lock lock(mutex_);
  if (!has_mail_ && !stop_) {
    idle_ = true;
    idle_changed_.notify_all();
    wake_.wait(lock, [this] { return has_mail_ || stop_; });
    idle_ = false;
  }
  return has_mail_;
}

}  // namespace triaxial
