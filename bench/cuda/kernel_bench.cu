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
      weights[static_cast<size_t>(std::find(kAllFormats, kAllFormats + kFormatCount, format) - kAllFormats)] =
          weight;
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

int Main(int argc, char** argv) {
  std::string out, peers_path, only_mix;
  Shape only = {};
  int group = 8;
  bool decode = true;
  for (int i = 1; i + 1 < argc; i += 2) {
    const std::string flag = argv[i], value = argv[i + 1];
    if (flag == "--out") out = value;
    if (flag == "--peers") peers_path = value;
    if (flag == "--mix") only_mix = value;
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
  json << "{\n  \"device\": \"" << device.name << "\",\n  \"copy_bytes_per_s\": " << ceilings.copy
       << ",\n  \"read_bytes_per_s\": " << ceilings.read << ",\n  \"results\": [";
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
      // As many caches as take 512 MiB, ten times the L2.
      const int copies = static_cast<int>(std::clamp<int64_t>((int64_t{512} << 20) / bytes + 1, 2, 64));
      specs.clear();
      for (int i = 0; i < copies * shape.batch; ++i)
        specs.push_back(EvenSequence(shape.context, mix.weights, random));
      RandomStep step(geometry, num_heads, std::move(specs), 3);
      std::vector<std::unique_ptr<Attention>> attentions;
      for (int i = 0; i < copies; ++i) {
        attentions.push_back(std::make_unique<Attention>(
            geometry, num_heads,
            AttentionLimits{
                .sequences = shape.batch, .blocks = int64_t{shape.batch} * shape.context / 64, .rows = 64}));
        attentions.back()->Plan(
            std::span(step.sequences())
                .subspan(static_cast<size_t>(i) * shape.batch, static_cast<size_t>(shape.batch)),
            nullptr);
      }
      step.PoisonOutput();
      LayerAttention layer = step.layer();
      double us[2];
      for (const bool overlap : {false, true}) {
        layer.overlap = overlap;
        us[overlap] = TimeGraph(copies, [&](cudaStream_t stream) {
          for (const auto& attention : attentions) attention->RunDecode(layer, stream);
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
