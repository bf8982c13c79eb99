// The line that the server prints about a finished request.
#ifndef TRIAXIAL_SERVE_REQUEST_LOG_H_
#define TRIAXIAL_SERVE_REQUEST_LOG_H_

#include <string>
#include <string_view>

#include "engine/request.h"

namespace triaxial {

// "chatcmpl-1f.. stop: 1210 + 25 tokens (1152 cached), KV 2.2 MiB (k4v4 1.2, bf16 1.0), 3 demoted, TTFT 0.03
// s, 410 tokens/s". No word of what was said. `tenant` "": without keys.
std::string FinishedLine(std::string_view id, std::string_view tenant, std::string_view finish,
                         const RequestStats& stats);

}  // namespace triaxial

#endif  // TRIAXIAL_SERVE_REQUEST_LOG_H_
