// Prefill and decode of whole models, next to what this machine allows: prefill against the rate of oneDNN's
// matrix products at the model's shapes, decode against the time that its bytes take at copy bandwidth.
#include <fmt/core.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "apps/bench_machine.h"
#include "base/file.h"
#include "model/model.h"
#include "model/single_sequence.h"
#include "ops/buffer.h"
#include "ops/linear.h"

namespace triaxial {
namespace {

struct Options {
  std::string model;  // empty: the pocket agent, then Qwen3-VL-2B with dummy weights
  bool dummy = false;
  bool f32 = false;
  std::string format = "bf16";
  std::vector<int> contexts = {512, 2048};
  int chunk = 512;
  double seconds = 5;  // per measurement
  std::string json;
};

constexpr int kDecodeSteps = 48;
constexpr double kOnce = 1e-9;  // seconds: the first call passes it

// Multiply-adds of the decoder's products per token, without lm_head.
int64_t LayerProducts(const TextConfig& c) {
  const int64_t heads = int64_t{c.num_heads} * c.head_dim;
  const int64_t kv = int64_t{c.num_kv_heads} * c.head_dim;
  return c.num_layers * c.hidden_size * (2 * heads + 2 * kv + int64_t{3} * c.intermediate_size);
}

// FLOP/s of oneDNN alone on the four products of a layer with `rows` rows.
double ProductRate(const TextConfig& c, Element element, int64_t rows, double seconds) {
  const int64_t heads = int64_t{c.num_heads} * c.head_dim;
  const int64_t kv = int64_t{c.num_kv_heads} * c.head_dim;
  const std::pair<int64_t, int64_t> shapes[] = {{c.hidden_size, heads + 2 * kv},
                                                {heads, c.hidden_size},
                                                {c.hidden_size, 2 * c.intermediate_size},
                                                {c.intermediate_size, c.hidden_size}};
  LinearCache cache;
  std::vector<Linear> products;
  int64_t widest = 0;
  int64_t multiply_adds = 0;
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

Status Measure(const Options& options, Json* result) {
  const std::optional<Format> format = ParseFormat(options.format);
  if (!format)
    return InvalidArgument("--format is '" + options.format + "'; bf16, k4v4, k4v2 and k2v2 exist");
  ASSIGN_OR_RETURN(const std::unique_ptr<Model> model,
                   Model::Load(options.model, {.precision = options.f32 ? Precision::kF32 : Precision::kBf16,
                                               .dummy_weights = options.dummy}));
  const TextConfig& text = model->config().text;
  const Element element = !options.f32 && HasBf16Products() ? Element::kBf16 : Element::kF32;
  const double copy = CopyBandwidth();
  const double read = ReadBandwidth();
  const double rate = ProductRate(text, element, options.chunk, options.seconds);
  *result = {{"model", options.model},
             {"dummy_weights", options.dummy},
             {"element", element == Element::kBf16 ? "bf16" : "f32"},
             {"kv_format", options.format},
             {"parameters", model->parameters()},
             {"decode_weight_bytes", model->decode_weight_bytes()},
             {"copy_gb_per_s", copy},
             {"read_gb_per_s", read},
             {"product_gflops", rate / 1e9},
             {"chunk_rows", options.chunk},
             {"contexts", Json::array()}};
  for (const int context : options.contexts) {
    ASSIGN_OR_RETURN(const std::unique_ptr<SingleSequence> sequence,
                     SingleSequence::Create(model.get(), *format, context + kDecodeSteps));
    std::vector<int32_t> tokens;
    for (int i = 0; i < context; ++i) tokens.push_back(i * 7 % text.vocab_size);
    const MropePositions positions = ComputePositions(context + 1, {});
    const std::span<const std::array<int32_t, 3>> all(positions.positions);
    const auto count = static_cast<size_t>(context);
    std::vector<float> logits;
    Status status;
    const double prefill = BestSeconds(options.seconds, [&] {
      sequence->Clear();
      const Status s = sequence->Append(tokens, all.first(count), {}, options.chunk, 1, &logits);
      if (!s.ok()) status = s;
    });
    const auto usage = sequence->Usage();
    double decode = prefill;
    for (int step = 0; step < kDecodeSteps; ++step) {
      decode =
          std::min(decode, BestSeconds(kOnce, [&] {
                     const Status s = sequence->Append({tokens.data(), 1}, all.last(1), {}, 1, 1, &logits);
                     if (!s.ok()) status = s;
                   }));
    }
    RETURN_IF_ERROR(status);
    const double products = 2.0 * (static_cast<double>(LayerProducts(text)) * context +
                                   static_cast<double>(text.hidden_size) * text.vocab_size);
    const auto bytes = static_cast<double>(model->decode_weight_bytes() + usage.total_bytes());
    (*result)["contexts"].push_back({{"context", context},
                                     {"prefill_tokens_per_s", context / prefill},
                                     {"prefill_share_of_products", products / rate / prefill},
                                     {"decode_tokens_per_s", 1 / decode},
                                     {"decode_bytes", bytes},
                                     {"decode_gb_per_s", bytes / decode / 1e9},
                                     {"decode_share_of_copy", bytes / decode / 1e9 / copy}});
  }
  return OkStatus();
}

void PrintTable(const Json& r) {
  fmt::print("{}{}: {:.1f} M parameters, {} products, {} cache\n", r["model"].get<std::string>(),
             r["dummy_weights"].get<bool>() ? " (dummy weights)" : "", r["parameters"].get<double>() / 1e6,
             r["element"].get<std::string>(), r["kv_format"].get<std::string>());
  fmt::print(
      "copy {:.1f} GB/s, read {:.1f} GB/s, oneDNN at the model's shapes and {} rows {:.0f} GFLOP/s\n\n",
      r["copy_gb_per_s"].get<double>(), r["read_gb_per_s"].get<double>(), r["chunk_rows"].get<int>(),
      r["product_gflops"].get<double>());
  fmt::print("{:>8} {:>14} {:>18} {:>13} {:>8} {:>14}\n", "context", "prefill tok/s", "share of products",
             "decode tok/s", "GB/s", "share of copy");
  for (const Json& c : r["contexts"]) {
    fmt::print("{:>8} {:>14.1f} {:>17.0f}% {:>13.2f} {:>8.1f} {:>13.0f}%\n", c["context"].get<int>(),
               c["prefill_tokens_per_s"].get<double>(), 100 * c["prefill_share_of_products"].get<double>(),
               c["decode_tokens_per_s"].get<double>(), c["decode_gb_per_s"].get<double>(),
               100 * c["decode_share_of_copy"].get<double>());
  }
}

int Main(int argc, char** argv) {
  Options options;
  CLI::App app{"Prefill and decode speed of a model, as shares of what the machine allows"};
  app.add_option("--model", options.model,
                 "checkpoint directory; without it, the pocket agent and a dummy Qwen3-VL-2B");
  app.add_flag("--dummy", options.dummy, "random weights; only config.json is read");
  app.add_flag("--f32", options.f32, "products in F32 instead of BF16");
  app.add_option("--format", options.format, "of complete KV blocks")->capture_default_str();
  app.add_option("--contexts", options.contexts, "prompt lengths")
      ->delimiter(',')
      ->check(CLI::Range(1, 1 << 20))
      ->capture_default_str();
  app.add_option("--chunk", options.chunk, "rows of a prefill step")
      ->check(CLI::Range(1, 512))
      ->capture_default_str();
  app.add_option("--seconds", options.seconds, "time for each measurement")->capture_default_str();
  app.add_option("--json", options.json, "file for the results");
  CLI11_PARSE(app, argc, argv);
  std::vector<std::pair<std::string, bool>> models = {{options.model, options.dummy}};
  if (options.model.empty()) models = {{"models/pocket-agent", false}, {"bench/configs/qwen3-vl-2b", true}};
  Json report = DescribeRun();
  report["models"] = Json::array();
  Status status;
  for (size_t i = 0; i < models.size() && status.ok(); ++i) {
    std::tie(options.model, options.dummy) = models[i];
    Json result;
    status = Measure(options, &result);
    if (!status.ok()) break;
    PrintTable(result);
    report["models"].push_back(std::move(result));
  }
  if (status.ok() && !options.json.empty()) status = WriteFile(options.json, report.dump(1) + "\n");
  if (!status.ok()) fmt::print(stderr, "model_speed: {}\n", status.message());
  return status.ok() ? 0 : 1;
}

}  // namespace
}  // namespace triaxial

int main(int argc, char** argv) { return triaxial::Main(argc, argv); }
