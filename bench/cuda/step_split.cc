// Decode steps of a whole model on the GPU: time of a step as a caller sees it, next to what its bytes take
// at copy bandwidth, and where the time goes: attention, products, write path, other kernels, idle (from
// CUPTI's record of every kernel). The cache is filled with numbers, not by a prefill: only sizes matter.
#include <cupti.h>
#include <fmt/core.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <array>
#include <chrono>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "base/file.h"
#include "base/json.h"
#include "kv/cache.h"
#include "model/model.h"
#include "ops/cuda/device.h"
#include "ops/cuda/elementwise.h"
#include "ops/cuda/kv_memory.h"

namespace triaxial::cuda {
namespace {

struct Options {
  std::string model;
  bool real_weights = false;
  std::vector<std::string> formats = {"bf16", "k4v4", "k2v2"};
  std::vector<std::string> shapes = {"1x4096", "16x4096", "64x4096"};  // sequences x context
  int steps = 24;
  int prefill = 0;    // tokens of a prefill chunk to time, 0: none
  std::string image;  // WIDTHxHEIGHT in pixels of an image to encode, empty: none
  std::string json;
};

struct Kernel {
  std::string name;
  uint64_t begin, end;  // ns
};
std::vector<Kernel>& Kernels() {
  static std::vector<Kernel> kernels;
  return kernels;
}

void CUPTIAPI GiveBuffer(uint8_t** buffer, size_t* size, size_t* records) {
  *size = size_t{8} << 20;
  *buffer = static_cast<uint8_t*>(std::aligned_alloc(8, *size));
  *records = 0;
}
void CUPTIAPI TakeBuffer(CUcontext, uint32_t, uint8_t* buffer, size_t, size_t valid) {
  CUpti_Activity* record = nullptr;
  while (cuptiActivityGetNextRecord(buffer, valid, &record) == CUPTI_SUCCESS) {
    if (record->kind == CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL) {
      const auto* kernel = reinterpret_cast<CUpti_ActivityKernel10*>(record);
      Kernels().push_back({kernel->name, kernel->start, kernel->end});
    } else if (record->kind == CUPTI_ACTIVITY_KIND_MEMCPY) {
      const auto* copy = reinterpret_cast<CUpti_ActivityMemcpy6*>(record);
      Kernels().push_back({"copy", copy->start, copy->end});
    }
  }
  std::free(buffer);
}

const char* ClassOf(const std::string& name) {
  const auto has = [&](const char* part) { return name.find(part) != std::string::npos; };
  if (has("FinishQkv") || has("StoreKernel") || has("ConvertKernel")) return "write path";
  if (has("Decode") || has("Prefill") || has("Attention")) return "attention";
  if (has("nvjet") || has("gemm") || has("cutlass") || has("splitK") || has("gemv") || has("cublas"))
    return "products";
  if (has("Sample")) return "sampling";
  if (name == "copy") return "copies";
  return "other kernels";
}

struct Profile {
  std::string text;
  Json json;
};

// Where the time of `runs` calls went, of one on average.
template <typename Function>
Profile Record(int runs, const Function& function) {
  cuptiActivityEnable(CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL);
  cuptiActivityEnable(CUPTI_ACTIVITY_KIND_MEMCPY);
  Kernels().clear();
  for (int i = 0; i < runs; ++i) function();
  CUDA_OK(cudaDeviceSynchronize());
  cuptiActivityFlushAll(1);
  cuptiActivityDisable(CUPTI_ACTIVITY_KIND_CONCURRENT_KERNEL);
  cuptiActivityDisable(CUPTI_ACTIVITY_KIND_MEMCPY);
  std::vector<Kernel> kernels = std::move(Kernels());
  std::sort(kernels.begin(), kernels.end(),
            [](const Kernel& a, const Kernel& b) { return a.begin < b.begin; });
  // Kernels may overlap: each is charged for what no earlier one has covered.
  std::map<std::string, double> split, by_name;
  std::map<std::string, int> calls;
  uint64_t covered = 0;
  double busy = 0;
  double between = 0;  // in long gaps, where the host is waited for
  constexpr uint64_t kLongGap = 10000;
  for (const Kernel& kernel : kernels) {
    if (covered > 0 && kernel.begin > covered + kLongGap)
      between += static_cast<double>(kernel.begin - covered);
    const uint64_t from = std::max(kernel.begin, covered);
    const double ns = kernel.end > from ? static_cast<double>(kernel.end - from) : 0.0;
    covered = std::max(covered, kernel.end);
    busy += ns;
    split[ClassOf(kernel.name)] += ns / runs;
    by_name[kernel.name] += ns / runs;
    ++calls[kernel.name];
  }
  const double span = kernels.empty() ? 0 : static_cast<double>(covered - kernels.front().begin) / runs;
  split["idle between steps"] = between / runs;
  split["idle between kernels"] = span - (busy + between) / runs;
  Profile profile;
  profile.json = {{"ms", span / 1e6}, {"launches", kernels.size() / static_cast<size_t>(runs)}};
  for (const auto& [part, ns] : split) {
    profile.text += fmt::format("{} {:.3f}, ", part, ns / 1e6);
    profile.json["split_ms"][part] = ns / 1e6;
  }
  profile.text += fmt::format("profiled {:.3f}", span / 1e6);
  for (const auto& [kernel, ns] : by_name) {
    profile.json["kernels"][kernel] = {{"us", ns / 1e3}, {"calls", calls[kernel] / runs}};
  }
  return profile;
}

double Seconds(std::chrono::steady_clock::time_point a, std::chrono::steady_clock::time_point b) {
  return std::chrono::duration<double>(b - a).count();
}

// Bytes read and written per second by a copy within the device.
double CopyBandwidth() {
  constexpr size_t kBytes = size_t{4} << 30;
  DeviceBuffer a(kBytes), b(kBytes);
  FillNormal(1, kBytes / 2, a.data<uint16_t>(), nullptr);
  cudaEvent_t begin, end;
  CUDA_OK(cudaEventCreate(&begin));
  CUDA_OK(cudaEventCreate(&end));
  double best = 0;
  for (int i = 0; i < 8; ++i) {
    CUDA_OK(cudaEventRecord(begin));
    CUDA_OK(cudaMemcpyAsync(b.data(), a.data(), kBytes, cudaMemcpyDeviceToDevice));
    CUDA_OK(cudaEventRecord(end));
    CUDA_OK(cudaEventSynchronize(end));
    float milliseconds = 0;
    CUDA_OK(cudaEventElapsedTime(&milliseconds, begin, end));
    best = std::max(best, 2e3 * kBytes / double{milliseconds});
  }
  CUDA_OK(cudaEventDestroy(begin));
  CUDA_OK(cudaEventDestroy(end));
  return best;
}

class Session {
 public:
  Session(Model* model, KvMemory* memory, Format format, int sequences, int context)
      : model_(model), memory_(memory), cache_(memory->geometry(), memory->total_rows()), format_(format) {
    for (int s = 0; s < sequences; ++s) {
      ids_.push_back(cache_.CreateSequence(0));
      // Blocks are completed by different sequences at different steps.
      fits_ = fits_ && Append(s, context + s * 37 % 64, false);
    }
    cache_.FinishStep();
  }
  bool fits() const { return fits_; }

  // One step of a token for each sequence; its time in seconds.
  double Step() {
    batch_.Clear();
    for (size_t s = 0; s < ids_.size(); ++s) fits_ = fits_ && Append(static_cast<int>(s), 1, true);
    draws_.assign(ids_.size(), TokenDraw{.temperature = 0.7f, .top_p = 0.8f, .top_k = 20});
    for (TokenDraw& draw : draws_)
      draw.uniform = static_cast<double>(random_ = random_ * 5 + 3) / 4294967296.0;
    tokens_.resize(ids_.size());
    const auto begin = std::chrono::steady_clock::now();
    model_->ForwardAndSample(batch_, memory_, draws_, tokens_.data(), nullptr);
    const auto end = std::chrono::steady_clock::now();
    cache_.FinishStep();
    return Seconds(begin, end);
  }
  // A chunk of prompt for the first sequence.
  double Prefill(int rows) {
    batch_.Clear();
    fits_ = fits_ && Append(0, rows, true);
    draws_.assign(1, TokenDraw());
    tokens_.resize(1);
    const auto begin = std::chrono::steady_clock::now();
    model_->ForwardAndSample(batch_, memory_, draws_, tokens_.data(), nullptr);
    const auto end = std::chrono::steady_clock::now();
    cache_.FinishStep();
    return Seconds(begin, end);
  }
  int64_t KvBytes() const { return cache_.Usage().total_bytes(); }

 private:
  bool Append(int s, int count, bool run) {
    const SequenceId id = ids_[static_cast<size_t>(s)];
    const int32_t row = batch_.rows(), length = cache_.Length(id);
    if (!cache_.Append(id, std::vector<KvToken>(static_cast<size_t>(count), {0, format_}), &append_).ok())
      return false;
    if (!run) return true;
    for (int i = 0; i < count; ++i) {
      batch_.tokens.push_back((length + i * 31 + s) % model_->config().text.vocab_size);
      batch_.positions.push_back({length + i, length + i, length + i});
    }
    batch_.sequences.push_back({row, count, cache_.View(id)});
    batch_.logits_rows.push_back(row + count - 1);
    for (KvStore store : append_.stores) {
      store.row_begin += row;
      batch_.stores.push_back(store);
    }
    batch_.converts.insert(batch_.converts.end(), append_.converts.begin(), append_.converts.end());
    return true;
  }

  Model* model_;
  KvMemory* memory_;
  KvCache cache_;
  Format format_;
  std::vector<SequenceId> ids_;
  Batch batch_;
  KvAppend append_;
  std::vector<TokenDraw> draws_;
  std::vector<int32_t> tokens_;
  uint32_t random_ = 1;
  bool fits_ = true;
};

Status TimeImage(Model* model, const std::string& size, Json* json) {
  int width = 0, height = 0;
  if (std::sscanf(size.c_str(), "%dx%d", &width, &height) != 2 || !model->config().vision) {
    return InvalidArgument("--image takes WIDTHxHEIGHT and a model with vision");
  }
  const PreprocessorConfig config;
  ImagePatches patches;
  patches.grid_w = width / 32 * 2;
  patches.grid_h = height / 32 * 2;
  patches.samples.resize(static_cast<size_t>(patches.grid_w * patches.grid_h) * 3 * 256);
  for (size_t i = 0; i < patches.samples.size(); ++i)
    patches.samples[i] = static_cast<uint8_t>(i * 2654435761u >> 24);
  double best = 1e9;
  for (int i = 0; i < 4; ++i) {
    const auto begin = std::chrono::steady_clock::now();
    model->Encode(patches, config);
    best = std::min(best, Seconds(begin, std::chrono::steady_clock::now()));
  }
  const Profile profile = Record(1, [&] { model->Encode(patches, config); });
  fmt::print("image of {} x {} patches: {:.1f} ms; {}\n", patches.grid_w, patches.grid_h, 1e3 * best,
             profile.text);
  *json = {{"patches", patches.grid_w * patches.grid_h}, {"ms", 1e3 * best}, {"profile", profile.json}};
  return OkStatus();
}

Status Run(const Options& options) {
  const auto start = std::chrono::steady_clock::now();
  ASSIGN_OR_RETURN(
      const std::unique_ptr<Model> model,
      Model::Load(options.model, {.device = Device::kCuda, .dummy_weights = !options.real_weights}));
  const double load = Seconds(start, std::chrono::steady_clock::now());
  const double bandwidth = CopyBandwidth();
  ASSIGN_OR_RETURN(const std::unique_ptr<KvMemory> memory, model->AllocateKv(model->FreeMemory()));
  const CacheRegion region = static_cast<const CudaKvMemory&>(*memory).region();
  FillNormal(2, region.layer_bytes * region.layers / 2, reinterpret_cast<uint16_t*>(region.data), nullptr);
  CUDA_OK(cudaDeviceSynchronize());
  fmt::print("{}, copy {:.2f} TB/s; weights of {:.1f} GB in {:.1f} s; KV memory {:.1f} GB\n",
             CurrentDevice().name, bandwidth / 1e12, static_cast<double>(model->decode_weight_bytes()) / 1e9,
             load, static_cast<double>(memory->bytes()) / 1e9);
  if (cuptiActivityRegisterCallbacks(GiveBuffer, TakeBuffer) != CUPTI_SUCCESS)
    return Internal("CUPTI does not start");
  Json results = Json::array();
  Json image;
  if (!options.image.empty()) RETURN_IF_ERROR(TimeImage(model.get(), options.image, &image));
  for (const std::string& shape : options.shapes) {
    int sequences = 0, context = 0;
    if (std::sscanf(shape.c_str(), "%dx%d", &sequences, &context) != 2) {
      return InvalidArgument("shape " + shape + " is not SEQUENCESxCONTEXT");
    }
    for (const std::string& name : options.formats) {
      const std::optional<Format> format = ParseFormat(name);
      if (!format) return InvalidArgument("no format is named " + name);
      Session session(model.get(), memory.get(), *format, sequences, context);
      if (!session.fits()) {
        fmt::print("{} {}: does not fit\n", shape, name);
        continue;
      }
      for (int i = 0; i < 4; ++i) session.Step();
      std::vector<double> times;
      for (int i = 0; i < options.steps; ++i) times.push_back(session.Step());
      std::sort(times.begin(), times.end());
      const double step = times[times.size() / 2];
      const double bytes = static_cast<double>(model->decode_weight_bytes() + session.KvBytes());
      const double floor = bytes / bandwidth;

      const Profile profile = Record(6, [&] { session.Step(); });
      fmt::print("{:>9} {:>5}: step {:.3f} ms, floor {:.3f} ms ({:.1f}%); {}\n", shape, name, 1e3 * step,
                 1e3 * floor, 100 * floor / step, profile.text);
      Json row = {{"sequences", sequences}, {"context", context},      {"format", name},
                  {"step_ms", 1e3 * step},  {"floor_ms", 1e3 * floor}, {"profile", profile.json}};
      results.push_back(row);
      if (options.prefill > 0) {
        // Until products of this size have been timed.
        for (int i = 0; i < 4; ++i) session.Prefill(options.prefill);
        const double seconds = std::min(session.Prefill(options.prefill), session.Prefill(options.prefill));
        const Profile split = Record(1, [&] { session.Prefill(options.prefill); });
        fmt::print("{:>9} {:>5}: prefill of {} tokens {:.1f} ms, {:.0f} tokens/s; {}\n", shape, name,
                   options.prefill, 1e3 * seconds, options.prefill / seconds, split.text);
        results.back()["prefill"] = {
            {"tokens", options.prefill}, {"ms", 1e3 * seconds}, {"profile", split.json}};
      }
      std::fflush(stdout);
    }
  }
  if (!options.json.empty()) {
    return WriteFile(options.json, Json({{"device", CurrentDevice().name},
                                         {"copy_bytes_per_second", bandwidth},
                                         {"load_seconds", load},
                                         {"image", image},
                                         {"results", results}})
                                       .dump(1));
  }
  return OkStatus();
}

}  // namespace
}  // namespace triaxial::cuda

int main(int argc, char** argv) {
  triaxial::cuda::Options options;
  CLI::App app("Decode steps of a model on the GPU and where their time goes");
  app.add_option("--model", options.model, "Directory with config.json")->required();
  app.add_flag("--weights", options.real_weights, "Read the checkpoint instead of making random weights");
  app.add_option("--formats", options.formats, "Formats of the cache's blocks")->delimiter(',');
  app.add_option("--shapes", options.shapes, "Sequences x context, e.g. 64x4096")->delimiter(',');
  app.add_option("--steps", options.steps, "Timed steps")->check(CLI::Range(1, 10000));
  app.add_option("--prefill", options.prefill, "Time a prefill chunk of so many tokens too");
  app.add_option("--image", options.image, "Time the vision tower on an image of WIDTHxHEIGHT pixels");
  app.add_option("--json", options.json, "Write results here");
  CLI11_PARSE(app, argc, argv);
  try {
    const triaxial::Status status = triaxial::cuda::Run(options);
    if (status.ok()) return 0;
    fmt::print(stderr, "{}\n", status.message());
  } catch (const std::exception& error) {
    fmt::print(stderr, "{}\n", error.what());
  }
  return 1;
}
