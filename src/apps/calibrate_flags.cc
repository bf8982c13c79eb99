#include "apps/calibrate_flags.h"

#include <algorithm>
#include <atomic>
#include <csignal>
#include <cstdio>

#include "apps/terminal.h"
#include "base/parallel.h"
#include "calib/codec_fit.h"

namespace triaxial {
namespace {

std::atomic<bool> interrupted = false;

}  // namespace

void AddMeasureFlags(CLI::App* app, MeasureFlags* flags) {
  flags->model.dtype = "f32";
  app->add_option("--dtype", flags->model.dtype, "Arithmetic of the model: bf16, or f32")
      ->check(CLI::IsMember({"bf16", "f32"}))
      ->capture_default_str();
  app->add_option("--max-conversations", flags->max_conversations,
                  "As many, chosen by the seed (default: all)")
      ->check(CLI::Range(1, 1 << 30));
  app->add_option("--max-tokens", flags->max_tokens,
                  "Longer conversations are cut to so many tokens (default: what the model takes)")
      ->check(CLI::Range(1, 1 << 24));
  app->add_option("--seed", flags->seed, "Chooses and orders the conversations")->capture_default_str();
  app->add_option("--threads", flags->model.threads, "Compute threads (default: all cores)")
      ->check(CLI::Range(0, 1024));
}

std::vector<std::string> MetricNames() {
  std::vector<std::string> names;
  names.reserve(kAllMetrics.size());
  for (const Metric metric : kAllMetrics) names.emplace_back(Name(metric));
  return names;
}

void AddMethodFlags(CLI::App* app, MeasureFlags* flags) {
  app->add_option("--kv-codec", flags->model.kv_codec, "How blocks are quantized")
      ->check(CLI::IsMember({"rotated", "paper"}))
      ->capture_default_str();
  app->add_option("--layers", flags->layers,
                  "Replay so many layers, evenly spread (default: all of up to 16, else 4)")
      ->check(CLI::Range(1, 1 << 16));
  app->add_option(
         "--metric", flags->metric,
         "mse: squared error of the attention output (as published); output: of what o_proj makes of "
         "it; kl: divergence of the next token's distribution, by a pass of the model for every tag "
         "and format (slow)")
      ->check(CLI::IsMember(MetricNames()))
      ->capture_default_str();
  app->add_option(
         "--aggregate", flags->aggregate,
         "Over the heads of a layer, of the metrics mse (default: max, as published) and output (mean)")
      ->check(CLI::IsMember({"max", "mean"}));
  app->add_option(
         "--tags-at", flags->tags_at,
         "end: tags as they are at the conversation's end, for all queries (as published); turn: as they are "
         "at each query's turn (as served). Default: turn, but end for the metric kl, which knows no other")
      ->check(CLI::IsMember({"end", "turn"}));
}

namespace {

// While it lives, an interrupt from the keyboard is noted; a second one ends the process, as ever.
class InterruptGuard {
 public:
  InterruptGuard()
      : before_(std::signal(SIGINT, [](int) {
          interrupted = true;
          std::signal(SIGINT, SIG_DFL);
        })) {}
  ~InterruptGuard() { std::signal(SIGINT, before_); }
  InterruptGuard(const InterruptGuard&) = delete;
  InterruptGuard& operator=(const InterruptGuard&) = delete;

 private:
  void (*before_)(int);
};

Result<KvCalibration> FitAndSave(const ServedModel& model, const Trajectories& trajectories,
                                 const MeasureFlags& flags) {
  ProgressBar bar("fitting the codec");
  CodecFitOptions options;
  if (flags.max_conversations > 0) {
    options.factor_conversations = std::min(options.factor_conversations, flags.max_conversations);
    options.level_conversations = std::min(options.level_conversations, flags.max_conversations);
  }
  options.progress = [&](double fraction) {
    bar.Update(fraction);
    return !interrupted.load();
  };
  const InterruptGuard guard;
  ASSIGN_OR_RETURN(KvCalibration calibration, FitCodec(model, trajectories, options));
  RETURN_IF_ERROR(SaveKvCalibration(flags.codec_out, calibration, model.config.text.head_dim));
  return calibration;
}

}  // namespace

Result<Measurement> PrepareMeasurement(const MeasureFlags& flags, const std::vector<int>& layers) {
  SetComputeThreads(flags.model.threads);
  Measurement m;
  ASSIGN_OR_RETURN(m.trajectories, Trajectories::Open(flags.trajectories));
  ASSIGN_OR_RETURN(m.model, LoadServedModel(flags.model.model, flags.model.tokenizer));
  SensitivityOptions options;
  options.layers = layers;
  if (layers.empty()) options.layers = SpreadLayers(m.model.config.text.num_layers, flags.layers);
  for (const Metric metric : kAllMetrics) {
    if (Name(metric) == flags.metric) options.metric = metric;
  }
  const std::string aggregate = !flags.aggregate.empty()   ? flags.aggregate
                                : flags.metric == "output" ? "mean"
                                                           : "max";
  options.aggregate = aggregate == "mean" ? Aggregate::kMean : Aggregate::kMax;
  const std::string tags_at = !flags.tags_at.empty() ? flags.tags_at : flags.metric == "kl" ? "end" : "turn";
  options.tags_at = tags_at == "turn" ? TagTime::kTurn : TagTime::kEnd;
  ModelOptions model_options;
  model_options.precision = PrecisionOf(flags.model.dtype);
  model_options.codec = flags.model.kv_codec == "paper" ? Codec::kPaper : Codec::kRotated;
  if (!flags.codec_out.empty()) {
    if (model_options.codec == Codec::kPaper) {
      return InvalidArgument("--codec-out: the codec 'paper' has no calibration; leave out --kv-codec");
    }
    ASSIGN_OR_RETURN(model_options.calibration, FitAndSave(m.model, m.trajectories, flags));
  }
  ASSIGN_OR_RETURN(m.meter,
                   SensitivityMeter::Create(flags.model.model, model_options, m.model.preprocessor, options));
  m.options.max_conversations = flags.max_conversations;
  m.options.max_tokens = flags.max_tokens;
  m.options.seed = flags.seed;
  ASSIGN_OR_RETURN(m.provenance, ProvenanceOf(m.model, *m.meter, flags.trajectories, m.options));
  return m;
}

Result<SensitivityProfile> RunMeasurement(Measurement* m) {
  ProgressBar bar("calibrating");
  m->options.notice = [&](const std::string& notice) {
    bar.Clear();
    std::fprintf(stderr, "%s\n", notice.c_str());
  };
  m->options.progress = [&](double fraction) {
    bar.Update(fraction);
    return !interrupted.load();
  };
  const InterruptGuard guard;
  return Calibrate(m->model, m->trajectories, m->provenance, m->options, m->meter.get());
}

}  // namespace triaxial
