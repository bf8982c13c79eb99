// Times the attention kernels over shapes and mixes of formats, as a step runs them: captured in a CUDA
// graph, each launch over another cache, so that nothing waits in L2. Prints a table; writes JSON with --out
// FILE. With --peers FILE (tools/peers/attention_peers.py) it also prints ratios to the best BF16 and FP8
// attention of the machine's libraries.
#include <cctype>
#include <cstdlib>
#include <fstream>
#include <functional>
#include <map>
#include <sstream>
#include <string>

#include "attention_testing.cuh"
#include "ops/cuda/decode_attention_sm90.h"

namespace triaxial::cuda {
namespace {

struct Mix {
  const char* name;
  std::vector<double> weights;  // of kAllFormats
};
struct Shape {
  int batch;
  int context;
};

constexpr size_t kFormatCount = std::size(kAllFormats);

std::vector<Mix> Mixes() {
  const auto only = [](std::initializer_list<std::pair<Format, double>> parts) {
    std::vector<double> weights(kFormatCount, 0.0);
    for (const auto& [format, weight] : parts) {
      weights[static_cast<size_t>(std::find(kAllFormats.begin(), kAllFormats.end(), format) -
                                  kAllFormats.begin())] = weight;
    }
    return weights;
  };
  std::vector<Mix> mixes = {{"k2v2", only({{Format::kK2V2, 1}})},
                            {"k4v2", only({{Format::kK4V2, 1}})},
                            {"k4v4", only({{Format::kK4V4, 1}})},
                            {"75% k2v2, 25% k4v4", only({{Format::kK2V2, 3}, {Format::kK4V4, 1}})},
                            {"bf16", only({{Format::kBf16, 1}})}};
  for (const Format format : kAllFormats) {
    if (Bits(format, Side::kK) == 8) mixes.push_back({"fp8", only({{format, 1}})});
  }
  return mixes;
}

// The same share of every format in every sequence; blocks in any order.
SequenceSpec EvenSequence(int tokens, const std::vector<double>& weights, std::mt19937& random) {
  SequenceSpec spec;
  double total = 0;
  for (const double w : weights) total += w;
  const int blocks = tokens / kBlockTokens;
  double upto = 0;
  for (size_t f = 0; f < weights.size(); ++f) {
    upto += weights[f] / total * blocks;
    while (static_cast<double>(spec.blocks.size()) < upto - 0.5) {
      spec.blocks.push_back({.tokens = kBlockTokens, .format = kAllFormats[f]});
    }
  }
  std::shuffle(spec.blocks.begin(), spec.blocks.end(), random);
  return spec;
}

// Median time in microseconds of one of `launches` launches that `record` puts on the stream.
double TimeGraph(int launches, const std::function<void(cudaStream_t)>& record) {
  cudaStream_t stream;
  CUDA_OK(cudaStreamCreate(&stream));
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  CUDA_OK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  record(stream);
  CUDA_OK(cudaStreamEndCapture(stream, &graph));
  CUDA_OK(cudaGraphInstantiate(&executable, graph, 0));
  cudaEvent_t begin, end;
  CUDA_OK(cudaEventCreate(&begin));
  CUDA_OK(cudaEventCreate(&end));
  std::vector<float> times;
  for (int i = 0; i < 9; ++i) {
    CUDA_OK(cudaEventRecord(begin, stream));
    CUDA_OK(cudaGraphLaunch(executable, stream));
    CUDA_OK(cudaEventRecord(end, stream));
    CUDA_OK(cudaStreamSynchronize(stream));
    float ms = 0;
    CUDA_OK(cudaEventElapsedTime(&ms, begin, end));
    if (i >= 2) times.push_back(ms);
  }
  CUDA_OK(cudaEventDestroy(begin));
  CUDA_OK(cudaEventDestroy(end));
  CUDA_OK(cudaGraphExecDestroy(executable));
  CUDA_OK(cudaGraphDestroy(graph));
  CUDA_OK(cudaStreamDestroy(stream));
  std::sort(times.begin(), times.end());
  return static_cast<double>(times[times.size() / 2]) * 1e3 / launches;
}

__global__ void ReadAll(const uint4* x, int64_t n, uint32_t* out) {
  uint32_t sum = 0;
  const int64_t step = int64_t{gridDim.x} * blockDim.x;
#pragma unroll 8
  for (int64_t i = blockIdx.x * int64_t{blockDim.x} + threadIdx.x; i < n; i += step) {
    const uint4 v = __ldcs(x + i);
    sum ^= v.x ^ v.y ^ v.z ^ v.w;
  }
  if (sum == 0x12345678) *out = sum;
}

struct Ceilings {
  double copy = 0;  // bytes read and written per second
  double read = 0;
};
Ceilings MeasureCeilings() {
  const size_t bytes = size_t{4} << 30;
  DeviceBuffer a(bytes), b(bytes);
  FillRows<<<1024, 256>>>(a.data<uint16_t>(), static_cast<int64_t>(bytes / 2), 1.0f, 1);
  Ceilings c;
  c.copy = 2e6 * static_cast<double>(bytes) / TimeGraph(4, [&](cudaStream_t s) {
             for (int i = 0; i < 4; ++i)
               CUDA_OK(cudaMemcpyAsync(b.data(), a.data(), bytes, cudaMemcpyDeviceToDevice, s));
           });
  c.read = 1e6 * static_cast<double>(bytes) / TimeGraph(4, [&](cudaStream_t s) {
             for (int i = 0; i < 4; ++i) {
               ReadAll<<<132 * 8, 512, 0, s>>>(a.data<uint4>(), static_cast<int64_t>(bytes / 16),
                                               b.data<uint32_t>());
             }
           });
  return c;
}

// {"decode": [{"peer": "...", "type": "bf16", "batch": 1, "context": 1024, "us": 1.0}, ...]}: the least
// microseconds by "type batch context".
std::map<std::string, double> ReadPeers(const std::string& path, std::map<std::string, std::string>* names) {
  std::ifstream file(path);
  std::stringstream text;
  text << file.rdbuf();
  const std::string s = text.str();
  const auto field = [](const std::string& object, const std::string& name) {
    const size_t at = object.find('"' + name + '"');
    if (at == std::string::npos) return std::string();
    size_t begin = object.find(':', at) + 1;
    while (begin < object.size() && std::isspace(static_cast<unsigned char>(object[begin]))) ++begin;
    if (object[begin] == '"') return object.substr(begin + 1, object.find('"', begin + 1) - begin - 1);
    return object.substr(begin, object.find_first_of(",}", begin) - begin);
  };
  std::map<std::string, double> best;
  for (size_t at = s.find('{', s.find('[')); at != std::string::npos; at = s.find('{', at + 1)) {
    const std::string object = s.substr(at, s.find('}', at) - at + 1);
    if (field(object, "us").empty()) continue;
    const std::string key = field(object, "kind") + ' ' + field(object, "type") + ' ' +
                            field(object, "batch") + 'x' + field(object, "context");
    const double us = std::atof(field(object, "us").c_str());
    if (!best.count(key) || us < best[key]) best[key] = us, (*names)[key] = field(object, "peer");
  }
  return best;
}

// Microseconds by number of splits, for the planner's constants (attention_plan.cc).
void SweepSplits(const RandomStep& step, const KvGeometry& geometry, int num_heads, int layers) {
  const DecodeMachine machine = {CurrentDevice().multiprocessors * kDecodeBlocksPerSm, kDecodeWarps};
  DecodePlan plan;
  PlanDecode(geometry, num_heads, machine, step.sequences(), &plan);
  std::printf("  plan %d |", plan.items[0].splits);
  for (const int splits : {1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16, 20, 24, 28, 32, 40, 48, 64}) {
    if (splits * static_cast<int>(step.sequences().size()) * geometry.num_kv_heads > 5 * machine.blocks)
      break;
    PlanDecode(geometry, num_heads, machine, step.sequences(), &plan, splits);
    plan.items.resize(plan.items.size() + static_cast<size_t>(machine.blocks));
    const DeviceBuffer table = ToDevice(plan.table), items = ToDevice(plan.items);
    DeviceBuffer counters(4 * static_cast<size_t>(plan.counters + 1)),
        out(static_cast<size_t>(plan.slots + 1) * 8 * 128 * 2),
        sums(static_cast<size_t>(plan.slots + 1) * 8 * 8);
    CUDA_OK(cudaMemset(counters.data(), 0, counters.size()));
    double us[2];
    for (const bool overlap : {false, true}) {
      us[overlap] = TimeGraph(layers, [&](cudaStream_t stream) {
        for (int i = 0; i < layers; ++i) {
          LayerAttention layer = step.layer(i);
          layer.overlap = overlap;
          LaunchDecodeSm90({.layer = layer,
                            .num_heads = num_heads,
                            .num_kv_heads = geometry.num_kv_heads,
                            .scale_log2 = layer.scale * 1.442695f,
                            .table = table.data<KvBlockRef>(),
                            .items = items.data<DecodeItem>(),
                            .counters = counters.data<int>(),
                            .partial_out = out.data<uint32_t>(),
                            .partial_sums = sums.data<float2>()},
                           geometry.head_dim, machine.blocks, stream);
        }
      });
    }
    std::printf(" %d:%.2f/%.2f", splits, us[0], us[1]);
  }
  std::printf("\n");
}

int Main(int argc, char** argv) {
  std::string out, peers_path, only_mix, commit;
  Shape only = {};
  int group = 8;
  bool decode = true, prefill = true, sweep = false;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string flag = argv[i], value = argv[i + 1];
    if (flag == "--out") out = value;
    if (flag == "--peers") peers_path = value;
    if (flag == "--mix") only_mix = value;
    if (flag == "--only") decode = value == "decode", prefill = value == "prefill";
    if (flag == "--commit") commit = value;
    if (flag == "--sweep") sweep = value == "splits";
    if (flag == "--group") group = std::atoi(value.c_str());
    if (flag == "--shape" && std::sscanf(value.c_str(), "%dx%d", &only.batch, &only.context) != 2) return 2;
  }
  std::map<std::string, std::string> peer_names;
  const std::map<std::string, double> peers =
      peers_path.empty() ? std::map<std::string, double>() : ReadPeers(peers_path, &peer_names);
  const DeviceInfo device = CurrentDevice();
  const Ceilings ceilings = MeasureCeilings();
  std::printf("%s: copy %.2f TB/s, read %.2f TB/s\n", device.name.c_str(), ceilings.copy / 1e12,
              ceilings.read / 1e12);
  std::ostringstream json;
  json << "{\n  \"command\": \"kernel_bench";
  for (int i = 1; i < argc; ++i) json << ' ' << argv[i];
  json << "\",\n  \"commit\": \"" << commit << "\",\n  \"device\": \"" << device.name
       << "\",\n  \"copy_bytes_per_s\": " << ceilings.copy << ",\n  \"read_bytes_per_s\": " << ceilings.read
       << ",\n  \"results\": [";
  bool first = true;
  const KvGeometry geometry = {.num_layers = 1, .num_kv_heads = 8, .head_dim = 128};
  const int num_heads = 8 * group;
  const Shape shapes[] = {{1, 1024},  {1, 8192},  {1, 32768},  {8, 1024},  {8, 8192},
                          {8, 32768}, {32, 8192}, {32, 32768}, {64, 8192}, {64, 32768}};
  std::printf("%-20s %9s %9s %9s %9s %7s %6s %8s %8s\n", "decode", "shape", "us", "overlap", "ns/token",
              "TB/s", "read", "of bf16", "of fp8");
  for (const Mix& mix : Mixes()) {
    if (!decode || (!only_mix.empty() && only_mix != mix.name)) continue;
    for (const Shape& shape : shapes) {
      if (only.batch != 0 && (only.batch != shape.batch || only.context != shape.context)) continue;
      std::mt19937 random(7);
      int64_t bytes = 0;
      std::vector<SequenceSpec> specs = {EvenSequence(shape.context, mix.weights, random)};
      for (const KvBlockRef& b : specs[0].blocks) bytes += BlockHeadBytes(geometry, b) * int64_t{8};
      bytes *= shape.batch;
      // One plan for many layers, as in a step; as many layers as take 512 MiB, ten times the L2.
      const int layers = static_cast<int>(std::clamp<int64_t>((int64_t{512} << 20) / bytes + 1, 2, 64));
      specs.clear();
      for (int i = 0; i < shape.batch; ++i) specs.push_back(EvenSequence(shape.context, mix.weights, random));
      RandomStep step(geometry, num_heads, std::move(specs), 3, 1.0f, layers);
      Attention attention(geometry, num_heads, step.limits());
      attention.Plan(step.sequences(), nullptr);
      step.PoisonOutput();
      double us[2];
      for (const bool overlap : {false, true}) {
        us[overlap] = TimeGraph(layers, [&](cudaStream_t stream) {
          for (int i = layers - 1; i >= 0; --i) {
            LayerAttention layer = step.layer(i);
            layer.overlap = overlap;
            attention.RunDecode(layer, stream);
          }
        });
      }
      const RandomStep::Error error = step.Compare(64, 5);
      const double tokens = static_cast<double>(shape.batch) * shape.context;
      const double rate = static_cast<double>(bytes) / us[0] * 1e6;
      std::printf("%-20s %3dx%-5d %9.2f %9.2f %9.4f %7.3f %5.1f%%", mix.name, shape.batch, shape.context,
                  us[0], us[1], us[0] * 1e3 / tokens, rate / 1e12, 100 * rate / ceilings.read);
      json << (first ? "\n" : ",\n") << "    {\"kind\": \"decode\", \"mix\": \"" << mix.name
           << "\", \"batch\": " << shape.batch << ", \"context\": " << shape.context
           << ", \"group\": " << group << ", \"us\": " << us[0] << ", \"us_overlap\": " << us[1]
           << ", \"bytes\": " << bytes << ", \"ns_per_token\": " << us[0] * 1e3 / tokens
           << ", \"bytes_per_s\": " << rate << ", \"share_of_read\": " << rate / ceilings.read
           << ", \"error\": " << error.all;
      first = false;
      for (const char* type : {"bf16", "fp8"}) {
        const std::string key = std::string("decode ") + type + ' ' + std::to_string(shape.batch) + 'x' +
                                std::to_string(shape.context);
        const auto peer = peers.find(key);
        if (peer == peers.end()) continue;
        std::printf(" %8.3f", us[0] / peer->second);
        json << ", \"ratio_to_" << type << "\": " << us[0] / peer->second << ", \"peer_" << type << "\": \""
             << peer_names[key] << '"';
      }
      json << '}';
      std::printf("%s\n", error.all <= 2e-3 ? "" : "  WRONG");
      std::fflush(stdout);
      if (!(error.all <= 2e-3)) std::printf("error %.2e\n", error.all);
      if (sweep) SweepSplits(step, geometry, num_heads, layers);
    }
  }
  // Chunks of a prompt over a prefix in the cache: rows, prefix. TFLOP/s count what the causal mask leaves.
  const Shape chunks[] = {{2048, 0}, {2048, 30720}, {256, 30720}};
  if (prefill)
    std::printf("%-20s %11s %9s %9s %8s %8s\n", "prefill", "shape", "us", "TFLOP/s", "of bf16", "of fp8");
  for (const Mix& mix : Mixes()) {
    if (!prefill || (!only_mix.empty() && only_mix != mix.name)) continue;
    for (const Shape& chunk : chunks) {
      if (only.batch != 0 && (only.batch != chunk.batch || only.context != chunk.context)) continue;
      std::mt19937 random(7);
      SequenceSpec spec = EvenSequence(chunk.context, mix.weights, random);
      spec.rows = chunk.batch;
      RandomStep step(geometry, num_heads, {spec}, 3);
      Attention attention(geometry, num_heads, step.limits());
      attention.Plan(step.sequences(), nullptr);
      step.PoisonOutput();
      const double us = TimeGraph(4, [&](cudaStream_t stream) {
        for (int i = 0; i < 4; ++i) attention.RunPrefill(step.layer(), stream);
      });
      const RandomStep::Error error = step.Compare(256, 5);
      const double rows = chunk.batch, pairs = rows * chunk.context + rows * (rows + 1) / 2;
      const double flops = 4.0 * num_heads * geometry.head_dim * pairs / us * 1e6;
      std::printf("%-20s %5dx%-5d %9.2f %9.1f", mix.name, chunk.batch, chunk.context, us, flops / 1e12);
      json << (first ? "\n" : ",\n") << "    {\"kind\": \"prefill\", \"mix\": \"" << mix.name
           << "\", \"rows\": " << chunk.batch << ", \"prefix\": " << chunk.context << ", \"group\": " << group
           << ", \"us\": " << us << ", \"flops\": " << flops << ", \"error\": " << error.all;
      first = false;
      for (const char* type : {"bf16", "fp8"}) {
        const std::string key = std::string("prefill ") + type + ' ' + std::to_string(chunk.batch) + 'x' +
                                std::to_string(chunk.context);
        const auto peer = peers.find(key);
        if (peer == peers.end()) continue;
        std::printf(" %8.3f", us / peer->second);
        json << ", \"ratio_to_" << type << "\": " << us / peer->second << ", \"peer_" << type << "\": \""
             << peer_names[key] << '"';
      }
      json << '}';
      std::printf("%s\n", error.all <= 2e-3 ? "" : "  WRONG");
      std::fflush(stdout);
      if (!(error.all <= 2e-3)) std::printf("error %.2e\n", error.all);
    }
  }
  json << "\n  ]\n}\n";
  if (!out.empty()) std::ofstream(out) << json.str();
  return 0;
}

}  // namespace
}  // namespace triaxial::cuda

int main(int argc, char** argv) {
  try {
    return triaxial::cuda::Main(argc, argv);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
  }
}
