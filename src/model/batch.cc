#include "model/batch.h"

#include <algorithm>

#include "base/check.h"

namespace triaxial {

void Batch::Clear() {
  tokens.clear();
  positions.clear();
  sequences.clear();
  visual.clear();
  logits_rows.clear();
  converts.clear();
  stores.clear();
}

MropePositions ComputePositions(int32_t tokens, const std::vector<ImageRun>& images) {
  MropePositions result;
  result.positions.reserve(static_cast<size_t>(tokens));
  int32_t next = 0;
  const auto text_until = [&](int32_t end) {
    for (auto i = static_cast<int32_t>(result.positions.size()); i < end; ++i, ++next) {
      result.positions.push_back({next, next, next});
    }
  };
  for (const ImageRun& image : images) {
    CHECK(image.begin >= static_cast<int32_t>(result.positions.size()));
    CHECK(int64_t{image.begin} + int64_t{image.grid_h} * image.grid_w <= tokens);
    text_until(image.begin);
    for (int32_t y = 0; y < image.grid_h; ++y) {
      for (int32_t x = 0; x < image.grid_w; ++x) result.positions.push_back({next, next + y, next + x});
    }
    next += std::max(image.grid_h, image.grid_w);
  }
  text_until(tokens);
  result.delta = next - tokens;
  return result;
}

}  // namespace triaxial
