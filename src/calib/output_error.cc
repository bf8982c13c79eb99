#include "calib/output_error.h"

#include <algorithm>
#include <iterator>
#include <numeric>

#include "base/check.h"

namespace triaxial {
namespace {

constexpr int64_t kMaxKeptFloats = int64_t{64} << 20;

double MeanOfRatios(const std::vector<OutputErrors::Sums>& layers) {
  double sum = 0;
  for (const OutputErrors::Sums& layer : layers) {
    if (layer.output > 0) sum += layer.error / layer.output;
  }
  return layers.empty() ? 0 : sum / static_cast<double>(layers.size());
}

// Several sums side by side, so that additions need not wait for each other.
void AddSquares(const float* row, const float* exact, int64_t width, OutputErrors::Sums* sums) {
  constexpr int kSums = 16;
  double error[kSums] = {};
  double output[kSums] = {};
  const auto add = [&](int64_t c, int sum) {
    const double difference = double{row[c]} - exact[c];
    error[sum] += difference * difference;
    output[sum] += double{exact[c]} * exact[c];
  };
  int64_t c = 0;
  for (; c + kSums <= width; c += kSums) {
    for (int i = 0; i < kSums; ++i) add(c + i, i);
  }
  for (; c < width; ++c) add(c, 0);
  sums->error += std::accumulate(std::begin(error), std::end(error), 0.0);
  sums->output += std::accumulate(std::begin(output), std::end(output), 0.0);
}

}  // namespace

double OutputErrors::Relative(int tag) const {
  std::vector<Sums> sums;
  for (const auto& layer : layers) sums.push_back(layer[static_cast<size_t>(tag)]);
  return MeanOfRatios(sums);
}

double OutputErrors::Relative() const {
  std::vector<Sums> sums;
  for (const auto& layer : layers) {
    Sums& all = sums.emplace_back();
    for (const Sums& tag : layer) {
      all.error += tag.error;
      all.output += tag.output;
    }
  }
  return MeanOfRatios(sums);
}

OutputErrors OutputMeter::Empty() const {
  OutputErrors errors;
  errors.layers.resize(layers_.size());
  return errors;
}

void OutputMeter::Begin(int32_t tokens) {
  // Besides every token once, what the template rewrites is computed again.
  const int64_t floats = int64_t{2} * tokens * width_ * static_cast<int64_t>(layers_.size());
  every_ = static_cast<int32_t>(floats / kMaxKeptFloats + 1);
  steps_.clear();
  replay_ = nullptr;
}

void OutputMeter::Keep(size_t step, const Replay& replay) {
  step_ = step;
  replay_ = &replay;
  keeping_ = true;
  if (steps_.size() <= step) steps_.resize(step + 1);
  steps_[step] = {0, std::vector<std::vector<float>>(layers_.size())};
}

void OutputMeter::Compare(size_t step, const Replay& replay, std::span<OutputErrors* const> errors) {
  CHECK(step < steps_.size());
  step_ = step;
  replay_ = &replay;
  keeping_ = false;
  errors_.assign(errors.begin(), errors.end());
}

void OutputMeter::Observe(int layer, const float* out) {
  const auto found = std::find(layers_.begin(), layers_.end(), layer);
  if (found == layers_.end() || replay_ == nullptr) return;
  const auto place = static_cast<size_t>(found - layers_.begin());
  Kept& kept = steps_[step_];
  std::vector<float>& outputs = kept.outputs[place];
  for (const Replay::Piece& piece : replay_->pieces()) {
    for (size_t i = 0; i < piece.tokens.size(); ++i) {
      const int32_t token = piece.begin + static_cast<int32_t>(i);
      const float* row = out + (piece.row + static_cast<int64_t>(i)) * width_;
      if (keeping_) {
        if (outputs.empty()) kept.begin = token;
        if ((token - kept.begin) % every_ == 0) outputs.insert(outputs.end(), row, row + width_);
        continue;
      }
      // Another policy may have found more or fewer blocks of the steps before.
      const int64_t at = (int64_t{token} - kept.begin) / every_ * width_;
      if (token < kept.begin || (token - kept.begin) % every_ != 0 ||
          at >= static_cast<int64_t>(outputs.size())) {
        continue;
      }
      const float* exact = outputs.data() + at;
      OutputErrors& errors = *errors_[piece.lane];
      OutputErrors::Sums& sums = errors.layers[place][piece.tokens[i].tag];
      AddSquares(row, exact, width_, &sums);
      if (place == 0) ++errors.queries[piece.tokens[i].tag];
    }
  }
}

}  // namespace triaxial
