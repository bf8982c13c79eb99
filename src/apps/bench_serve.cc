// `triaxial bench serve`: policies side by side under the same load, through HTTP.
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <limits>

#include "apps/bench.h"
#include "apps/bench_load.h"
#include "apps/bench_machine.h"
#include "apps/bench_serve_report.h"
#include "apps/bench_server.h"
#include "apps/terminal.h"
#include "base/file.h"
#include "base/log.h"

namespace triaxial {
namespace {

using Clock = std::chrono::steady_clock;
constexpr double kDefaultSeconds = 30;

struct ServeFlags {
  std::vector<std::string> policies = {"bf16", "paper"};
  std::vector<std::string> kv_memory = {"default"};
  std::vector<std::string> workloads = {"osworld"};
  std::vector<int> concurrency = {1, 4, 16};
  std::vector<double> seconds;
  double warmup = 60;
  int64_t sessions = 0;
  BenchWorkloadOptions workload;
  std::string url;
  std::string json = "bench/results/serve.json";
  double start_seconds = 300;
  double time_limit = 0;
  std::vector<std::string> server_options;
};

// One workload's runs against one server, level by level.
class ServeBench {
 public:
  explicit ServeBench(const ServeFlags& flags) : flags_(flags) {
    report_ = DescribeRun();
    report_["server_options"] = flags.server_options;
    report_["servers"] = Json::array();
    report_["runs"] = Json::array();
  }

  Status Run() {
    for (const std::string& name : flags_.workloads) {
      ASSIGN_OR_RETURN(std::unique_ptr<BenchWorkload> workload, MakeWorkload(name, flags_.workload));
      workloads_.push_back(std::move(workload));
    }
    if (!flags_.url.empty()) {
      ASSIGN_OR_RETURN(const BenchEndpoint endpoint, ParseEndpoint(flags_.url));
      for (const auto& workload : workloads_) {
        RETURN_IF_ERROR(Levels(endpoint, {flags_.url, "as it is", std::string(workload->name())},
                               workload.get(), flags_.concurrency));
      }
    } else {
      for (const std::string& memory : flags_.kv_memory) {
        for (const std::string& policy : flags_.policies) RETURN_IF_ERROR(Policy(policy, memory));
      }
    }
    PrintServeReport(report_["runs"]);
    if (!flags_.json.empty()) std::printf("\n%s\n", flags_.json.c_str());
    if (failed_ > 0) return Internal(std::to_string(failed_) + " of the runs failed; " + first_failure_);
    return OkStatus();
  }

 private:
  // A fresh server answers all levels of a workload, or, where whole recordings are played, one level: the
  // next would find them in the prefix cache.
  Status Policy(const std::string& policy, const std::string& memory) {
    for (const auto& workload : workloads_) {
      std::vector<std::vector<int>> parts = {flags_.concurrency};
      if (workload->sessions() > 0 && flags_.seconds.empty()) {
        parts.clear();
        for (const int level : flags_.concurrency) parts.push_back({level});
      }
      for (const std::vector<int>& levels : parts) {
        if (OutOfTime()) return OkStatus();
        BenchPoint point{PolicyName(policy), memory, std::string(workload->name()), levels.front()};
        const Status status = OneServer(policy, point, workload.get(), levels);
        if (!status.ok()) RETURN_IF_ERROR(Failed(point, status));
      }
    }
    return OkStatus();
  }

  Status OneServer(const std::string& policy, const BenchPoint& point, BenchWorkload* workload,
                   const std::vector<int>& levels) {
    std::vector<std::string> arguments = {"--kv-policy", policy};
    if (point.kv_memory != "default") arguments.insert(arguments.end(), {"--kv-memory", point.kv_memory});
    arguments.insert(arguments.end(), flags_.server_options.begin(), flags_.server_options.end());
    const std::string log =
        flags_.json.empty() ? "/dev/null"
                            : std::filesystem::path(flags_.json).replace_extension(".server.log").string();
    std::fprintf(stderr, "%s, KV memory %s: starting the server\n", point.policy.c_str(),
                 point.kv_memory.c_str());
    ASSIGN_OR_RETURN(const std::unique_ptr<BenchServer> server,
                     BenchServer::Start(arguments, log, flags_.start_seconds));
    report_["servers"].push_back({{"policy", point.policy},
                                  {"kv_memory", point.kv_memory},
                                  {"start_seconds", server->start_seconds()}});
    return Levels(server->endpoint(), point, workload, levels);
  }

  // With a time for each level, streams go on from one level to the next and more join them, so that only
  // those begin with cold prefixes. Without, each level plays sessions of its own from the first to the last.
  Status Levels(const BenchEndpoint& endpoint, BenchPoint point, BenchWorkload* workload,
                const std::vector<int>& levels) {
    ASSIGN_OR_RETURN(const std::string model, BenchModelName(endpoint));
    const bool timed = !flags_.seconds.empty() || (workload->sessions() == 0 && flags_.sessions == 0);
    std::unique_ptr<BenchLoad> load;
    int64_t next_session = 0;
    int streams = 0;
    for (const int level : levels) {
      if (OutOfTime()) return OkStatus();
      point.concurrency = level;
      if (load == nullptr || !timed || level < streams) {
        if (load != nullptr) next_session = load->next_session();
        load = std::make_unique<BenchLoad>(endpoint, model, workload, next_session);
      }
      streams = level;
      const int64_t sessions = flags_.sessions > 0 ? flags_.sessions : workload->sessions();
      if (!timed) load->LimitSessions(sessions);
      load->Grow(level);
      if (timed) RETURN_IF_ERROR(load->WarmUp(flags_.warmup));
      Result<BenchWindow> window =
          load->Measure(timed ? SecondsOf(level) : std::numeric_limits<double>::infinity(),
                        [&](const BenchWindow& w) { Progress(point, w); });
      ClearProgress();
      RETURN_IF_ERROR(window.ok() ? OkStatus() : window.status());
      RETURN_IF_ERROR(Keep(BenchRunJson(point, *window)));
    }
    return OkStatus();
  }

  Status Keep(Json run) {
    report_["runs"].push_back(std::move(run));
    if (flags_.json.empty()) return OkStatus();
    // Rewritten after each run: what was measured survives whatever happens next.
    return WriteFile(flags_.json, report_.dump(1) + "\n");
  }

  Status Failed(const BenchPoint& point, const Status& status) {
    const std::string what = point.policy + ", KV memory " + point.kv_memory + ": " + status.message();
    std::fprintf(stderr, "%s\n", what.c_str());
    if (failed_++ == 0) first_failure_ = "the first: " + what;
    return Keep({{"policy", point.policy},
                 {"kv_memory", point.kv_memory},
                 {"workload", point.workload},
                 {"concurrency", point.concurrency},
                 {"error", status.message()}});
  }

  void Progress(const BenchPoint& point, const BenchWindow& w) {
    const BenchGauges now = w.gauges.empty() ? BenchGauges{} : w.gauges.back();
    const bool terminal = isatty(STDERR_FILENO) != 0;
    if (!terminal && w.seconds - shown_ < 10 && w.seconds >= shown_) return;
    shown_ = w.seconds;
    std::fprintf(stderr,
                 "%s%s, KV memory %s, %d clients: %.0f s, %.1f tokens/s, %.0f running, %.0f waiting, %lld "
                 "requests done%s",
                 terminal ? "\r" : "", point.policy.c_str(), point.kv_memory.c_str(), point.concurrency,
                 w.seconds, w.output_tokens / std::max(w.seconds, 1e-9), std::max(0.0, now.running),
                 std::max(0.0, now.waiting), static_cast<long long>(w.requests), terminal ? "\x1b[K" : "\n");
    std::fflush(stderr);
  }
  void ClearProgress() {
    shown_ = 0;
    if (isatty(STDERR_FILENO) != 0) std::fputs("\r\x1b[K", stderr);
  }

  // The time given for a level, the last one if there are fewer.
  double SecondsOf(int level) const {
    if (flags_.seconds.empty()) return kDefaultSeconds;
    const auto at =
        std::find(flags_.concurrency.begin(), flags_.concurrency.end(), level) - flags_.concurrency.begin();
    return flags_.seconds[std::min(static_cast<size_t>(at), flags_.seconds.size() - 1)];
  }
  bool OutOfTime() const {
    return flags_.time_limit > 0 &&
           std::chrono::duration<double>(Clock::now() - begin_).count() > flags_.time_limit;
  }
  // "paper", or "calibrated" for policies/calibrated.json.
  static std::string PolicyName(const std::string& policy) {
    return policy.ends_with(".json") ? std::filesystem::path(policy).stem().string() : policy;
  }

  const ServeFlags& flags_;
  const Clock::time_point begin_ = Clock::now();
  std::vector<std::unique_ptr<BenchWorkload>> workloads_;
  Json report_;
  double shown_ = 0;
  int failed_ = 0;
  std::string first_failure_;
};

}  // namespace

Command AddBenchServe(CLI::App* bench) {
  auto flags = std::make_shared<ServeFlags>();
  CLI::App* command = bench->add_subcommand(
      "serve", "Serve under several KV policies and measure throughput, latency and capacity through HTTP");
  command->add_option("--policies", flags->policies, "KV policies to compare: built-in names or JSON files")
      ->delimiter(',')
      ->capture_default_str();
  command
      ->add_option("--kv-memory", flags->kv_memory, "KV memories to give each policy, e.g. 10G; or default")
      ->delimiter(',')
      ->capture_default_str();
  command
      ->add_option("--workload", flags->workloads,
                   "osworld, PROMPT/ANSWER such as 4096/1024, or a JSONL file of conversations or requests")
      ->delimiter(',')
      ->capture_default_str();
  command->add_option("--concurrency", flags->concurrency, "Streams that ask at once")
      ->delimiter(',')
      ->check(CLI::Range(1, 1024))
      ->capture_default_str();
  command
      ->add_option(
          "--seconds", flags->seconds,
          "Time of each measurement, or one for each of --concurrency (default: until all recorded sessions "
          "are done, else 30)")
      ->delimiter(',')
      ->check(CLI::Range(0.1, 86400.0));
  command
      ->add_option("--warmup-seconds", flags->warmup,
                   "Before a timed measurement, wait for every stream's first token, at most so long")
      ->check(CLI::Range(0.0, 86400.0))
      ->capture_default_str();
  command->add_option("--sessions", flags->sessions, "Sessions of each measurement without --seconds")
      ->check(CLI::Range(1, 1 << 20));
  command
      ->add_option("--max-tokens", flags->workload.max_tokens,
                   "Tokens of an answer (default: the workload's own, 300)")
      ->check(CLI::Range(1, 1 << 20));
  command->add_flag("--ignore-eos", flags->workload.fixed_length,
                    "Recorded conversations too get answers of full length");
  command->add_option("--images", flags->workload.images,
                      "Directory of a recording's pictures (default: its own)");
  command->add_option("--url", flags->url,
                      "Measure the server at http://HOST:PORT instead of starting servers");
  command->add_option("--json", flags->json, "File for the results; empty for none")->capture_default_str();
  command->add_option("--start-seconds", flags->start_seconds, "How long a server may take to start")
      ->check(CLI::Range(1.0, 86400.0))
      ->capture_default_str();
  command->add_option("--time-limit", flags->time_limit, "Begin no measurement after so many seconds")
      ->check(CLI::Range(0.0, 1e6));
  command->add_option("SERVER_OPTIONS", flags->server_options,
                      "After --: options of triaxial serve, e.g. -- --model DIR --load-format dummy");
  return [flags] { return ServeBench(*flags).Run(); };
}

}  // namespace triaxial
