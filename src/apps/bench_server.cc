#include "apps/bench_server.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <signal.h>
#include <sys/prctl.h>
#include <sys/socket.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <thread>

#include "apps/bench_load.h"
#include "base/file.h"

namespace triaxial {
namespace {

using Clock = std::chrono::steady_clock;
constexpr std::chrono::milliseconds kPause{50};

double SecondsSince(Clock::time_point start) {
  return std::chrono::duration<double>(Clock::now() - start).count();
}

// A port that was free a moment ago.
Result<uint16_t> FreePort() {
  const int fd = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  socklen_t size = sizeof(address);
  const bool bound = fd >= 0 && bind(fd, reinterpret_cast<sockaddr*>(&address), size) == 0 &&
                     getsockname(fd, reinterpret_cast<sockaddr*>(&address), &size) == 0;
  if (fd >= 0) close(fd);
  if (!bound) return Unavailable(std::string("no free port on 127.0.0.1: ") + std::strerror(errno));
  return ntohs(address.sin_port);
}

}  // namespace

Result<std::unique_ptr<BenchServer>> BenchServer::Start(const std::vector<std::string>& arguments,
                                                        const std::string& log, double seconds) {
  std::unique_ptr<BenchServer> server(new BenchServer);
  ASSIGN_OR_RETURN(server->endpoint_.port, FreePort());
  const int output = open(log.c_str(), O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0644);
  if (output < 0)
    return InvalidArgument("cannot write the server's log " + log + ": " + std::strerror(errno));
  server->log_begin_ = static_cast<size_t>(std::max<off_t>(0, lseek(output, 0, SEEK_END)));
  std::vector<std::string> words = {"triaxial",        "serve",  "--host",
                                    "127.0.0.1",       "--port", std::to_string(server->endpoint_.port),
                                    "--drain-seconds", "0"};
  words.insert(words.end(), arguments.begin(), arguments.end());
  std::vector<char*> argv;
  for (std::string& word : words) argv.push_back(word.data());
  argv.push_back(nullptr);
  const Clock::time_point begin = Clock::now();
  const pid_t parent = getpid();
  server->process_ = fork();
  if (server->process_ == 0) {
    prctl(PR_SET_PDEATHSIG, SIGKILL);  // never outlive a benchmark that was killed
    if (getppid() != parent) _exit(1);
    dup2(output, STDOUT_FILENO);
    dup2(output, STDERR_FILENO);
    execv("/proc/self/exe", argv.data());
    _exit(127);
  }
  close(output);
  if (server->process_ < 0) return Internal(std::string("cannot start a process: ") + std::strerror(errno));
  while (!BenchGet(server->endpoint_, "/health").ok()) {
    if (server->Ended()) return server->Describe("the server stopped while it started", log);
    if (SecondsSince(begin) > seconds)
      return server->Describe(
          "the server did not answer within " + std::to_string(static_cast<int>(seconds)) + " s", log);
    std::this_thread::sleep_for(kPause);
  }
  server->start_seconds_ = SecondsSince(begin);
  return server;
}

bool BenchServer::Ended() {
  if (process_ > 0 && waitpid(process_, nullptr, WNOHANG) == process_) process_ = -1;
  return process_ <= 0;
}

Status BenchServer::Describe(const std::string& what, const std::string& log) const {
  constexpr size_t kMost = 600;
  const Result<std::string> text = ReadFile(log, size_t{64} << 20);
  std::string tail = text.ok() && text->size() > log_begin_ ? text->substr(log_begin_) : "";
  while (tail.ends_with('\n')) tail.pop_back();
  if (tail.size() > kMost) tail = "..." + tail.substr(tail.size() - kMost);
  return Internal(what + "; the end of " + log + ":\n" + tail);
}

BenchServer::~BenchServer() {
  if (Ended()) return;
  kill(process_, SIGTERM);
  for (const Clock::time_point begin = Clock::now(); SecondsSince(begin) < 20;) {
    if (Ended()) return;
    std::this_thread::sleep_for(kPause);
  }
  kill(process_, SIGKILL);
  waitpid(process_, nullptr, 0);
}

}  // namespace triaxial
