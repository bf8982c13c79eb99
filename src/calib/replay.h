// Recorded answers, teacher-forced through real KV caches as the server would fill them, several policies
// side by side over one model.
#ifndef TRIAXIAL_CALIB_REPLAY_H_
#define TRIAXIAL_CALIB_REPLAY_H_

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <span>
#include <vector>

#include "base/status.h"
#include "calib/recorded_steps.h"
#include "kv/arena.h"
#include "kv/cache.h"
#include "kv/policy.h"
#include "model/batch.h"
#include "model/model.h"

namespace triaxial {

// What the vision tower made of a conversation's pictures, for all its steps.
using FeaturesOf = std::map<const ImagePatches*, VisualFeatures>;

struct ReplayOptions {
  int32_t chunk = 512;      // tokens of a prefill step, the server's --max-num-batched-tokens
  int32_t max_rows = 2048;  // of one call of the model, over all policies
};

class Replay {
 public:
  // A next-token distribution: what the model says in place of output[token] of the step.
  struct Row {
    size_t lane = 0;
    size_t token = 0;
  };
  // Tokens of a lane that one call of the model computes, in order.
  struct Piece {
    size_t lane = 0;
    int32_t begin = 0;  // of the step's tokens
    int32_t row = 0;    // the first one's in the call
    std::span<const KvToken> tokens;
  };
  // `logits` is [rows][vocab_size].
  using Sink = std::function<void(std::span<const Row> rows, const float* logits)>;

  // A lane for each policy. The model must outlive the replay. `longest`: tokens of the longest step to come.
  // Errors as Model::AllocateKv.
  static Result<std::unique_ptr<Replay>> Create(Model* model, std::span<const Policy> policies,
                                                int32_t longest, const ReplayOptions& options);

  // Bytes of KV memory that a lane takes.
  static int64_t LaneBytes(const KvGeometry& geometry, int32_t longest);

  // Plays a step in every lane, after those before it of one conversation: blocks that the steps before left
  // are found again, and re-quantized if their tags grew older; the rest of the prompt in chunks, then the
  // recorded output token by token as decoding would store it (all rows up to the next block's end at once:
  // they read the same cache). ResourceExhausted if a lane is too small.
  Status Play(const RecordedStep& step, const FeaturesOf& features, const Sink& sink);

  // What the last step took in a lane when its answer ended.
  const KvUsage& Usage(size_t lane) const { return lanes_[lane].usage; }
  const std::vector<Format>& Blocks(size_t lane) const { return lanes_[lane].blocks; }
  size_t lanes() const { return lanes_.size(); }
  // What the model computes while Play calls it.
  std::span<const Piece> pieces() const { return pieces_; }

 private:
  struct Lane {
    Lane(const KvGeometry& geometry, int64_t rows, const TagNeeds& needs) : cache(geometry, rows, needs) {}
    KvCache cache;
    uint32_t first_row = 0;  // of its part of the memory
    SequenceId id = 0;
    std::vector<KvToken> tokens;  // of the step: prompt and output
    int32_t computed = 0;
    std::vector<KvConvert> converts;
    std::vector<KvBlockRef> view;
    KvUsage usage;
    std::vector<Format> blocks;
  };

  Replay(Model* model, std::unique_ptr<KvMemory> memory, const ReplayOptions& options)
      : model_(model), memory_(std::move(memory)), options_(options) {}

  void Begin(const std::vector<KvToken>& tokens, size_t prompt, Lane* lane);
  void MakeRoom(std::span<const KvToken> tokens, Lane* lane);
  int32_t PieceEnd(const RecordedStep& step, const Lane& lane) const;
  Status AddPiece(const RecordedStep& step, const FeaturesOf& features, size_t lane, int32_t end);
  void Finish(Lane* lane);

  Model* model_;
  std::unique_ptr<KvMemory> memory_;
  ReplayOptions options_;
  std::vector<Lane> lanes_;

  Batch batch_;
  KvAppend append_;
  std::vector<Row> rows_;
  std::vector<Piece> pieces_;
  std::vector<float> logits_;
};

}  // namespace triaxial

#endif  // TRIAXIAL_CALIB_REPLAY_H_
