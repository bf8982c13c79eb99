#include "replay/device.h"

#include <filesystem>

#include "io/json_fields.h"

namespace triaxial {
namespace {

constexpr double kMiB = 1024.0 * 1024.0;

// Shares and step_seconds of the GPUs are those that this project's kernels reached on an H200 with
// Qwen3-VL-32B (docs/kernels.md): 64 GB of weights in 16.1 ms, attention over 64 x 4096 tokens in 17.2 ms
// (bf16), 5.9 (k4v4) and 4.2 (k2v2), a prefill chunk of 2048 in 180 ms. That of 8 bits is interpolated.
constexpr double kGpuBandwidthShare = 0.83;
constexpr std::array<double, 3> kGpuQuantizedShare = {0.48, 0.65, 0.75};
constexpr double kGpuFlopsShare = 0.72;
constexpr double kGpuStepSeconds = 0.7e-3;

DeviceSpec Gpu(std::string name, std::string source, double mib, double bandwidth, double flops) {
  DeviceSpec device;
  device.name = std::move(name);
  device.source = std::move(source);
  device.memory = mib * kMiB;
  device.bandwidth = bandwidth;
  device.flops = flops;
  device.bandwidth_share = kGpuBandwidthShare;
  device.quantized_share = kGpuQuantizedShare;
  device.flops_share = kGpuFlopsShare;
  device.step_seconds = kGpuStepSeconds;
  return device;
}

const std::vector<DeviceSpec>& Builtins() {
  static const std::vector<DeviceSpec> devices = [] {
    std::vector<DeviceSpec> list = {
        Gpu("h100-80g", "NVIDIA H100 SXM data sheet (3.35 TB/s, 989 TFLOP/s); memory as nvidia-smi says",
            81559, 3.35e12, 989e12),
        Gpu("h200", "NVIDIA H200 SXM data sheet (4.8 TB/s, 989 TFLOP/s); memory as nvidia-smi says", 143771,
            4.8e12, 989e12),
        Gpu("b200", "NVIDIA DGX B200 data sheet, an eighth (180 GB, 8 TB/s, 2.25 PFLOP/s dense BF16)",
            180e9 / kMiB, 8e12, 2.25e15),
    };
    DeviceSpec cpu;
    cpu.name = "cpu";
    cpu.source = "two cores of an AMD EPYC (Zen 5), measured: bench/results/model_speed_epyc-zen5-2core.json";
    cpu.memory = 16.0 * 1024 * kMiB;
    cpu.usable = 0.75;
    cpu.bandwidth = 79e9;
    cpu.flops = 0.95e12;
    cpu.bandwidth_share = 0.95;
    cpu.quantized_share = {0.4, 0.5, 0.7};
    cpu.flops_share = 0.84;
    cpu.step_seconds = 0.2e-3;
    list.push_back(std::move(cpu));
    return list;
  }();
  return devices;
}

Status ReadDevice(const JsonFields& fields, DeviceSpec* device) {
  RETURN_IF_ERROR(fields.String("name", &device->name, Presence::kOptional));
  RETURN_IF_ERROR(fields.Number("memory", 1e6, 1e15, &device->memory));
  RETURN_IF_ERROR(fields.Number("bandwidth", 1e6, 1e16, &device->bandwidth));
  RETURN_IF_ERROR(fields.Number("flops", 1e6, 1e19, &device->flops));
  RETURN_IF_ERROR(fields.Number("usable", 0.01, 1, &device->usable, Presence::kOptional));
  RETURN_IF_ERROR(fields.Number("bandwidth_share", 0.001, 1, &device->bandwidth_share, Presence::kOptional));
  RETURN_IF_ERROR(fields.Number("flops_share", 0.001, 1, &device->flops_share, Presence::kOptional));
  RETURN_IF_ERROR(fields.Number("step_seconds", 0, 10, &device->step_seconds, Presence::kOptional));
  constexpr std::array<const char*, 3> kShares = {"k2_share", "k4_share", "k8_share"};
  for (size_t i = 0; i < kShares.size(); ++i) {
    RETURN_IF_ERROR(fields.Number(kShares[i], 0.001, 1, &device->quantized_share[i], Presence::kOptional));
  }
  return OkStatus();
}

}  // namespace

double DeviceSpec::KvShare(Format format) const {
  const auto share = [this](int bits) {
    return bits <= 2   ? quantized_share[0]
           : bits <= 4 ? quantized_share[1]
           : bits <= 8 ? quantized_share[2]
                       : bandwidth_share;
  };
  return (share(Bits(format, Side::kK)) + share(Bits(format, Side::kV))) / 2;
}

std::vector<std::string_view> BuiltinDevices() {
  std::vector<std::string_view> names;
  for (const DeviceSpec& device : Builtins()) names.push_back(device.name);
  return names;
}

Result<DeviceSpec> LoadDevice(const std::string& name_or_path) {
  std::string names;
  for (const DeviceSpec& device : Builtins()) {
    if (device.name == name_or_path) return device;
    names += (names.empty() ? "" : ", ") + device.name;
  }
  std::error_code ignored;
  if (!std::filesystem::exists(name_or_path, ignored)) {
    return NotFound("device '" + name_or_path + "' is neither built in (" + names + ") nor a file");
  }
  ASSIGN_OR_RETURN(const Json json, ReadJsonFile(name_or_path, size_t{1} << 20));
  if (!json.is_object()) return InvalidArgument(name_or_path + " must hold a JSON object");
  DeviceSpec device = Builtins()[1];
  device.name = std::filesystem::path(name_or_path).stem().string();
  device.source = name_or_path;
  RETURN_IF_ERROR(ReadDevice(JsonFields(json, name_or_path), &device));
  return device;
}

}  // namespace triaxial
