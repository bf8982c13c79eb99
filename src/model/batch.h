// One step of the model as plain data: what the executor hands over and the model runs, straight down.
#ifndef TRIAXIAL_MODEL_BATCH_H_
#define TRIAXIAL_MODEL_BATCH_H_

#include <array>
#include <cstdint>
#include <memory>
#include <vector>

#include "kv/cache.h"
#include "kv/view.h"
#include "ops/attention.h"

namespace triaxial {

// What the vision tower makes of one image: merged tokens and DeepStack features, F32, row-major
// [tokens][hidden].
struct VisualFeatures {
  int32_t tokens = 0;
  std::vector<float> embeddings;
  std::vector<std::vector<float>> deepstack;  // one per deepstack_visual_indexes entry
  // From a model that computes on a GPU, in its memory instead: [1 + device_deepstack][tokens][hidden],
  // embeddings first. To be given up before the model.
  std::shared_ptr<const float> device;
  int32_t device_deepstack = 0;
};

// Rows [row, row + count) of the step take features [feature, feature + count) of an image instead of token
// embeddings.
struct VisualRows {
  int32_t row = 0;
  int32_t feature = 0;
  int32_t count = 0;
  const VisualFeatures* features = nullptr;
};

// A vector is cleared, never shrunk, between steps.
struct Batch {
  std::vector<int32_t> tokens;                    // [rows]
  std::vector<std::array<int32_t, 3>> positions;  // [rows] MRoPE (t, h, w); text: all equal
  std::vector<AttentionSequence> sequences;       // cover the rows; views of the cache before the step
  std::vector<VisualRows> visual;
  std::vector<int32_t> logits_rows;  // rows whose next-token logits are wanted
  std::vector<KvConvert> converts;   // run first in each layer
  std::vector<KvStore> stores;       // run after each layer's attention; row_begin counts batch rows
  int32_t rows() const { return static_cast<int32_t>(tokens.size()); }
  void Clear();
};

// MRoPE positions of a prompt (SPEC section 7; Qwen2-VL, arXiv 2409.12191): text advances all three axes; an
// image of merged grid H x W at position s takes (s, s + y, s + x) and the next text token s + max(H, W).
struct MropePositions {
  std::vector<std::array<int32_t, 3>> positions;  // [tokens]
  int32_t delta = 0;  // position of token i >= tokens.size() is i + delta on all axes
};
struct ImageRun {
  int32_t begin = 0;   // first token
  int32_t grid_h = 0;  // merged rows
  int32_t grid_w = 0;  // merged columns
};
MropePositions ComputePositions(int32_t tokens, const std::vector<ImageRun>& images);

}  // namespace triaxial

#endif  // TRIAXIAL_MODEL_BATCH_H_
