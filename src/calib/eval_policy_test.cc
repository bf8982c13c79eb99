#include "calib/eval_policy.h"

#include <gtest/gtest.h>

namespace triaxial {
namespace {

TEST(EvalPolicy, IsNamedByWhatWasSaid) {
  const auto policies = ParseEvalPolicies("paper,paper@paper,int2@rotated", Codec::kRotated);
  ASSERT_TRUE(policies.ok()) << policies.status().message();
  EXPECT_EQ((*policies)[0].name, "paper");
  EXPECT_EQ((*policies)[0].codec, Codec::kRotated);
  EXPECT_EQ((*policies)[1].name, "paper@paper");
  EXPECT_EQ((*policies)[1].codec, Codec::kPaper);
  EXPECT_EQ(ParseEvalPolicy("int4", Codec::kPaper)->codec, Codec::kPaper);
}

TEST(EvalPolicy, WhatCannotBeIsRefused) {
  for (const char* bad : {"", "paper,", ",paper", "paper@", "paper@cuda", "none", "paper,paper", "paper:2.8",
                          "paper+temporal", "paper:x", "paper:0", "paper:17", "paper+colour"}) {
    const auto policies = ParseEvalPolicies(bad, Codec::kRotated);
    EXPECT_FALSE(policies.ok()) << bad;
    EXPECT_FALSE(policies.status().message().empty()) << bad;
  }
}

TEST(KeepAxes, AveragesOverWhatItNoLongerSees) {
  Policy policy;
  policy.priced = true;
  const auto index = [](Temporal t, Modal m, Semantic s) {
    return static_cast<size_t>(Tag{t, m, s}.index());
  };
  const size_t current = index(Temporal::kCurrent, Modal::kText, Semantic::kObs);
  const size_t older = index(Temporal::kOlder, Modal::kText, Semantic::kObs);
  const size_t inst = index(Temporal::kCurrent, Modal::kText, Semantic::kInst);
  policy.counts[current] = 1;
  policy.counts[older] = 3;
  policy.counts[inst] = 10;
  policy.distortion[current][0] = 8;
  policy.distortion[older][0] = 4;
  policy.distortion[inst][0] = 1;
  Policy semantic = policy;
  KeepAxes({.semantic = true}, &semantic);
  EXPECT_FLOAT_EQ(semantic.distortion[current][0], 5);  // (8 + 3 * 4) / 4
  EXPECT_FLOAT_EQ(semantic.distortion[older][0], 5);
  EXPECT_FLOAT_EQ(semantic.distortion[inst][0], 1);
  Policy all = policy;
  KeepAxes({.temporal = true, .modal = true, .semantic = true}, &all);
  EXPECT_EQ(all.distortion, policy.distortion);
}

}  // namespace
}  // namespace triaxial
