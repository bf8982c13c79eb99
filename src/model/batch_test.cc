#include "model/batch.h"

#include <gtest/gtest.h>

namespace triaxial {
namespace {

using P = std::array<int32_t, 3>;

TEST(ComputePositions, TextCounts) {
  const MropePositions p = ComputePositions(3, {});
  EXPECT_EQ(p.positions, (std::vector<P>{{0, 0, 0}, {1, 1, 1}, {2, 2, 2}}));
  EXPECT_EQ(p.delta, 0);
}

TEST(ComputePositions, ImagesTakeAGridAndTheLongerSide) {
  // text, 2 x 3 image, text, 1 x 1 image at the end
  const MropePositions p = ComputePositions(9, {{1, 2, 3}, {8, 1, 1}});
  EXPECT_EQ(p.positions, (std::vector<P>{{0, 0, 0},
                                         {1, 1, 1},
                                         {1, 1, 2},
                                         {1, 1, 3},
                                         {1, 2, 1},
                                         {1, 2, 2},
                                         {1, 2, 3},
                                         {4, 4, 4},
                                         {5, 5, 5}}));
  EXPECT_EQ(p.delta, 6 - 9);
}

TEST(ComputePositions, AdjacentImagesAndNothing) {
  const MropePositions p = ComputePositions(4, {{0, 1, 2}, {2, 2, 1}});
  EXPECT_EQ(p.positions, (std::vector<P>{{0, 0, 0}, {0, 0, 1}, {2, 2, 2}, {2, 3, 2}}));
  EXPECT_EQ(p.delta, 0);
  EXPECT_TRUE(ComputePositions(0, {}).positions.empty());
}

}  // namespace
}  // namespace triaxial
