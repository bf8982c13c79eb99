#include "replay/simulation.h"

#include <algorithm>
#include <cmath>
#include <deque>
#include <memory>
#include <unordered_map>
#include <utility>

#include "base/check.h"
#include "engine/scheduler.h"
#include "kv/arena.h"

namespace triaxial {
namespace {

constexpr int64_t kProgressEvery = 256;  // requests

// A request inside the simulated engine.
struct Live : Sequence {
  Arrival arrival;
  std::vector<KvToken> answer;  // as recorded
  int32_t generated = 0;
  double first_token = 0;
  bool has_pictures = false;
  bool started = false;
  KvUsage stored;  // as of its last completed block
};

// Counts the bytes that compactions move; there is no memory behind the cache.
class CountingBacking final : public KvBacking {
 public:
  void Move(uint32_t /*from_row*/, uint32_t /*to_row*/, int rows) override { moved_rows += rows; }
  int64_t moved_rows = 0;
};

class Simulation {
 public:
  Simulation(const Recording& recording, const ArrivalOptions& arrivals, const SimulationOptions& options,
             int64_t rows, const std::function<void(int64_t)>& progress)
      : recording_(recording),
        options_(options),
        progress_(progress),
        row_bytes_(UnitRowBytes(options.geometry) * options.geometry.num_layers),
        arrivals_(&recording, arrivals),
        cache_(options.geometry, rows,
               ResolveNeeds(options.policy, options.geometry, /*two_bit_keys=*/true, options.budget_bits)),
        scheduler_({options.max_running, options.max_step_tokens}, &cache_, &backing_) {}

  SimulationResult Run() {
    while (true) {
      Admit();
      if (scheduler_.idle()) {
        const std::optional<double> next = arrivals_.NextTime();
        if (!next) break;
        Note(*next - now_);
        now_ = *next;
        continue;
      }
      RunStep();
    }
    return Summarize();
  }

 private:
  // Lets in what has arrived by now, as far as the scheduler's queue has room.
  void Admit() {
    while (true) {
      const std::optional<double> next = arrivals_.NextTime();
      if (!next || *next > now_) break;
      door_.push_back(arrivals_.Take());
    }
    for (; !door_.empty() && scheduler_.waiting() < options_.max_queued; door_.pop_front())
      Submit(door_.front());
  }

  void Submit(const Arrival& arrival) {
    const RecordedRequest& request = *arrival.request;
    auto live = std::make_unique<Live>();
    live->id = arrival.number + 1;
    live->arrival = arrival;
    const int64_t length = int64_t{request.prompt_tokens} + request.output_tokens;
    if (length > options_.max_model_len) return Refuse(arrival);
    FillTokens(recording_, request, arrival.number, arrival.repetition, &live->kv_tokens);
    live->answer.assign(live->kv_tokens.begin() + request.prompt_tokens, live->kv_tokens.end());
    live->kv_tokens.resize(static_cast<size_t>(request.prompt_tokens));  // keeps room for the answer
    live->has_pictures = request.rendered != nullptr && !request.rendered->pictures.empty();
    if (PredictRows(options_.geometry, cache_.needs(), live->kv_tokens, /*begin=*/0, live->min_format) >
        cache_.total_rows()) {
      return Refuse(arrival);
    }
    scheduler_.Enqueue(live.get());
    const RequestId id = live->id;
    live_.emplace(id, std::move(live));
  }

  void Refuse(const Arrival& arrival) {
    ++result_.refused;
    Done(arrival);
  }

  void RunStep() {
    work_ = {};
    const int64_t preemptions = scheduler_.preemptions();
    backing_.moved_rows = 0;
    scheduler_.MakePlan(&plan_);
    scheduler_.Commit(plan_, &step_);
    NoteAdmissions();
    MeasureStep();
    scheduler_.FinishStep();
    ++result_.steps;
    sample_.preemptions = static_cast<double>(scheduler_.preemptions() - preemptions);
    sample_.demotions = static_cast<double>(step_.converts.size());
    const double seconds = step_.empty() ? 0 : StepSeconds(options_.cost, options_.device, work_);
    Note(seconds);
    now_ += seconds;
    for (const Step::Item& item : step_.items) TakeToken(static_cast<Live*>(item.sequence));
    if (plan_.fail != nullptr) {
      auto* live = static_cast<Live*>(plan_.fail);
      ++result_.failed;
      Leave(live);
    }
  }

  void NoteAdmissions() {
    for (const Plan::Rows& rows : plan_.rows) {
      auto* live = static_cast<Live*>(rows.sequence);
      if (live->cache_id == 0 || std::exchange(live->started, true)) continue;
      sample_.looked_up += live->arrival.request->prompt_tokens;
      sample_.found += live->cached_tokens;
    }
    looked_up_ += sample_.looked_up;
    found_ += sample_.found;
  }

  void MeasureStep() {
    work_.rows = step_.rows;
    work_.moved_bytes = 2 * backing_.moved_rows * row_bytes_;
    for (const KvConvert& convert : step_.converts) {
      work_.moved_bytes +=
          BlockBytes(options_.geometry, convert.from) + BlockBytes(options_.geometry, convert.to);
    }
    for (const Step::Item& item : step_.items) {
      auto* live = static_cast<Live*>(item.sequence);
      const double rows = item.count, begin = item.begin;
      work_.contexts += rows * begin + rows * (rows + 1) / 2;
      if (live->pending() == 0) {
        ++work_.logits_rows;
        sample_.generated += 1;
      }
      if (item.count > 1 || item.begin % kBlockTokens == 0) live->stored = cache_.Usage(live->cache_id);
      for (size_t f = 0; f < kFormats; ++f) work_.kv_bytes[f] += live->stored.bytes[f];
      const int32_t prompt = live->arrival.request->prompt_tokens;
      if (item.begin >= prompt) continue;
      sample_.prefilled += item.count;
      result_.prefilled_tokens += std::min(item.count, prompt - item.begin);
      if (live->has_pictures) work_.picture_tokens += PictureTokens(*live, item.begin, item.count);
    }
  }

  static int64_t PictureTokens(const Live& live, int32_t begin, int32_t count) {
    const auto first = live.kv_tokens.begin() + begin;
    return std::count_if(first, first + count, [](const KvToken& token) {
      return Tag::FromIndex(token.tag).modal == Modal::kImage;
    });
  }

  // What holds for the next `seconds`.
  void Note(double seconds) {
    const KvUsage& usage = cache_.Usage();
    sample_.running = scheduler_.running();
    sample_.waiting = static_cast<double>(scheduler_.waiting()) + static_cast<double>(door_.size());
    for (size_t f = 0; f < kFormats; ++f) sample_.bytes[f] = static_cast<double>(usage.bytes[f]);
    sample_.bytes[static_cast<size_t>(Format::kBf16)] -= static_cast<double>(usage.tail_bytes);
    sample_.tail_bytes = static_cast<double>(usage.tail_bytes);
    sample_.price = cache_.price();
    result_.series.Add(now_, seconds, sample_);
    sample_ = {};

    const int64_t used_rows = cache_.total_rows() - cache_.free_rows();
    const int64_t tokens = usage.total_tokens();
    result_.peak_running = std::max(result_.peak_running, scheduler_.running());
    result_.peak_tokens = std::max(result_.peak_tokens, tokens);
    peak_rows_ = std::max(peak_rows_, used_rows);
    running_seconds_ += seconds * scheduler_.running();
    if (tokens == 0) return;
    used_bytes_ += seconds * static_cast<double>(used_rows * row_bytes_);
    tail_bytes_ += seconds * static_cast<double>(usage.tail_bytes);
    tail_tokens_ += seconds * static_cast<double>(usage.tail_tokens);
    for (size_t f = 0; f < kFormats; ++f) tokens_[f] += seconds * static_cast<double>(usage.tokens[f]);
    const double needed = NeededByBlocks(usage);
    needed_bytes_ += seconds * needed;
    const int64_t given_up = cache_.evictions() + scheduler_.preemptions();
    if (std::exchange(given_up_, given_up) == given_up) return;
    short_seconds_ += seconds;
    filled_bytes_ += seconds * (needed + static_cast<double>(usage.tail_bytes));
  }

  // The sum of bytes that the tokens of complete blocks ask for, each at its format.
  double NeededByBlocks(const KvUsage& usage) const {
    double bytes = 0;
    for (size_t f = 0; f < kFormats; ++f) {
      const auto format = static_cast<Format>(f);
      const int64_t tokens = usage.tokens[f] - (format == Format::kBf16 ? usage.tail_tokens : 0);
      bytes += static_cast<double>(tokens * BlockBytes(options_.geometry, format)) / kBlockTokens;
    }
    return bytes;
  }

  // The step gave the sequence a token if it reached its last one.
  void TakeToken(Live* live) {
    if (live->pending() > 0) return;
    if (live->generated++ == 0) live->first_token = now_;
    if (live->generated < live->arrival.request->output_tokens) {
      return live->kv_tokens.push_back(live->answer[static_cast<size_t>(live->generated) - 1]);
    }
    ++result_.finished;
    result_.prompt_tokens += live->arrival.request->prompt_tokens;
    result_.generated_tokens += live->generated;
    result_.ttft.push_back(static_cast<float>(live->first_token - live->arrival.time));
    if (live->generated > 1) {
      result_.tpot.push_back(static_cast<float>((now_ - live->first_token) / (live->generated - 1)));
    }
    if (options_.distortion) loss_ += LossOf(*live);
    Leave(live);
  }

  double LossOf(const Live& live) const {
    double loss = 0;
    int64_t tokens = 0;
    for (const KvBlock* block : cache_.Blocks(live.cache_id)) {
      const auto format = static_cast<size_t>(block->format);
      for (size_t i = 0; i < block->tokens; ++i) loss += (*options_.distortion)[block->tags[i]][format];
      tokens += block->tokens;
    }
    return tokens > 0 ? loss / static_cast<double>(tokens) : 0;
  }

  void Leave(Live* live) {
    scheduler_.Remove(live);
    const Arrival arrival = live->arrival;
    live_.erase(live->id);
    Done(arrival);
  }

  void Done(const Arrival& arrival) {
    arrivals_.Answered(arrival, now_);
    if (++result_.requests % kProgressEvery == 0 && progress_) progress_(result_.requests);
  }

  SimulationResult Summarize() {
    const KvGeometry& g = options_.geometry;
    SimulationResult& r = result_;
    CHECK(live_.empty() && door_.empty());
    CHECK(cache_.CheckIntegrity().ok() && cache_.free_rows() + cache_.cached_rows() == cache_.total_rows());
    r.seconds = now_;
    r.preemptions = scheduler_.preemptions();
    r.compactions = scheduler_.compactions();
    r.evictions = cache_.evictions();
    CountDemotions();
    r.hit_rate = looked_up_ > 0 ? found_ / looked_up_ : 0;
    r.mean_running = now_ > 0 ? running_seconds_ / now_ : 0;
    r.peak_usage = static_cast<double>(peak_rows_) / static_cast<double>(cache_.total_rows());
    std::sort(r.ttft.begin(), r.ttft.end());
    std::sort(r.tpot.begin(), r.tpot.end());
    if (options_.distortion && r.finished > 0) r.predicted_loss = loss_ / static_cast<double>(r.finished);

    const auto memory = static_cast<double>(cache_.total_rows() * row_bytes_);
    if (short_seconds_ > 0) r.filled = filled_bytes_ / (short_seconds_ * memory);

    double tokens = 0;
    for (const double of_format : tokens_) tokens += of_format;
    if (tokens <= 0) return std::move(r);
    for (size_t f = 0; f < kFormats; ++f) r.share_of_tokens[f] = tokens_[f] / tokens;
    const double block_bytes = used_bytes_ - tail_bytes_;
    const double block_tokens = tokens - tail_tokens_;
    const double elements_per_token = 2.0 * g.num_layers * g.num_kv_heads * g.head_dim;
    r.effective_bits = 8 * used_bytes_ / (tokens * elements_per_token);
    if (block_tokens > 0) r.block_bits = 8 * block_bytes / (block_tokens * elements_per_token);
    // Below a millionth it is the rounding of these sums.
    const double lost = block_bytes > 0 ? 1 - needed_bytes_ / block_bytes : 0;
    r.rounding_loss = lost > 1e-6 ? lost : 0;
    r.tail_share = tail_bytes_ / used_bytes_;
    r.capacity_tokens = std::llround(memory * tokens / used_bytes_);
    return std::move(r);
  }

  void CountDemotions() {
    const KvDemotions& demotions = cache_.demotions();
    for (const auto& from : demotions) {
      for (const auto& to : from) {
        for (size_t c = 0; c < kCauses; ++c) {
          result_.demotions_by_cause[c] += to[c];
          if (static_cast<Cause>(c) != Cause::kWindow) result_.demotions += to[c];
        }
      }
    }
  }

  const Recording& recording_;
  const SimulationOptions& options_;
  const std::function<void(int64_t)>& progress_;
  const int64_t row_bytes_;
  Arrivals arrivals_;
  KvCache cache_;
  CountingBacking backing_;
  Scheduler scheduler_;
  StepWork work_;
  Plan plan_;
  Step step_;
  std::deque<Arrival> door_;
  std::unordered_map<RequestId, std::unique_ptr<Live>> live_;
  double now_ = 0;

  Sample sample_;  // events since the last one
  SimulationResult result_;
  // Integrals over time.
  double running_seconds_ = 0;
  double used_bytes_ = 0;
  double needed_bytes_ = 0;  // by tokens of complete blocks
  double tail_bytes_ = 0;
  double tail_tokens_ = 0;
  std::array<double, kFormats> tokens_{};
  double filled_bytes_ = 0;  // needed and of tails, in steps that gave something up
  double short_seconds_ = 0;
  int64_t given_up_ = 0;
  int64_t peak_rows_ = 0;
  double looked_up_ = 0;
  double found_ = 0;
  double loss_ = 0;  // sum over finished requests
};

}  // namespace

double Percentile(const std::vector<float>& sorted, double q) {
  if (sorted.empty()) return 0;
  const auto rank = static_cast<size_t>(std::ceil(q * static_cast<double>(sorted.size())));
  return sorted[std::min(std::max<size_t>(rank, 1), sorted.size()) - 1];
}

Result<SimulationResult> Simulate(const Recording& recording, const ArrivalOptions& arrivals,
                                  const SimulationOptions& options,
                                  const std::function<void(int64_t done)>& progress) {
  ASSIGN_OR_RETURN(const int64_t rows, RowsOfMemory(options.geometry, options.kv_bytes));
  return Simulation(recording, arrivals, options, rows, progress).Run();
}

}  // namespace triaxial
