// Messages from any thread to the engine thread, and the queue's limit.
//
// An API key may hold as many places in the queue as are free (Choudhury and Hahne, "Dynamic queue length
// thresholds", 1998): one alone half of them, two a third each, so that there is always room for one who
// comes new. Nobody who waits is ever sent away. Without keys there is nobody to keep room for.
#ifndef TRIAXIAL_ENGINE_MAILBOX_H_
#define TRIAXIAL_ENGINE_MAILBOX_H_

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <future>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <utility>
#include <vector>

#include "base/status.h"
#include "engine/request_state.h"

namespace triaxial {

struct Inspection {
  RequestId id;
  std::promise<std::vector<KvBlock>> blocks;
};

struct Mail {
  std::vector<std::promise<Status>> checks;
  std::vector<std::unique_ptr<RequestState>> submitted;  // by growing id
  std::vector<RequestId> cancelled;
  std::vector<Inspection> inspections;
  bool cancel_all = false;
};

class Mailbox {
 public:
  explicit Mailbox(int32_t max_queued) : max_queued_(max_queued) {}

  // For clients; all thread-safe. Submit gives the request its id; ResourceExhausted if there is no place in
  // the queue for its tenant, Unavailable after Close.
  Result<RequestId> Submit(std::unique_ptr<RequestState> request);
  void Cancel(RequestId id);
  std::future<std::vector<KvBlock>> Inspect(RequestId id);
  std::future<Status> Check();
  // Refuses new requests from now on.
  void Close();
  void CancelAll();
  // Closes, cancels all and lets Wait return false.
  void Stop();
  // Until the engine thread sleeps with nothing left to do; false if `seconds` passed before that.
  bool WaitUntilIdle(double seconds);

  // For the engine thread. has_mail is cheap enough for every step.
  bool has_mail() const { return has_mail_; }
  // Swaps what arrived with the (empty) vectors of `mail`.
  void Take(Mail* mail);
  // Sleeps until there is mail; false: the engine shall end.
  bool Wait();
  // A request of this tenant left the queue, to run or to end.
  void LeaveQueue(const std::string& tenant);

 private:
  template <typename Change>
  void Post(const Change& change);

  const int32_t max_queued_;
  std::mutex mutex_;  // guards all below
  std::condition_variable wake_;
  std::condition_variable idle_changed_;
  Mail mail_;
  RequestId next_id_ = 1;
  bool closed_ = false;
  bool stop_ = false;
  bool idle_ = false;
  std::atomic<bool> has_mail_ = false;  // written under the lock
  int32_t queued_ = 0;                  // requests that were never admitted
  std::map<std::string, int32_t> queued_by_tenant_;
};

}  // namespace triaxial

#endif  // TRIAXIAL_ENGINE_MAILBOX_H_
