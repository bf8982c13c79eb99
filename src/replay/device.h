// A machine that a replay pretends to run on: how much it holds, and how fast it reads and multiplies.
#ifndef TRIAXIAL_REPLAY_DEVICE_H_
#define TRIAXIAL_REPLAY_DEVICE_H_

#include <array>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "kv/format.h"

namespace triaxial {

struct DeviceSpec {
  std::string name;
  std::string source;    // where the facts come from
  double memory = 0;     // bytes
  double usable = 0.92;  // share of it for weights and KV cache; the rest is the runtime's and activations
  double bandwidth = 0;  // bytes per second of the memory, as published
  double flops = 0;      // dense BF16 operations per second, as published
  double bandwidth_share = 1;  // of `bandwidth` that reading weights and BF16 keys and values reaches
  // The same for keys or values of 2, 4 and 8 bits, whose unpacking takes time of its own.
  std::array<double, 3> quantized_share = {1, 1, 1};
  double flops_share = 1;   // of `flops` that prefill reaches
  double step_seconds = 0;  // of every step beside that: launches, sampling, scheduling

  // Share of `bandwidth` at which attention reads blocks of a format: the mean of its two sides.
  double KvShare(Format format) const;
};

// "h100-80g", "h200", "b200", "cpu".
std::vector<std::string_view> BuiltinDevices();
// A built-in by name, else a JSON file with the fields above but `source`; memory, bandwidth and flops must
// be there, the others default to those of h200. Errors name the file, the field and the range.
Result<DeviceSpec> LoadDevice(const std::string& name_or_path);

}  // namespace triaxial

#endif  // TRIAXIAL_REPLAY_DEVICE_H_
