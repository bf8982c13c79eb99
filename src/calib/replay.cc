#include "calib/replay.h"

#include <algorithm>

#include "base/check.h"
#include "base/checked_math.h"
#include "engine/prepare.h"

namespace triaxial {
namespace {

constexpr int kConvertsPerStep = 32;  // as in the scheduler

// Room for a conversation in BF16 twice: what its steps leave behind where the template dropped thoughts
// stays until it is needed.
int64_t LaneRows(const KvGeometry& geometry, int32_t longest) {
  return (int64_t{longest} / kBlockTokens * 2 + 8) * UnitsOf(geometry, Format::kBf16);
}

std::vector<KvToken> TokensOf(const RecordedStep& step) {
  std::vector<KvToken> tokens;
  AppendKvTokens(step.prompt, &tokens);
  for (size_t i = 0; i < step.output.size(); ++i) {
    tokens.push_back({ContentId::OfToken(step.output[i]), step.tags[i]});
  }
  return tokens;
}

}  // namespace

int64_t Replay::LaneBytes(const KvGeometry& geometry, int32_t longest) {
  return LaneRows(geometry, longest) * UnitRowBytes(geometry) * geometry.num_layers;
}

Result<std::unique_ptr<Replay>> Replay::Create(Model* model, std::span<const Policy> policies,
                                               int32_t longest, const ReplayOptions& options) {
  const KvGeometry geometry = model->geometry();
  const auto lanes = static_cast<int64_t>(policies.size());
  ASSIGN_OR_RETURN(std::unique_ptr<KvMemory> memory, model->AllocateKv(lanes * LaneBytes(geometry, longest)));
  std::unique_ptr<Replay> replay(new Replay(model, std::move(memory), options));
  replay->lanes_.reserve(policies.size());
  for (const Policy& policy : policies) {
    const int64_t rows = LaneRows(geometry, longest);
    replay->lanes_.emplace_back(
        geometry, rows,
        NeedsOf(policy, geometry, model->calibration(), model->dummy_weights(), /*budget_bits=*/0));
    replay->lanes_.back().first_row =
        static_cast<uint32_t>(rows * static_cast<int64_t>(replay->lanes_.size() - 1));
  }
  return replay;
}

// What the server does when the request of this step arrives.
void Replay::Begin(const std::vector<KvToken>& tokens, size_t prompt, Lane* lane) {
  lane->tokens = tokens;
  lane->id = lane->cache.CreateSequence({.salt = "", .tokens = std::span(tokens).first(prompt)});
  lane->computed = lane->cache.Length(lane->id);
}

// Blocks that nobody uses go when their rows are needed; the memory is large enough that none in use has to
// be re-quantized for room. Those whose tags grew older are, as in each step of the scheduler.
void Replay::MakeRoom(std::span<const KvToken> tokens, Lane* lane) {
  KvCache& cache = lane->cache;
  const int64_t rows = cache.RowsToAppend(lane->id, tokens);
  if (!cache.Fits(rows)) cache.Reclaim(rows, nullptr, {});
  if (!cache.FitsWithoutCompaction(rows)) {
    cache.Compact([&](uint32_t from, uint32_t to, int count) {
      memory_->Move(lane->first_row + from, lane->first_row + to, count);
    });
  }
  lane->converts.clear();
  cache.AgeBlocks(kConvertsPerStep, &lane->converts);
}

// Nobody asks what follows the last token, so it is never computed.
int32_t Replay::PieceEnd(const RecordedStep& step, const Lane& lane) const {
  const auto prompt = static_cast<int32_t>(step.prompt.tokens.size());
  if (lane.computed < prompt) {
    return std::min(lane.computed + std::min(options_.chunk, lane.cache.NextStop(lane.id)), prompt);
  }
  return std::min((lane.computed / kBlockTokens + 1) * kBlockTokens, step.length() - 1);
}

Status Replay::AddPiece(const RecordedStep& step, const FeaturesOf& features, size_t index, int32_t end) {
  Lane& lane = lanes_[index];
  const auto prompt = static_cast<int32_t>(step.prompt.tokens.size());
  const int32_t begin = lane.computed;
  const int32_t row = batch_.rows();
  const auto tokens =
      std::span(lane.tokens).subspan(static_cast<size_t>(begin), static_cast<size_t>(end - begin));
  MakeRoom(tokens, &lane);
  RETURN_IF_ERROR(lane.cache.Append(lane.id, tokens, &append_));
  lane.converts.insert(lane.converts.end(), append_.converts.begin(), append_.converts.end());
  for (KvConvert convert : lane.converts) {
    convert.from_row += lane.first_row;
    convert.to_row += lane.first_row;
    batch_.converts.push_back(convert);
  }
  for (KvStore store : append_.stores) {
    store.unit_row += lane.first_row;
    store.tail_row += lane.first_row;
    store.row_begin += row;
    batch_.stores.push_back(store);
  }
  const std::span<const KvBlockRef> view = lane.cache.View(lane.id);
  lane.view.assign(view.begin(), view.end());
  for (KvBlockRef& block : lane.view) block.unit_row += lane.first_row;
  batch_.sequences.push_back({row, end - begin, lane.view});

  for (int32_t t = begin; t < end; ++t) {
    if (t < prompt) {
      batch_.tokens.push_back(step.prompt.tokens[static_cast<size_t>(t)]);
      batch_.positions.push_back(step.positions.positions[static_cast<size_t>(t)]);
    } else {
      batch_.tokens.push_back(step.output[static_cast<size_t>(t - prompt)]);
      const int32_t p = t + step.positions.delta;
      batch_.positions.push_back({p, p, p});
    }
    if (t + 1 < prompt) continue;
    batch_.logits_rows.push_back(row + t - begin);
    rows_.push_back({index, static_cast<size_t>(t + 1 - prompt)});
  }
  for (const PromptImage& image : step.prompt.images) {
    const int32_t first = std::max(begin, image.begin);
    const int32_t last = std::min(end, image.begin + image.tokens);
    if (first >= last) continue;
    const auto found = features.find(image.patches.get());
    CHECK(found != features.end());
    batch_.visual.push_back({row + first - begin, first - image.begin, last - first, &found->second});
  }
  pieces_.push_back({index, begin, row, tokens});
  return OkStatus();
}

void Replay::Finish(Lane* lane) {
  lane->usage = lane->cache.Usage(lane->id);
  lane->blocks.clear();
  for (const KvBlock* block : lane->cache.Blocks(lane->id)) lane->blocks.push_back(block->format);
  lane->cache.FreeSequence(lane->id);
}

Status Replay::Play(const RecordedStep& step, const FeaturesOf& features, const Sink& sink) {
  const auto vocab = static_cast<size_t>(model_->config().text.vocab_size);
  const std::vector<KvToken> tokens = TokensOf(step);
  for (Lane& lane : lanes_) Begin(tokens, step.prompt.tokens.size(), &lane);
  const int32_t end = step.length() - 1;
  const auto done = [&](const Lane& lane) { return lane.computed == end; };
  while (!std::all_of(lanes_.begin(), lanes_.end(), done)) {
    batch_.Clear();
    rows_.clear();
    pieces_.clear();
    for (size_t i = 0; i < lanes_.size(); ++i) {
      if (done(lanes_[i])) continue;
      const int32_t piece_end = PieceEnd(step, lanes_[i]);
      const int32_t count = piece_end - lanes_[i].computed;
      if (batch_.rows() > 0 && batch_.rows() + count > options_.max_rows) continue;
      RETURN_IF_ERROR(AddPiece(step, features, i, piece_end));
    }
    if (logits_.size() < rows_.size() * vocab) logits_.resize(rows_.size() * vocab);
    model_->Forward(batch_, memory_.get(), logits_.data());
    for (const Piece& piece : pieces_) {
      Lane& lane = lanes_[piece.lane];
      lane.cache.FinishStep();
      lane.computed = lane.cache.Length(lane.id);
    }
    if (!rows_.empty()) sink(rows_, logits_.data());
  }
  for (Lane& lane : lanes_) Finish(&lane);
  return OkStatus();
}

}  // namespace triaxial
