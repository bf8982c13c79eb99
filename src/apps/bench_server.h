// A `triaxial serve` of our own, as a child process: a benchmark then measures what users run, and its client
// shares nothing with the server but the socket.
#ifndef TRIAXIAL_APPS_BENCH_SERVER_H_
#define TRIAXIAL_APPS_BENCH_SERVER_H_

#include <sys/types.h>

#include <memory>
#include <string>
#include <vector>

#include "apps/bench_client.h"
#include "base/status.h"

namespace triaxial {

class BenchServer {
 public:
  // Starts this binary with `serve`, a free port and `arguments`, its output appended to the file `log`, and
  // waits up to `seconds` until it answers. Errors carry the end of the log.
  static Result<std::unique_ptr<BenchServer>> Start(const std::vector<std::string>& arguments,
                                                    const std::string& log, double seconds);
  ~BenchServer();  // asks it to stop; kills it after 20 s
  BenchServer(const BenchServer&) = delete;
  BenchServer& operator=(const BenchServer&) = delete;

  const BenchEndpoint& endpoint() const { return endpoint_; }
  double start_seconds() const { return start_seconds_; }

 private:
  BenchServer() = default;
  // Whether the process has ended.
  bool Ended();
  Status Describe(const std::string& what, const std::string& log) const;

  pid_t process_ = -1;
  BenchEndpoint endpoint_;
  double start_seconds_ = 0;
  size_t log_begin_ = 0;  // of this server's part of the log
};

}  // namespace triaxial

#endif  // TRIAXIAL_APPS_BENCH_SERVER_H_
