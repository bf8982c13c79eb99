// A model for tests of the engine. Its next token is a pure function of the tokens before it, and it keeps
// those tokens in the arena where keys and values would lie: a wrong block list, store or conversion makes it
// throw or answer wrongly.
#ifndef TRIAXIAL_ENGINE_FAKE_MODEL_H_
#define TRIAXIAL_ENGINE_FAKE_MODEL_H_

#include <fmt/format.h>

#include <array>
#include <atomic>
#include <cstring>
#include <functional>
#include <span>
#include <stdexcept>
#include <vector>

#include "model/model.h"

namespace triaxial {

class FakeModel : public Model {
 public:
  static constexpr int kVocab = 101;
  static constexpr int32_t kEos = 100;
  static constexpr int32_t kImagePad = 99;

  explicit FakeModel(Codec codec = Codec::kPaper, int max_positions = 100000) {
    config_.text = {.hidden_size = 1, .num_layers = 2, .num_heads = 1, .num_kv_heads = 1, .head_dim = 64};
    config_.text.vocab_size = kVocab;
    config_.text.max_position_embeddings = max_positions;
    config_.vision = VisionConfig{};
    config_.image_token_id = kImagePad;
    geometry_ = {2, 1, 64, codec};
  }

  // What follows `tokens`: eos about once in a hundred.
  static int32_t Next(std::span<const int32_t> tokens) {
    uint64_t sum = 0;
    for (size_t i = 0; i < tokens.size(); ++i) sum += Mix(i, tokens[i]);
    return Choose(sum);
  }
  // The greedy continuation until `count` tokens or eos.
  static std::vector<int32_t> Continue(std::vector<int32_t> tokens, size_t count) {
    std::vector<int32_t> output;
    while (output.size() < count && (output.empty() || output.back() != kEos)) {
      output.push_back(Next(tokens));
      tokens.push_back(output.back());
    }
    return output;
  }
  // What a picture's token counts as.
  static int32_t VisualToken(uint64_t image_hash, int32_t feature) {
    return static_cast<int32_t>(1000 + image_hash % 1000 * 100 + static_cast<uint64_t>(feature));
  }

  const ModelConfig& config() const override { return config_; }
  KvGeometry geometry() const override { return geometry_; }
  const KvCalibration& calibration() const override { return calibration_; }
  int64_t parameters() const override { return 0; }
  int64_t decode_weight_bytes() const override { return 0; }

  void Forward(const Batch& batch, KvMemory* memory, float* logits) override {
    auto* arena = static_cast<KvArena*>(memory);
    if (on_forward) on_forward(batch);
    for (const KvConvert& c : batch.converts) {
      const std::vector<Record> records = Read(*arena, {c.from_row, kBlockTokens, c.from});
      Write(arena, {c.to_row, kBlockTokens, c.to}, records);
    }
    std::vector<int32_t> rows = batch.tokens;
    for (const VisualRows& v : batch.visual) {
      for (int32_t i = 0; i < v.count; ++i) {
        Require(rows[static_cast<size_t>(v.row + i)] == kImagePad, "visual rows on a text token");
        rows[static_cast<size_t>(v.row + i)] =
            static_cast<int32_t>(v.features->embeddings[static_cast<size_t>(v.feature + i)]);
      }
    }
    std::vector<Record> appended(rows.size());
    size_t next_logits = 0;
    int32_t next_row = 0;
    for (const AttentionSequence& sequence : batch.sequences) {
      Require(sequence.row_begin == next_row && sequence.rows > 0, "sequences do not cover the rows");
      next_row += sequence.rows;
      uint64_t sum = 0;
      int32_t index = ReadContext(*arena, sequence.blocks, &sum);
      for (int32_t r = sequence.row_begin; r < next_row; ++r, ++index) {
        const int32_t token = rows[static_cast<size_t>(r)];
        appended[static_cast<size_t>(r)] = {index, token};
        sum += Mix(static_cast<size_t>(index), token);
        if (next_logits == batch.logits_rows.size() || batch.logits_rows[next_logits] != r) continue;
        float* row = logits + kVocab * next_logits++;
        for (int v = 0; v < kVocab; ++v)
          row[v] = static_cast<float>(Mix(static_cast<size_t>(v), index) % 1000) / 1000;
        row[Choose(sum)] = 5;
        if (on_logits) on_logits(std::span(row, kVocab));
      }
    }
    Require(next_row == batch.rows() && next_logits == batch.logits_rows.size(), "rows left over");
    for (const KvStore& s : batch.stores) {
      std::vector<Record> records = Read(*arena, {s.tail_row, s.from_tail, Format::kBf16, s.tail_capacity});
      const auto begin = appended.begin() + s.row_begin;
      records.insert(records.end(), begin, begin + s.rows);
      const bool in_place = s.format == Format::kBf16 && s.unit_row == s.tail_row;
      Require(!in_place || s.capacity == s.tail_capacity, "a block of two capacities");
      Require(s.format == Format::kBf16 || records.size() == kBlockTokens, "an incomplete block is encoded");
      Write(arena, {s.unit_row, static_cast<uint8_t>(records.size()), s.format, s.capacity}, records);
    }
  }

  VisualFeatures Encode(const ImagePatches& patches, const PreprocessorConfig& preprocessor) override {
    ++encoded;
    if (on_encode) on_encode(patches);
    VisualFeatures features;
    features.tokens = patches.tokens(preprocessor.merge_size);
    for (int32_t i = 0; i < features.tokens; ++i) {
      features.embeddings.push_back(static_cast<float>(VisualToken(patches.hash_lo, i)));
    }
    return features;
  }

  // Called on the engine thread, first in Forward and Encode and last for a row of logits; set before the
  // engine starts.
  std::function<void(const Batch&)> on_forward;
  std::function<void(std::span<float>)> on_logits;
  std::function<void(const ImagePatches&)> on_encode;
  std::atomic<int> encoded = 0;

 private:
  struct Record {
    int32_t index;  // in the sequence
    int32_t token;
  };

  static uint64_t Mix(size_t index, int32_t token) {
    uint64_t x = index * 0x9e3779b97f4a7c15u + static_cast<uint64_t>(token) * 0xd1342543de82ef95u + 1;
    x = (x ^ (x >> 31)) * 0xbf58476d1ce4e5b9u;
    return x ^ (x >> 29);
  }
  static int32_t Choose(uint64_t sum) {
    const auto choice = static_cast<int32_t>(Mix(3, static_cast<int32_t>(sum ^ (sum >> 32))) % kVocab);
    return choice == kImagePad ? 0 : choice;
  }
  static void Require(bool condition, const char* what) {
    if (!condition) throw std::logic_error(fmt::format("fake model: {}", what));
  }

  uint8_t* Place(KvArena* arena, int layer, uint32_t unit_row) const {
    return arena->LayerData(layer) + int64_t{unit_row} * UnitRowBytes(geometry_);
  }
  // Where the index of a block's token lies, and behind the same way into the V side, the token. Only who
  // knows format and capacity finds the second.
  std::array<int64_t, 2> PlacesOf(const KvBlockRef& block, size_t token) const {
    Require(block.capacity > 0 && block.capacity <= kBlockTokens && block.capacity % kTailStep == 0,
            "a capacity that does not exist");
    Require(block.tokens <= RoomOf(block.format, block.capacity),
            "a block of more tokens than it has room for");
    const auto at = static_cast<int64_t>(token * sizeof(int32_t));
    return {at, at + SideOffset(geometry_, block.format, Side::kV, block.capacity)};
  }
  // Records go to all layers and are read from the last, so that a move that forgets a layer shows.
  void Write(KvArena* arena, const KvBlockRef& block, const std::vector<Record>& records) const {
    for (int layer = 0; layer < geometry_.num_layers; ++layer) {
      uint8_t* to = Place(arena, layer, block.unit_row);
      for (size_t i = 0; i < records.size(); ++i) {
        const auto [index, token] = PlacesOf(block, i);
        std::memcpy(to + index, &records[i].index, sizeof(int32_t));
        std::memcpy(to + token, &records[i].token, sizeof(int32_t));
      }
    }
  }
  std::vector<Record> Read(const KvArena& arena, const KvBlockRef& block) const {
    std::vector<Record> records(block.tokens);
    const uint8_t* from = Place(const_cast<KvArena*>(&arena), geometry_.num_layers - 1, block.unit_row);
    for (size_t i = 0; i < records.size(); ++i) {
      const auto [index, token] = PlacesOf(block, i);
      std::memcpy(&records[i].index, from + index, sizeof(int32_t));
      std::memcpy(&records[i].token, from + token, sizeof(int32_t));
    }
    return records;
  }
  // Sums up a context whose tokens must be 0, 1, 2, ... once each; returns their number.
  int32_t ReadContext(const KvArena& arena, std::span<const KvBlockRef> blocks, uint64_t* sum) const {
    std::vector<bool> seen;
    for (const KvBlockRef& block : blocks) seen.resize(seen.size() + block.tokens);
    for (const KvBlockRef& block : blocks) {
      for (const Record& record : Read(arena, block)) {
        Require(record.index >= 0 && static_cast<size_t>(record.index) < seen.size(), "a foreign token");
        Require(!seen[static_cast<size_t>(record.index)], "a token twice");
        seen[static_cast<size_t>(record.index)] = true;
        *sum += Mix(static_cast<size_t>(record.index), record.token);
      }
    }
    return static_cast<int32_t>(seen.size());
  }

  ModelConfig config_;
  KvGeometry geometry_;
  KvCalibration calibration_;
};

}  // namespace triaxial

#endif  // TRIAXIAL_ENGINE_FAKE_MODEL_H_
