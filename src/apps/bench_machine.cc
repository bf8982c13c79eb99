#include "apps/bench_machine.h"

#include <algorithm>
#include <array>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <fstream>
#include <limits>

#include "base/parallel.h"
#include "ops/buffer.h"

namespace triaxial {
namespace {

constexpr int64_t kBytes = int64_t{512} << 20;
constexpr int64_t kChunk = int64_t{1} << 20;
// A round visits the next few chunks of all: long against the clock, short against a time slice.
constexpr int64_t kRoundChunks = 16;
constexpr double kBudget = 2;

std::string CpuModel() {
  std::ifstream info("/proc/cpuinfo");
  std::string line, model, family;
  while (std::getline(info, line)) {
    const size_t colon = line.find(": ");
    if (colon == std::string::npos) continue;
    if (model.empty() && line.starts_with("model name")) model = line.substr(colon + 2);
    if (family.empty() && line.starts_with("cpu family")) family = line.substr(colon + 2);
  }
  return model + " (family " + family + ")";
}

// First line that a command prints, or "unknown".
std::string Ask(const char* command) {
  FILE* pipe = popen(command, "r");
  if (pipe == nullptr) return "unknown";
  std::array<char, 128> line{};
  const bool answered = std::fgets(line.data(), line.size(), pipe) != nullptr;
  pclose(pipe);
  std::string answer = answered ? line.data() : "unknown";
  if (answer.ends_with('\n')) answer.pop_back();
  return answer;
}

}  // namespace

double BestSeconds(double budget, const std::function<void()>& fn) {
  using Clock = std::chrono::steady_clock;
  const auto seconds = [](Clock::time_point from, Clock::time_point to) {
    return std::chrono::duration<double>(to - from).count();
  };
  double best = std::numeric_limits<double>::infinity();
  const auto begin = Clock::now();
  for (auto start = begin; seconds(begin, start) < budget;) {
    fn();
    const auto end = Clock::now();
    best = std::min(best, seconds(start, end));
    start = end;
  }
  return best;
}

double CopyBandwidth() {
  Buffer from, to;
  std::memset(from.Reserve(kBytes), 1, kBytes);
  std::memset(to.Reserve(kBytes), 2, kBytes);
  int64_t first = 0;
  const double seconds = BestSeconds(kBudget, [&] {
    ParallelFor(kRoundChunks, [&](int64_t i) {
      const int64_t at = (first + i) * kChunk;
      std::memcpy(to.data() + at, from.data() + at, kChunk);
    });
    first = (first + kRoundChunks) % (kBytes / kChunk);
  });
  return 2e-9 * kRoundChunks * kChunk / seconds;
}

double ReadBandwidth() {
  Buffer from;
  std::memset(from.Reserve(kBytes), 1, kBytes);
  std::array<uint64_t, kRoundChunks> sums{};
  int64_t first = 0;
  const double seconds = BestSeconds(kBudget, [&] {
    ParallelFor(kRoundChunks, [&](int64_t i) {
      const auto* words = reinterpret_cast<const uint64_t*>(from.data() + (first + i) * kChunk);
      uint64_t sum = 0;
      for (int64_t w = 0; w < kChunk / 8; ++w) sum += words[w];
      sums[static_cast<size_t>(i)] += sum;  // keeps the reads alive
    });
    first = (first + kRoundChunks) % (kBytes / kChunk);
  });
  const bool alive = std::any_of(sums.begin(), sums.end(), [](uint64_t sum) { return sum != 0; });
  return alive ? 1e-9 * kRoundChunks * kChunk / seconds : 0;
}

Json DescribeRun() {
  std::ifstream words("/proc/self/cmdline", std::ios::binary);
  std::string command;
  for (std::string word; std::getline(words, word, '\0');) command += (command.empty() ? "" : " ") + word;
  double load = 0;
  (void)!getloadavg(&load, 1);
  const std::time_t now = std::time(nullptr);
  std::array<char, 32> date{};
  std::strftime(date.data(), date.size(), "%Y-%m-%dT%H:%M:%SZ", std::gmtime(&now));
  std::string commit = Ask("git rev-parse --short HEAD 2>/dev/null");
  if (const char* given = std::getenv("TRIAXIAL_COMMIT"); commit == "unknown" && given != nullptr)
    commit = given;
  Json json = {
      {"command", command}, {"cpu", CpuModel()}, {"threads", ComputeThreads()}, {"load_average", load}};
  const std::string gpu = Ask("nvidia-smi --query-gpu=name --format=csv,noheader 2>/dev/null");
  if (gpu != "unknown") json["gpu"] = gpu;
  json["date"] = date.data();
  json["commit"] = commit;
  return json;
}

}  // namespace triaxial
