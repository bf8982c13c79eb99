// Logging for people who run a server: spdlog, on stderr, one line per event. Use spdlog::info("...", ...)
// and friends.
#ifndef TRIAXIAL_BASE_LOG_H_
#define TRIAXIAL_BASE_LOG_H_

#include <spdlog/spdlog.h>

namespace triaxial {

// Sends log lines to stderr with time and level. Call once, from main.
void InitLogging(bool verbose);

}  // namespace triaxial

#endif  // TRIAXIAL_BASE_LOG_H_
