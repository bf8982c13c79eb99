// What attention gives under a policy beside what it gives with a BF16 cache, by the tag of the token that
// asks.
#ifndef TRIAXIAL_CALIB_OUTPUT_ERROR_H_
#define TRIAXIAL_CALIB_OUTPUT_ERROR_H_

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "calib/replay.h"
#include "kv/tag.h"

namespace triaxial {

// Of one policy. Tags are those that the asking token has when it is computed; the errors are what arrives:
// of the layer's own cache, and of what the layers below made of theirs.
struct OutputErrors {
  struct Sums {
    double error = 0;   // squared differences from the BF16 cache's outputs
    double output = 0;  // squares of these
  };
  std::vector<std::array<Sums, kTags>> layers;  // in the order of OutputMeter's
  std::array<int64_t, kTags> queries{};

  // Squared error over squared output, a mean over layers; of one tag, and of all. 0 if there is none.
  double Relative(int tag) const;
  double Relative() const;
};

// Keeps the outputs of a conversation's BF16 replay and compares those of others with them. Of the tokens of
// long conversations it takes only every n-th, so that what it keeps stays under 256 MiB.
class OutputMeter {
 public:
  // `layers`: those that are watched; `width`: of a row of outputs, all heads.
  OutputMeter(std::vector<int> layers, int64_t width) : layers_(std::move(layers)), width_(width) {}

  const std::vector<int>& layers() const { return layers_; }
  OutputErrors Empty() const;

  // A conversation of so many tokens begins; what was kept goes.
  void Begin(int32_t tokens);
  // Until the next call, the outputs are of this step in this replay: the first lane's are kept, or
  // compared, errors[i] receiving those of lane i.
  void Keep(size_t step, const Replay& replay);
  void Compare(size_t step, const Replay& replay, std::span<OutputErrors* const> errors);
  // As an OutputObserver of the model.
  void Observe(int layer, const float* out);

 private:
  struct Kept {
    int32_t begin = 0;                        // outputs are those of tokens begin, begin + every_, ...
    std::vector<std::vector<float>> outputs;  // [layers][token][width]
  };

  std::vector<int> layers_;
  int64_t width_;
  int32_t every_ = 1;
  std::vector<Kept> steps_;
  size_t step_ = 0;
  const Replay* replay_ = nullptr;
  bool keeping_ = false;
  std::vector<OutputErrors*> errors_;
};

}  // namespace triaxial

#endif  // TRIAXIAL_CALIB_OUTPUT_ERROR_H_
