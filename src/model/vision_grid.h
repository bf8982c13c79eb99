// Where the patches of an image lie in its grid, and how their position embeddings are interpolated.
#ifndef TRIAXIAL_MODEL_VISION_GRID_H_
#define TRIAXIAL_MODEL_VISION_GRID_H_

#include <vector>

namespace triaxial {

struct GridPlace {
  int row = 0;
  int column = 0;
};
// In the order of ImagePatches: by merge blocks.
std::vector<GridPlace> PlacesOfPatches(int grid_h, int grid_w, int merge);

// A patch's position embedding is the sum of factor[c] * table[corner[c]], of a table of side x side.
struct GridCorners {
  int corner[4] = {};
  float factor[4] = {};
};
GridCorners CornersOf(const GridPlace& place, int grid_h, int grid_w, int side);

}  // namespace triaxial

#endif  // TRIAXIAL_MODEL_VISION_GRID_H_
