// Screenshots that nobody took: desktops with windows and lines of text, different for every seed, for
// requests whose pictures must not repeat.
#ifndef TRIAXIAL_APPS_BENCH_SCREENSHOT_H_
#define TRIAXIAL_APPS_BENCH_SCREENSHOT_H_

#include <cstdint>
#include <string>

namespace triaxial {

// A JPEG file.
std::string DrawScreenshot(int width, int height, uint32_t seed);

}  // namespace triaxial

#endif  // TRIAXIAL_APPS_BENCH_SCREENSHOT_H_
