// Errors that a client, a file or the machine can cause travel as Status or Result<T>; CHECK (check.h) is for
// our own bugs.
#ifndef TRIAXIAL_BASE_STATUS_H_
#define TRIAXIAL_BASE_STATUS_H_

#include <optional>
#include <string>
#include <utility>

#include "base/check.h"

namespace triaxial {

enum class Code {
  kOk = 0,
  kInvalidArgument,    // the caller's data is wrong; HTTP 400
  kNotFound,           // a file, model, tensor or id does not exist; HTTP 404
  kTooLarge,           // a limit on bytes, pixels or tokens was passed; HTTP 413 (400 for tokens)
  kDataLoss,           // a file is truncated or corrupt
  kResourceExhausted,  // memory or queue is full; HTTP 429
  kUnavailable,        // shutting down or not ready; HTTP 503
  kDeadlineExceeded,   // the caller's time-out passed; HTTP 504
  kCancelled,          // the client gave up
  kInternal,           // the machine failed us (I/O error, out of memory); HTTP 500
};

// A code and one sentence that says what was wrong, where, and what to do.
class [[nodiscard]] Status {
 public:
  Status() = default;
  Status(Code code, std::string message) : code_(code), message_(std::move(message)) {}
  bool ok() const { return code_ == Code::kOk; }
  Code code() const { return code_; }
  const std::string& message() const { return message_; }

 private:
  Code code_ = Code::kOk;
  std::string message_;
};

inline Status OkStatus() { return {}; }
inline Status InvalidArgument(std::string m) { return {Code::kInvalidArgument, std::move(m)}; }
inline Status NotFound(std::string m) { return {Code::kNotFound, std::move(m)}; }
inline Status TooLarge(std::string m) { return {Code::kTooLarge, std::move(m)}; }
inline Status DataLoss(std::string m) { return {Code::kDataLoss, std::move(m)}; }
inline Status ResourceExhausted(std::string m) { return {Code::kResourceExhausted, std::move(m)}; }
inline Status Unavailable(std::string m) { return {Code::kUnavailable, std::move(m)}; }
inline Status DeadlineExceeded(std::string m) { return {Code::kDeadlineExceeded, std::move(m)}; }
inline Status Cancelled(std::string m) { return {Code::kCancelled, std::move(m)}; }
inline Status Internal(std::string m) { return {Code::kInternal, std::move(m)}; }

// Either a value or the Status that says why there is none.
template <typename T>
class [[nodiscard]] Result {
 public:
  Result(T value) : value_(std::move(value)) {}                                 // NOLINT: implicit by design
  Result(Status status) : status_(std::move(status)) { CHECK(!status_.ok()); }  // NOLINT: implicit by design
  bool ok() const { return value_.has_value(); }
  const Status& status() const { return status_; }
  T& value() & {
    CHECK(ok());
    return *value_;
  }
  const T& value() const& {
    CHECK(ok());
    return *value_;
  }
  T&& value() && {
    CHECK(ok());
    return std::move(*value_);
  }
  T* operator->() { return &value(); }
  const T* operator->() const { return &value(); }
  T& operator*() & { return value(); }
  const T& operator*() const& { return value(); }
  T&& operator*() && { return std::move(*this).value(); }

 private:
  std::optional<T> value_;
  Status status_;
};

// RETURN_IF_ERROR(expr): expr yields a Status.  ASSIGN_OR_RETURN(auto x, expr): expr yields a Result.
#define RETURN_IF_ERROR(expr)                                               \
  do {                                                                      \
    if (::triaxial::Status _status = (expr); !_status.ok()) return _status; \
  } while (0)
#define TRIAXIAL_CONCAT_(a, b) a##b
#define TRIAXIAL_CONCAT(a, b) TRIAXIAL_CONCAT_(a, b)
#define ASSIGN_OR_RETURN(lhs, expr) ASSIGN_OR_RETURN_(TRIAXIAL_CONCAT(_result_, __LINE__), lhs, expr)
#define ASSIGN_OR_RETURN_(tmp, lhs, expr) \
  auto tmp = (expr);                      \
  if (!tmp.ok()) return tmp.status();     \
  lhs = std::move(tmp).value()

}  // namespace triaxial

#endif  // TRIAXIAL_BASE_STATUS_H_
