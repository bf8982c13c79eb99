// `triaxial bench decode`, `prefill` and `codec`: single operators of the KV cache, next to what the
// machine's memory allows.
#include <algorithm>
#include <cstdio>
#include <map>

#include "apps/bench.h"
#include "apps/bench_kernels.h"
#include "apps/bench_machine.h"
#include "apps/terminal.h"
#include "base/file.h"
#include "base/json.h"
#include "base/parallel.h"

namespace triaxial {
namespace {

struct KernelFlags {
  std::string device = "auto";
  int threads = 0;
  std::vector<int> contexts = {2048, 8192, 32768};
  std::vector<int> batches = {1};
  std::vector<int> groups = {4, 8};
  std::vector<std::string> formats;
  int rows = 512;
  int kv_heads = 8;
  int head_dim = 128;
  std::string codec = "rotated";
  double seconds = 1;
  std::string json;
};

Result<std::unique_ptr<KernelBench>> MakeBench(const KernelFlags& flags) {
  SetComputeThreads(flags.threads);
#ifdef TRIAXIAL_CUDA
  if (flags.device != "cpu") {
    Result<std::unique_ptr<KernelBench>> cuda = CudaKernelBench();
    if (cuda.ok() || flags.device == "cuda") return cuda;
  }
#else
  if (flags.device == "cuda") {
    return InvalidArgument(
        "this binary was built without CUDA; build the preset cuda on a machine with the CUDA toolkit, or "
        "give "
        "--device cpu");
  }
#endif
  return CpuKernelBench();
}

// A GPU that fails says so by an exception.
Status Guarded(const std::function<Status()>& run) {
  try {
    return run();
  } catch (const std::exception& error) {
    return Internal(std::string("the device failed: ") + error.what());
  }
}

// What all three commands do around their measurements.
class KernelReport {
 public:
  KernelReport(const KernelFlags& flags, KernelBench* bench)
      : flags_(flags), bench_(bench), json_(DescribeRun()) {
    geometry_ = {1, flags.kv_heads, flags.head_dim, *ParseCodec(flags.codec)};
    copy_ = bench->CopyGbPerS();
    read_ = bench->ReadGbPerS();
    json_["device"] = bench->device();
    json_["copy_gb_per_s"] = copy_;
    json_["read_gb_per_s"] = read_;
    json_["codec"] = flags.codec;
    json_["kv_heads"] = flags.kv_heads;
    json_["head_dim"] = flags.head_dim;
    std::printf("%s: copy %.1f GB/s (read + write), read %.1f GB/s; %d KV heads of %d, codec %s\n\n",
                bench->device().c_str(), copy_, read_, flags.kv_heads, flags.head_dim, flags.codec.c_str());
  }

  Json& json() { return json_; }
  const KvGeometry& geometry() const { return geometry_; }
  double copy() const { return copy_; }
  double read() const { return read_; }

  Status Finish() {
    const std::vector<KernelResources> resources = bench_->Resources();
    if (!resources.empty()) {
      std::puts("");
      Table table({"kernel", "registers", "local bytes", "shared bytes"}, {false, true, true, true});
      for (const KernelResources& r : resources) {
        table.Add({r.name, std::to_string(r.registers), std::to_string(r.local_bytes),
                   std::to_string(r.shared_bytes)});
        json_["kernels"].push_back({{"name", r.name},
                                    {"registers", r.registers},
                                    {"local_bytes", r.local_bytes},
                                    {"shared_bytes", r.shared_bytes}});
      }
      table.Print();
    }
    return flags_.json.empty() ? OkStatus() : WriteFile(flags_.json, json_.dump(1) + "\n");
  }

 private:
  const KernelFlags& flags_;
  KernelBench* const bench_;
  Json json_;
  KvGeometry geometry_;
  double copy_ = 0, read_ = 0;
};

Result<std::vector<FormatMix>> Mixes(const KernelFlags& flags) {
  std::vector<FormatMix> mixes;
  for (const std::string& text : flags.formats) {
    ASSIGN_OR_RETURN(const FormatMix mix, ParseFormatMix(text));
    mixes.push_back(mix);
  }
  return mixes;
}

Status RunAttention(const KernelFlags& flags, bool decode) {
  ASSIGN_OR_RETURN(const std::vector<FormatMix> mixes, Mixes(flags));
  ASSIGN_OR_RETURN(const std::unique_ptr<KernelBench> bench, MakeBench(flags));
  KernelReport report(flags, bench.get());
  std::printf("%5s %5s %8s %-16s ", "group", "batch", decode ? "context" : "prefix", "format");
  std::puts(decode ? "  ns/token     GB/s  of copy  of read   x bf16    error"
                   : "        ms    ns/row  GFLOP/s   x bf16    error");
  Json& results = report.json()[decode ? "decode" : "prefill"];
  results = Json::array();
  // The first format of a shape is what the others are compared with.
  std::map<std::tuple<int, int, int>, double> base;
  for (const int group : flags.groups) {
    for (const int batch : flags.batches) {
      for (const int context : flags.contexts) {
        for (const FormatMix& mix : mixes) {
          if (context == 0 && mix.Name() != "bf16") continue;  // the step's own rows have no format
          const AttentionCase c{report.geometry(),       group, batch, context / kBlockTokens * kBlockTokens,
                                decode ? 1 : flags.rows, mix};
          ASSIGN_OR_RETURN(const KernelTime time, bench->TimeAttention(c, flags.seconds));
          double& reference = base[{group, batch, context}];
          if (mix.Name() == "bf16") reference = time.seconds;
          const double faster = reference / time.seconds;
          const double tokens =
              static_cast<double>(batch) * (decode ? static_cast<double>(c.context) : c.rows);
          const double ns = 1e9 * time.seconds / tokens,
                       gb = 1e-9 * static_cast<double>(time.bytes) / time.seconds;
          const double pairs = static_cast<double>(c.context) + (c.rows + 1) / 2.0;
          const double flop =
              4.0 * batch * c.rows * flags.kv_heads * group * static_cast<double>(flags.head_dim) * pairs;
          Json result = {{"group", group},
                         {"batch", batch},
                         {decode ? "context" : "prefix", c.context},
                         {"format", mix.Name()}};
          std::printf("%5d %5d %8lld %-16s ", group, batch, static_cast<long long>(c.context),
                      mix.Name().c_str());
          const std::string times = reference > 0 ? Fixed(faster, 2) : "";
          if (decode) {
            std::printf("%10.2f %8.1f %7.0f%% %7.0f%% %8s %8.1e\n", ns, gb, 100 * gb / report.copy(),
                        100 * gb / report.read(), times.c_str(), time.error);
            result.update({{"us", 1e6 * time.seconds},
                           {"ns_per_token", ns},
                           {"gb_per_s", gb},
                           {"share_of_copy", gb / report.copy()},
                           {"share_of_read", gb / report.read()}});
          } else {
            std::printf("%10.3f %9.1f %8.0f %8s %8.1e\n", 1e3 * time.seconds, ns, 1e-9 * flop / time.seconds,
                        times.c_str(), time.error);
            result.update({{"rows", c.rows},
                           {"ms", 1e3 * time.seconds},
                           {"ns_per_row", ns},
                           {"gflop_per_s", 1e-9 * flop / time.seconds}});
          }
          std::fflush(stdout);
          if (reference > 0) result["times_bf16"] = faster;
          result["relative_error"] = time.error;
          results.push_back(std::move(result));
        }
      }
    }
  }
  return report.Finish();
}

Status RunCodec(const KernelFlags& flags) {
  ASSIGN_OR_RETURN(const std::unique_ptr<KernelBench> bench, MakeBench(flags));
  KernelReport report(flags, bench.get());
  using Op = CodecCase::Op;
  std::vector<CodecCase> cases;
  for (const int blocks : flags.batches) {
    cases.push_back({report.geometry(), Op::kAppend, blocks, Format::kBf16, Format::kBf16});
    for (int f = kFormats - 1; f >= 0; --f)
      cases.push_back({report.geometry(), Op::kStore, blocks, Format::kBf16, static_cast<Format>(f)});
    // Ageing and pressure only ever go to fewer bits.
    for (int from = kFormats - 1; from > 0; --from) {
      for (int to = from - 1; to >= 0; --to)
        cases.push_back(
            {report.geometry(), Op::kConvert, blocks, static_cast<Format>(from), static_cast<Format>(to)});
    }
  }
  std::printf("%-8s %-5s %-5s %7s %10s %9s %9s %8s\n", "what", "from", "to", "blocks", "us", "ns/token",
              "GB/s", "of copy");
  Json& results = report.json()["codec_operations"];
  results = Json::array();
  for (const CodecCase& c : cases) {
    ASSIGN_OR_RETURN(const KernelTime time, bench->TimeCodec(c, flags.seconds));
    const double tokens = static_cast<double>(c.blocks) * (c.op == Op::kAppend ? 1 : kBlockTokens);
    const double ns = 1e9 * time.seconds / tokens, gb = 1e-9 * static_cast<double>(time.bytes) / time.seconds;
    const std::string from = c.op == Op::kConvert ? std::string(Name(c.from)) : "rows", to(Name(c.to));
    std::printf("%-8s %-5s %-5s %7lld %10.2f %9.2f %9.1f %7.0f%%\n", std::string(Name(c.op)).c_str(),
                from.c_str(), to.c_str(), static_cast<long long>(c.blocks), 1e6 * time.seconds, ns, gb,
                100 * gb / report.copy());
    std::fflush(stdout);
    results.push_back({{"operation", Name(c.op)},
                       {"from", from},
                       {"to", to},
                       {"blocks", c.blocks},
                       {"us", 1e6 * time.seconds},
                       {"ns_per_token", ns},
                       {"gb_per_s", gb},
                       {"share_of_copy", gb / report.copy()}});
  }
  return report.Finish();
}

void AddKernelFlags(CLI::App* command, KernelFlags* flags) {
  command
      ->add_option("--device", flags->device,
                   "cpu or cuda (default: cuda where this binary and machine have it)")
      ->check(CLI::IsMember({"auto", "cpu", "cuda"}))
      ->capture_default_str();
  command->add_option("--threads", flags->threads, "Compute threads of the CPU (default: all cores)")
      ->check(CLI::Range(0, 1024));
  command->add_option("--kv-heads", flags->kv_heads)->check(CLI::Range(1, 64))->capture_default_str();
  command->add_option("--head-dim", flags->head_dim)->check(CLI::IsMember({64, 128}))->capture_default_str();
  command->add_option("--kv-codec", flags->codec)
      ->check(CLI::IsMember({"rotated", "paper"}))
      ->capture_default_str();
  command->add_option("--seconds", flags->seconds, "Time of each measurement; its fastest pass counts")
      ->check(CLI::Range(0.001, 1000.0))
      ->capture_default_str();
  command->add_option("--json", flags->json, "File for the results");
}

Command AddAttention(CLI::App* bench, const char* name, const char* help, bool decode) {
  auto flags = std::make_shared<KernelFlags>();
  for (int f = kFormats - 1; f >= 0; --f) flags->formats.emplace_back(Name(static_cast<Format>(f)));
  flags->formats.emplace_back("75k2v2+25k4v4");
  if (!decode) {
    flags->contexts = {0, 2048, 8192};
    flags->groups = {4};
  }
  CLI::App* command = bench->add_subcommand(name, help);
  AddKernelFlags(command, flags.get());
  command
      ->add_option(decode ? "--contexts" : "--prefixes", flags->contexts,
                   "Tokens in the cache of each sequence")
      ->delimiter(',')
      ->check(CLI::Range(decode ? kBlockTokens : 0, 1 << 22))
      ->capture_default_str();
  command->add_option("--batches", flags->batches, "Sequences of a step")
      ->delimiter(',')
      ->check(CLI::Range(1, 4096))
      ->capture_default_str();
  command->add_option("--groups", flags->groups, "Query heads of a KV head")
      ->delimiter(',')
      ->check(CLI::Range(1, 16))
      ->capture_default_str();
  command->add_option("--formats", flags->formats, "Formats, or mixes of them such as 75k2v2+25k4v4")
      ->delimiter(',')
      ->capture_default_str();
  if (!decode)
    command->add_option("--rows", flags->rows, "Rows of the chunk")
        ->check(CLI::Range(2, 1 << 16))
        ->capture_default_str();
  return [flags, decode] { return Guarded([&] { return RunAttention(*flags, decode); }); };
}

}  // namespace

Command AddBenchDecode(CLI::App* bench) {
  return AddAttention(bench, "decode", "Attention of one new token per sequence over the KV cache, by format",
                      true);
}

Command AddBenchPrefill(CLI::App* bench) {
  return AddAttention(bench, "prefill", "Attention of a chunk of new tokens over the KV cache, by format",
                      false);
}

Command AddBenchCodec(CLI::App* bench) {
  auto flags = std::make_shared<KernelFlags>();
  flags->batches = {64};
  CLI::App* command =
      bench->add_subcommand("codec", "The write path of the KV cache: append, store, re-quantize");
  AddKernelFlags(command, flags.get());
  command->add_option("--blocks", flags->batches, "Blocks (of append: sequences) of a step")
      ->delimiter(',')
      ->check(CLI::Range(1, 1 << 16))
      ->capture_default_str();
  return [flags] { return Guarded([&] { return RunCodec(*flags); }); };
}

}  // namespace triaxial
