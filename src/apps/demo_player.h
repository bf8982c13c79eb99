// Plays recorded conversations against a server over HTTP and keeps score.
#ifndef TRIAXIAL_APPS_DEMO_PLAYER_H_
#define TRIAXIAL_APPS_DEMO_PLAYER_H_

#include <array>
#include <cstdint>
#include <string>
#include <vector>

#include "apps/demo_trajectory.h"
#include "base/status.h"
#include "kv/format.h"

namespace triaxial {

struct PlayResult {
  int asked = 0;  // assistant steps
  int right = 0;
  int conversations = 0;
  int conversations_right = 0;  // every step right
  int64_t prompt_tokens = 0;
  int64_t completion_tokens = 0;
  // Summed over the steps, as the server reported at the end of each.
  int64_t kv_bytes = 0;
  std::array<int64_t, kFormats> kv_tokens{};
  double seconds = 0;
  // What the server did to its cache meanwhile, of all requests.
  int64_t cached_tokens = 0;  // of prompts, found in the cache
  int64_t demotions = 0;      // blocks re-quantized because they grew older, for memory or for the budget
  int64_t evictions = 0;
  int64_t preemptions = 0;

  int64_t stored_tokens() const;
};

struct PlayOptions {
  std::string host = "127.0.0.1";
  uint16_t port = 0;
  std::string model;     // as the server calls it
  std::string label;     // shown with the progress
  int in_flight = 4;     // steps asked at once
  int max_tokens = 256;  // of an answer
};

// Asks every assistant step of every conversation and compares the answer with the recorded one. Shows
// progress on stderr: a bar on a terminal, else a line every few seconds. Errors: Unavailable (no server,
// connection lost), Internal (an answer that is no completion), naming the step.
Result<PlayResult> Play(const std::vector<Trajectory>& trajectories, const PlayOptions& options);

}  // namespace triaxial

#endif  // TRIAXIAL_APPS_DEMO_PLAYER_H_
