#include "engine/prepare.h"

#include <gtest/gtest.h>

#include <memory>

namespace triaxial {
namespace {

EngineContext Context() {
  EngineContext context;
  context.config.text.vocab_size = 100;
  context.config.vision = VisionConfig{};
  context.geometry = {1, 1, 64, Codec::kPaper};
  context.preprocessor.merge_size = 2;
  context.generation.eos_token_ids = {7, 3};
  context.policy = LoadPolicy("paper").value();
  context.needs = ResolveNeeds(context.policy, context.geometry, /*two_bit_keys=*/true, 0);
  context.max_model_len = 50;
  context.total_rows = 10000;
  return context;
}

Request TwoTurns() {
  Request request;
  request.prompt.tokens = {1, 2, 3, 4, 5, 6, 8, 9};
  request.prompt.spans = {{0, 2, 0, 0, Modal::kText, Semantic::kInst},
                          {2, 6, 1, 0, Modal::kImage, Semantic::kObs},
                          {6, 8, 2, 1, Modal::kText, Semantic::kUser}};
  return request;
}

TEST(Prepare, TwoBitKeysNeedACalibration) {
  const Policy policy = LoadPolicy("paper").value();
  const KvGeometry rotated = {1, 1, 128, Codec::kRotated};
  const KvGeometry paper = {1, 1, 128, Codec::kPaper};
  KvCalibration calibration;
  const auto changed = NeedsOf(policy, rotated, calibration, /*dummy_weights=*/false, 0).wish;
  int two_bit = 0;
  for (size_t i = 0; i < changed.size(); ++i) {
    const bool was_two_bit = policy.table[i] == Format::kK2V2;
    EXPECT_EQ(changed[i], was_two_bit ? Format::kK4V2 : policy.table[i]);
    two_bit += was_two_bit;
  }
  EXPECT_GT(two_bit, 0);
  EXPECT_EQ(NeedsOf(policy, rotated, calibration, /*dummy_weights=*/true, 0).wish, policy.table);
  EXPECT_EQ(NeedsOf(policy, paper, calibration, false, 0).wish, policy.table);
  calibration.calibrated = true;
  EXPECT_EQ(NeedsOf(policy, rotated, calibration, false, 0).wish, policy.table);
}

TEST(Prepare, GivesEveryTokenItsTagAndContent) {
  const EngineContext context = Context();
  const auto state = PrepareRequest(TwoTurns(), context).value();
  ASSERT_EQ(state->kv_tokens.size(), 8u);
  const Tag old_text = {Temporal::kM1, Modal::kText, Semantic::kInst};
  const Tag old_image = {Temporal::kM1, Modal::kImage, Semantic::kObs};
  const Tag new_text = {Temporal::kCurrent, Modal::kText, Semantic::kUser};
  EXPECT_EQ(state->kv_tokens[1].tag, old_text.index());
  EXPECT_EQ(state->kv_tokens[5].tag, old_image.index());
  EXPECT_EQ(state->kv_tokens[7].tag, new_text.index());
  EXPECT_EQ(state->kv_tokens[7].content, ContentId::OfToken(9));
  EXPECT_EQ(state->tokens, TwoTurns().prompt.tokens);
  EXPECT_EQ(state->stop_ids, (std::vector<int32_t>{3, 7}));
}

TEST(Prepare, ComputesPositionsOfPictures) {
  Request request = TwoTurns();
  auto patches = std::make_shared<ImagePatches>();
  patches->grid_h = 2;
  patches->grid_w = 8;  // one by four merged tokens
  request.prompt.images = {{2, 4, patches}};
  const auto state = PrepareRequest(request, Context()).value();
  using Position = std::array<int32_t, 3>;
  EXPECT_EQ(state->Position(1), (Position{1, 1, 1}));
  EXPECT_EQ(state->Position(4), (Position{2, 2, 4}));
  EXPECT_EQ(state->Position(6), (Position{6, 6, 6}));
  EXPECT_EQ(state->Position(9), (Position{9, 9, 9}));
  patches->grid_h = 4;
  patches->grid_w = 4;
  const auto square = PrepareRequest(request, Context()).value();
  EXPECT_EQ(square->Position(6), (Position{4, 4, 4}));
  EXPECT_EQ(square->Position(9), (Position{7, 7, 7}));  // generated, after two fewer positions than tokens
}

TEST(Prepare, LimitsTheOutput) {
  const EngineContext context = Context();
  const auto max_length = [&](int max_tokens) {
    Request request = TwoTurns();
    request.sampling.max_tokens = max_tokens;
    return PrepareRequest(request, context).value()->max_length;
  };
  EXPECT_EQ(max_length(0), 50);
  EXPECT_EQ(max_length(5), 13);
  EXPECT_EQ(max_length(42), 50);
  EXPECT_EQ(max_length(1 << 30), 50);
}

TEST(Prepare, CollectsStopIds) {
  Request request = TwoTurns();
  request.sampling.stop_token_ids = {50, 1};
  EXPECT_EQ(PrepareRequest(request, Context()).value()->stop_ids, (std::vector<int32_t>{1, 3, 7, 50}));
  request.sampling.ignore_eos = true;
  EXPECT_EQ(PrepareRequest(request, Context()).value()->stop_ids, (std::vector<int32_t>{1, 50}));
}

TEST(Prepare, RefusesImagesOfATextModel) {
  EngineContext context = Context();
  context.config.vision.reset();
  Request request = TwoTurns();
  request.prompt.images = {{2, 4, nullptr}};
  const auto state = PrepareRequest(request, context);
  ASSERT_FALSE(state.ok());
  EXPECT_NE(state.status().message().find("text only"), std::string::npos);
}

}  // namespace
}  // namespace triaxial
