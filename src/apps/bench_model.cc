// `triaxial bench model`: prefill and decode of a whole model, without engine and server, next to what the
// machine allows, and where a step's time goes.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <limits>
#include <map>

#include "apps/bench.h"
#include "apps/bench_kernels.h"
#include "apps/bench_machine.h"
#include "apps/terminal.h"
#include "base/file.h"
#include "base/float16.h"
#include "base/json.h"
#include "base/parallel.h"
#include "model/model.h"
#include "ops/buffer.h"
#include "ops/linear.h"
#ifdef TRIAXIAL_CUDA
#include "apps/bench_bandwidth.h"
#include "apps/bench_trace.h"
#include "ops/cuda/elementwise.h"
#include "ops/cuda/kv_memory.h"
#endif

namespace triaxial {
namespace {

using Clock = std::chrono::steady_clock;

struct ModelBenchFlags {
  std::string model = "models/pocket-agent";
  std::string load_format = "auto";
  std::string device = "auto";
  std::string dtype = "bf16";
  std::string codec = "rotated";
  std::vector<std::string> formats = {"bf16"};
  std::vector<int> contexts = {512, 2048};
  std::vector<int> batches = {1};
  int chunk = 512;
  int steps = 48;
  double seconds = 4;
  int threads = 0;
  std::string json;
};

// Sequences in a cache of random content: what a step costs depends on sizes alone.
class BenchSequences {
 public:
  static Result<std::unique_ptr<BenchSequences>> Create(Model* model, const FormatMix& mix, int sequences,
                                                        int context, int more_tokens) {
    const KvGeometry g = model->geometry();
    const int64_t blocks = (context + more_tokens) / kBlockTokens + 1;
    const std::vector<Format> formats = mix.Spread(blocks);
    // A tail beside its completed block, for each.
    const int64_t rows_of_sequence = LayerBytes(g, formats) / UnitRowBytes(g) + 2 * UnitsOf(g, Format::kBf16);
    ASSIGN_OR_RETURN(std::unique_ptr<KvMemory> memory,
                     model->AllocateKv(sequences * rows_of_sequence * UnitRowBytes(g) * g.num_layers));
    RETURN_IF_ERROR(Fill(memory.get()));
    std::unique_ptr<BenchSequences> bench(new BenchSequences(model, std::move(memory), formats));
    for (int s = 0; s < sequences; ++s) {
      bench->ids_.push_back(bench->cache_.CreateSequence());
      // Lengths spread over a block, so that not all tails become full in one step.
      const int length = context - (context > kBlockTokens ? s * 37 % kBlockTokens : 0);
      if (length > 0) RETURN_IF_ERROR(bench->Append(static_cast<size_t>(s), length, false));
    }
    bench->cache_.FinishStep();
    return bench;
  }

  // Seconds of a step in which each sequence gets `rows` tokens more. Logits come of the last of them, but
  // not where the prompt goes on (`last` is false), as in serving.
  Result<double> Step(int rows, bool last = true) {
    batch_.Clear();
    MakeRoom(rows);
    for (size_t s = 0; s < ids_.size(); ++s) RETURN_IF_ERROR(Append(s, rows, true));
    if (!last) batch_.logits_rows.clear();
    const auto vocab = static_cast<size_t>(model_->config().text.vocab_size);
    tokens_.resize(ids_.size());
    if (!model_->samples()) logits_.resize(ids_.size() * vocab);
    const std::vector<TokenDraw> draws(batch_.logits_rows.size());
    const Clock::time_point begin = Clock::now();
    if (model_->samples())
      model_->ForwardAndSample(batch_, memory_.get(), draws, tokens_.data(), nullptr, [] {});
    else
      model_->Forward(batch_, memory_.get(), logits_.data());
    const double seconds = std::chrono::duration<double>(Clock::now() - begin).count();
    cache_.FinishStep();
    return seconds;
  }
  int64_t KvBytes() const { return cache_.Usage().total_bytes(); }
  bool on_gpu() const { return memory_->layout() != "cpu-1"; }

 private:
  BenchSequences(Model* model, std::unique_ptr<KvMemory> memory, std::vector<Format> formats)
      : model_(model),
        memory_(std::move(memory)),
        cache_(memory_->geometry(), memory_->total_rows(), TagNeeds::ByIndex()),
        formats_(std::move(formats)) {}

  // Small BF16 numbers, which are finite as FP16 metadata too.
  static Status Fill(KvMemory* memory) {
#ifdef TRIAXIAL_CUDA
    if (const auto* on_device = dynamic_cast<const cuda::CudaKvMemory*>(memory)) {
      const cuda::CacheRegion region = on_device->region();
      cuda::FillNormal(1, region.layer_bytes * region.layers / 2, reinterpret_cast<uint16_t*>(region.data),
                       nullptr);
      CUDA_OK(cudaDeviceSynchronize());
      return OkStatus();
    }
#endif
    const auto layers = static_cast<size_t>(memory->geometry().num_layers);
    const auto row_bytes = static_cast<size_t>(UnitRowBytes(memory->geometry()));
    constexpr size_t kChunkBytes = size_t{256} << 20;
    const auto chunk = static_cast<int>(std::clamp<int64_t>(
        static_cast<int64_t>(kChunkBytes / (layers * row_bytes)), 1, memory->total_rows()));
    std::vector<uint8_t> bytes(layers * row_bytes * static_cast<size_t>(chunk));
    uint32_t random = 1;
    for (size_t i = 0; i + 1 < bytes.size(); i += 2) {
      random = random * 1664525 + 1013904223;
      const bf16_t x = FloatToBf16((static_cast<float>(random >> 16) - 32768.0f) * 1e-6f);
      bytes[i] = static_cast<uint8_t>(x);
      bytes[i + 1] = static_cast<uint8_t>(x >> 8);
    }
    for (int64_t row = 0; row < memory->total_rows(); row += chunk) {
      const auto rows = static_cast<int>(std::min<int64_t>(chunk, memory->total_rows() - row));
      RETURN_IF_ERROR(memory->Write(static_cast<uint32_t>(row), rows, bytes.data()));
    }
    return OkStatus();
  }

  // The next `count` of a sequence.
  std::vector<KvToken> NextTokens(SequenceId id, int count) const {
    const int32_t length = cache_.Length(id);
    std::vector<KvToken> tokens;
    for (int32_t t = length; t < length + count; ++t) {
      const size_t block = std::min(static_cast<size_t>(t / kBlockTokens), formats_.size() - 1);
      tokens.push_back({{}, static_cast<uint8_t>(formats_[block])});
    }
    return tokens;
  }

  // Tails of other sizes leave gaps between blocks; where those would stop a step, they are closed, as the
  // engine does.
  void MakeRoom(int count) {
    int64_t rows = 0;
    for (const SequenceId id : ids_) rows += cache_.RowsToAppend(id, NextTokens(id, count));
    if (!cache_.Fits(rows) || cache_.FitsWithoutCompaction(rows)) return;
    cache_.Compact([&](uint32_t from, uint32_t to, int moved) { memory_->Move(from, to, moved); });
  }

  Status Append(size_t s, int count, bool run) {
    const SequenceId id = ids_[s];
    const int32_t length = cache_.Length(id), row = batch_.rows();
    RETURN_IF_ERROR(cache_.Append(id, NextTokens(id, count), &append_));
    if (!run) return OkStatus();
    for (int32_t t = length; t < length + count; ++t) {
      batch_.tokens.push_back((t * 31 + static_cast<int32_t>(s)) % model_->config().text.vocab_size);
      batch_.positions.push_back({t, t, t});
    }
    batch_.sequences.push_back({row, count, cache_.View(id)});
    batch_.logits_rows.push_back(row + count - 1);
    for (KvStore store : append_.stores) {
      store.row_begin += row;
      batch_.stores.push_back(store);
    }
    batch_.converts.insert(batch_.converts.end(), append_.converts.begin(), append_.converts.end());
    return OkStatus();
  }

  Model* const model_;
  std::unique_ptr<KvMemory> memory_;
  KvCache cache_;
  const std::vector<Format> formats_;  // by block
  std::vector<SequenceId> ids_;
  Batch batch_;
  KvAppend append_;
  std::vector<int32_t> tokens_;
  std::vector<float> logits_;
};

// Multiply-adds of the decoder's products per token, without lm_head.
int64_t LayerProducts(const TextConfig& c) {
  const int64_t heads = int64_t{c.num_heads} * c.head_dim, kv = int64_t{c.num_kv_heads} * c.head_dim;
  return c.num_layers * c.hidden_size * (2 * heads + 2 * kv + int64_t{3} * c.intermediate_size);
}

// FLOP/s of oneDNN alone on the four products of a layer with `rows` rows.
double ProductRate(const TextConfig& c, Element element, int64_t rows, double seconds) {
  const int64_t heads = int64_t{c.num_heads} * c.head_dim, kv = int64_t{c.num_kv_heads} * c.head_dim;
  const std::pair<int64_t, int64_t> shapes[] = {{c.hidden_size, heads + 2 * kv},
                                                {heads, c.hidden_size},
                                                {c.hidden_size, 2 * c.intermediate_size},
                                                {c.intermediate_size, c.hidden_size}};
  LinearCache cache;
  std::vector<Linear> products;
  int64_t widest = 0, multiply_adds = 0;
  for (const auto& [in, out] : shapes) {
    const std::vector<uint8_t> zeros(static_cast<size_t>(in * out * ByteSize(element)));
    products.emplace_back(&cache, LinearShape{.in = in, .out = out, .input = element}, zeros.data(), nullptr);
    widest = std::max({widest, in, out});
    multiply_adds += rows * in * out;
  }
  Buffer x, y;
  const size_t bytes = static_cast<size_t>(rows * widest) * sizeof(float);
  std::fill_n(x.Reserve(bytes), bytes, uint8_t{0});
  y.Reserve(bytes);
  const double best = BestSeconds(seconds, [&] {
    for (const Linear& product : products) product.Run(x.data(), rows, y.data());
  });
  return 2.0 * static_cast<double>(multiply_adds) / best;
}

#ifdef TRIAXIAL_CUDA
// What a kernel is for, by its name: ours are known, those of cuBLAS and cuDNN follow their families'.
const char* PartOf(const std::string& name) {
  const auto has = [&](std::initializer_list<const char*> parts) {
    return std::any_of(parts.begin(), parts.end(),
                       [&](const char* p) { return name.find(p) != std::string::npos; });
  };
  if (has({"FinishQkv", "StoreKernel", "ConvertKernel"})) return "write path";
  if (has({"Decode", "Prefill", "Attention", "attention", "flash", "fmha"})) return "attention";
  if (has({"nvjet", "gemm", "cutlass", "splitK", "gemv", "cublas", "Fp8Product"})) return "products";
  if (name == "copy") return "copies";
  return "other";
}

// Milliseconds a step by part, and "idle": time in which the device did nothing between the first kernel and
// the end of the last.
Result<Json> TimeSplit(BenchSequences* sequences, int steps) {
  cuda::StepTrace trace;
  RETURN_IF_ERROR(trace.Start());
  for (int i = 0; i < steps; ++i) {
    const Result<double> seconds = sequences->Step(1);
    if (!seconds.ok()) return seconds.status();
  }
  const std::vector<cuda::TracedKernel> kernels = trace.Stop();
  if (kernels.empty()) return Internal("no kernel was recorded");
  std::map<std::string, double> ns;
  // Kernels may overlap: each is charged for what no earlier one has covered.
  int64_t covered = kernels.front().begin_ns;
  for (const cuda::TracedKernel& kernel : kernels) {
    ns["idle"] += static_cast<double>(std::max<int64_t>(0, kernel.begin_ns - covered));
    const int64_t from = std::max(kernel.begin_ns, covered);
    ns[PartOf(kernel.name)] += static_cast<double>(std::max<int64_t>(0, kernel.end_ns - from));
    covered = std::max(covered, kernel.end_ns);
  }
  Json json = Json::object();
  for (const auto& [part, sum] : ns) json[part] = 1e-6 * sum / steps;
  return json;
}
#endif

class ModelBench {
 public:
  explicit ModelBench(const ModelBenchFlags& flags) : flags_(flags) {}

  Status Run() {
    SetComputeThreads(flags_.threads);
    std::vector<FormatMix> mixes;
    for (const std::string& text : flags_.formats) {
      ASSIGN_OR_RETURN(const FormatMix mix, ParseFormatMix(text));
      mixes.push_back(mix);
    }
    ModelOptions options;
    options.device = flags_.device == "cpu"    ? Device::kCpu
                     : flags_.device == "cuda" ? Device::kCuda
                                               : Device::kAuto;
    options.precision = PrecisionOf(flags_.dtype);
    options.dummy_weights = flags_.load_format == "dummy";
    options.codec = *ParseCodec(flags_.codec);
    Json report = DescribeRun();
    const Clock::time_point begin = Clock::now();
    ASSIGN_OR_RETURN(model_, Model::Load(flags_.model, options));
    report["model"] = flags_.model;
    report["dummy_weights"] = options.dummy_weights;
    report["load_seconds"] = std::chrono::duration<double>(Clock::now() - begin).count();
    report["parameters"] = model_->parameters();
    report["decode_weight_bytes"] = model_->decode_weight_bytes();
    report["dtype"] = flags_.dtype;
    report["kv_codec"] = flags_.codec;
    bool on_gpu = false;
    {
      ASSIGN_OR_RETURN(const auto probe, BenchSequences::Create(model_.get(), mixes.front(), 1, 0, 64));
      on_gpu = probe->on_gpu();
    }
    report["device"] = on_gpu ? "cuda" : "cpu";
    MeasureMachine(on_gpu);
    report["copy_gb_per_s"] = copy_;
    if (product_rate_ > 0) report["product_gflops"] = 1e-9 * product_rate_;
    std::printf(
        "%s%s on %s: %s parameters; copy %.1f GB/s%s\n\n", flags_.model.c_str(),
        options.dummy_weights ? " (random weights)" : "", on_gpu ? "the GPU" : "the CPU",
        Count(model_->parameters()).c_str(), copy_,
        product_rate_ > 0
            ? (", oneDNN's products at these shapes " + Fixed(1e-9 * product_rate_, 0) + " GFLOP/s").c_str()
            : "");
    ASSIGN_OR_RETURN(report["prefill"], Prefill(mixes));
    ASSIGN_OR_RETURN(report["decode_steps"], Decode(mixes, on_gpu));
    return flags_.json.empty() ? OkStatus() : WriteFile(flags_.json, report.dump(1) + "\n");
  }

 private:
  void MeasureMachine(bool on_gpu) {
#ifdef TRIAXIAL_CUDA
    if (on_gpu) {
      copy_ = cuda::DeviceCopyGbPerS();
      return;
    }
#endif
    CHECK(!on_gpu);
    copy_ = CopyBandwidth();
    const Element element = flags_.dtype == "bf16" && HasBf16Products() ? Element::kBf16 : Element::kF32;
    product_rate_ = ProductRate(model_->config().text, element, flags_.chunk, flags_.seconds);
  }

  // A prompt of each length, in chunks.
  Result<Json> Prefill(const std::vector<FormatMix>& mixes) {
    const TextConfig& text = model_->config().text;
    Json results = Json::array();
    Table table({"prompt", "KV format", "tokens/s", "TFLOP/s", "of products"},
                {true, false, true, true, true});
    for (const int context : flags_.contexts) {
      for (const FormatMix& mix : mixes) {
        double best = std::numeric_limits<double>::infinity();
        const Clock::time_point begin = Clock::now();
        do {
          ASSIGN_OR_RETURN(const auto sequence, BenchSequences::Create(model_.get(), mix, 1, 0, context));
          double seconds = 0;
          for (int done = 0; done < context; done += flags_.chunk) {
            const int rows = std::min(flags_.chunk, context - done);
            ASSIGN_OR_RETURN(const double step, sequence->Step(rows, done + rows == context));
            seconds += step;
          }
          best = std::min(best, seconds);
        } while (std::chrono::duration<double>(Clock::now() - begin).count() < flags_.seconds);
        const double products = 2.0 * (static_cast<double>(LayerProducts(text)) * context +
                                       static_cast<double>(text.hidden_size) * text.vocab_size);
        Json result = {{"context", context},
                       {"format", mix.Name()},
                       {"chunk", flags_.chunk},
                       {"tokens_per_s", context / best},
                       {"product_tflop_per_s", 1e-12 * products / best}};
        if (product_rate_ > 0) result["share_of_products"] = products / product_rate_ / best;
        table.Add({Count(context), mix.Name(), Fixed(context / best, 1), Fixed(1e-12 * products / best, 2),
                   product_rate_ > 0 ? Fixed(100 * products / product_rate_ / best, 0) + "%" : ""});
        results.push_back(std::move(result));
      }
    }
    table.Print();
    std::puts("");
    return results;
  }

  Result<Json> Decode(const std::vector<FormatMix>& mixes, bool on_gpu) {
    Json results = Json::array();
    Table table({"batch", "context", "KV format", "ms/step", "tokens/s", "GB/s", "of copy",
                 "where the time goes, ms"},
                {true, true, false, true, true, true, true, false});
    for (const int batch : flags_.batches) {
      for (const int context : flags_.contexts) {
        for (const FormatMix& mix : mixes) {
          constexpr int kWarm = 3, kTraced = 6;
          Result<std::unique_ptr<BenchSequences>> made =
              BenchSequences::Create(model_.get(), mix, batch, context, flags_.steps + kWarm + kTraced);
          if (!made.ok() && made.status().code() == Code::kResourceExhausted) {
            table.Add({std::to_string(batch), Count(context), mix.Name(), "does not fit"});
            continue;
          }
          if (!made.ok()) return made.status();
          BenchSequences& sequences = **made;
          std::vector<double> times;
          for (int i = 0; i < kWarm + flags_.steps; ++i) {
            ASSIGN_OR_RETURN(const double seconds, sequences.Step(1));
            if (i >= kWarm) times.push_back(seconds);
          }
          std::sort(times.begin(), times.end());
          // On the CPU other work disturbs: the fastest counts there.
          const double step = on_gpu ? times[times.size() / 2] : times.front();
          const auto bytes = static_cast<double>(model_->decode_weight_bytes() + sequences.KvBytes());
          const double gb = 1e-9 * bytes / step;
          Json result = {{"batch", batch},        {"context", context},           {"format", mix.Name()},
                         {"step_ms", 1e3 * step}, {"tokens_per_s", batch / step}, {"bytes", bytes},
                         {"gb_per_s", gb},        {"share_of_copy", gb / copy_}};
          std::string split;
#ifdef TRIAXIAL_CUDA
          if (on_gpu) {
            const Result<Json> parts = TimeSplit(&sequences, kTraced);
            split = parts.ok() ? "" : parts.status().message();
            if (parts.ok()) {
              result["split_ms"] = *parts;
              for (const auto& [part, ms] : parts->items())
                split += (split.empty() ? "" : ", ") + part + " " + Fixed(ms.get<double>(), 3);
            }
          }
#endif
          table.Add({std::to_string(batch), Count(context), mix.Name(), Fixed(1e3 * step, 3),
                     Fixed(batch / step, 2), Fixed(gb, 1), Fixed(100 * gb / copy_, 0) + "%", split});
          results.push_back(std::move(result));
        }
      }
    }
    table.Print();
    return results;
  }

  const ModelBenchFlags& flags_;
  std::unique_ptr<Model> model_;
  double copy_ = 0, product_rate_ = 0;
};

}  // namespace

Command AddBenchModel(CLI::App* bench) {
  auto flags = std::make_shared<ModelBenchFlags>();
  CLI::App* command =
      bench->add_subcommand("model", "Prefill and decode of a model, as shares of what the machine allows");
  command->add_option("--model", flags->model, "Hugging Face checkpoint directory")->capture_default_str();
  command
      ->add_option("--load-format", flags->load_format,
                   "'dummy' makes random weights of config.json's shapes")
      ->check(CLI::IsMember({"auto", "dummy"}))
      ->capture_default_str();
  command->add_option("--device", flags->device, "cpu, cuda, or auto: a GPU if there is one")
      ->check(CLI::IsMember({"auto", "cpu", "cuda"}))
      ->capture_default_str();
  command->add_option("--dtype", flags->dtype, "Arithmetic: bf16; fp8 on a GPU; f32 on the CPU")
      ->check(CLI::IsMember({"bf16", "fp8", "f32"}))
      ->capture_default_str();
  command->add_option("--kv-codec", flags->codec)
      ->check(CLI::IsMember({"rotated", "paper"}))
      ->capture_default_str();
  command->add_option("--formats", flags->formats, "Of KV blocks: formats, or mixes such as 75k2v2+25k4v4")
      ->delimiter(',')
      ->capture_default_str();
  command->add_option("--contexts", flags->contexts, "Tokens of a prompt, and in the cache of a decode step")
      ->delimiter(',')
      ->check(CLI::Range(1, 1 << 22))
      ->capture_default_str();
  command->add_option("--batches", flags->batches, "Sequences of a decode step")
      ->delimiter(',')
      ->check(CLI::Range(1, 4096))
      ->capture_default_str();
  command->add_option("--chunk", flags->chunk, "Rows of a prefill step")
      ->check(CLI::Range(1, 1 << 16))
      ->capture_default_str();
  command->add_option("--steps", flags->steps, "Timed decode steps")
      ->check(CLI::Range(1, 100000))
      ->capture_default_str();
  command->add_option("--seconds", flags->seconds, "Time of each other measurement")
      ->check(CLI::Range(0.0, 1000.0))
      ->capture_default_str();
  command->add_option("--threads", flags->threads, "Compute threads of the CPU (default: all cores)")
      ->check(CLI::Range(0, 1024));
  command->add_option("--json", flags->json, "File for the results");
  return [flags]() -> Status {
    try {
      return ModelBench(*flags).Run();
    } catch (const std::exception& error) {
      return Internal(std::string("the device failed: ") + error.what());
    }
  };
}

}  // namespace triaxial
