#include "model/vision_grid.h"

#include <algorithm>

namespace triaxial {
namespace {

// torch.linspace(0, last, n)[i] in F32, which counts from the nearer end.
float GridCoordinate(int i, int n, int last) {
  if (n == 1) return 0;
  const float step = static_cast<float>(last) / static_cast<float>(n - 1);
  return i < n / 2 ? step * static_cast<float>(i)
                   : static_cast<float>(last) - step * static_cast<float>(n - 1 - i);
}

}  // namespace

std::vector<GridPlace> PlacesOfPatches(int grid_h, int grid_w, int merge) {
  std::vector<GridPlace> places;
  for (int by = 0; by < grid_h; by += merge) {
    for (int bx = 0; bx < grid_w; bx += merge) {
      for (int y = by; y < by + merge; ++y) {
        for (int x = bx; x < bx + merge; ++x) places.push_back({y, x});
      }
    }
  }
  return places;
}

GridCorners CornersOf(const GridPlace& place, int grid_h, int grid_w, int side) {
  const float y = GridCoordinate(place.row, grid_h, side - 1);
  const float z = GridCoordinate(place.column, grid_w, side - 1);
  const int y0 = static_cast<int>(y);
  const int z0 = static_cast<int>(z);
  const int y1 = std::min(y0 + 1, side - 1);
  const int z1 = std::min(z0 + 1, side - 1);
  const float dy = y - static_cast<float>(y0);
  const float dz = z - static_cast<float>(z0);
  return {{y0 * side + z0, y0 * side + z1, y1 * side + z0, y1 * side + z1},
          {(1 - dy) * (1 - dz), (1 - dy) * dz, dy * (1 - dz), dy * dz}};
}

}  // namespace triaxial
