// How much the attention output of one layer suffers if the tokens of one tag are stored at one format: the
// sensitivities D of TriAxialKV (arXiv 2605.17170), measured on what a prefill computes anyway.
#ifndef TRIAXIAL_CALIB_TAG_ATTENTION_H_
#define TRIAXIAL_CALIB_TAG_ATTENTION_H_

#include <array>
#include <cstdint>
#include <span>
#include <vector>

#include "kv/codec.h"
#include "kv/tag.h"

namespace triaxial {

// Whose age a token's tag says.
enum class TagTime : uint8_t {
  kEnd,   // that at the conversation's end, for all queries: as published
  kTurn,  // that at the turn of each query, as a server's cache has it when it computes that query: a token
          // is "current" to the queries of its own turn, "older" to those of three and more turns later
};

// What every token of a conversation is; ages aside.
struct TokenTurn {
  int32_t turn = 0;
  Modal modal = Modal::kText;
  Semantic semantic = Semantic::kUser;
};
std::vector<TokenTurn> TurnsOf(std::span<const TagSpan> spans);

using TagTotals = std::array<double, kTags>;
// kEnd: tokens by tag. kTurn: the mean over all queries of the tokens that each one sees, by tag.
TagTotals TokensByTag(std::span<const TokenTurn> tokens, TagTime time);

// One layer. Every (tag, format) is judged apart from the others: keys and values of the tag's tokens as the
// codec stores them at that format, all others as BF16 stores them. Blocks of 64 positions are encoded whole,
// as if they had the format, so where the codec shares scales between tokens (2-bit keys of the codec
// `paper`), a token has the neighbours that it has in the cache; the last, incomplete block is encoded too.
class TagAttention {
 public:
  struct Shape {
    KvGeometry geometry;
    ClipRatios clip;
    int num_heads = 0;
    // What reads the outputs, [num_heads][head_dim][head_dim]: an error e of a head counts e' gram e. Null:
    // the mean of its squares over channels. Must outlive the object.
    const float* gram = nullptr;
  };
  // `tokens` must outlive it.
  TagAttention(const Shape& shape, std::span<const TokenTurn> tokens, TagTime time);

  // The next `rows` tokens: q [rows][num_heads][head_dim], k and v [rows][num_kv_heads][head_dim], all as the
  // observer of a model sees them. All but the last call must end at a multiple of 64 tokens (CHECK).
  void Append(int64_t rows, const float* q, const float* k, const float* v);

  // Of one head: sums over the queries so far of what the error counts.
  struct Errors {
    std::array<std::array<double, kFormats>, kTags> sum{};
  };
  const std::vector<Errors>& errors() const { return errors_; }  // [num_heads]

 private:
  struct Segment {
    int tag = 0;
    std::vector<int32_t> keys;  // ascending
  };
  struct Scratch;
  struct Task {
    int kv_head;
    int32_t begin, end;  // queries
  };

  int64_t Stride() const { return int64_t{tokens_in_total_} * shape_.geometry.head_dim; }
  const float* Row(const std::vector<float>& side, int kv_head, int32_t token) const {
    return side.data() + kv_head * Stride() + int64_t{token} * shape_.geometry.head_dim;
  }
  void Store(int64_t rows, const float* k, const float* v);
  std::vector<Segment> SegmentsFor(int32_t first_query, int32_t end) const;
  void RunTask(const Task& task, const std::vector<Segment>& segments, const float* q, int32_t q_begin,
               Scratch* scratch, std::vector<Errors>* errors) const;
  void AttendSegment(const Task& task, const Segment& segment, size_t s, Scratch* scratch) const;
  void Judge(const std::vector<Segment>& segments, int64_t row, Scratch* scratch, Errors* errors) const;
  // Adds up what Judge left in `scratch` of one head, by its gram.
  void Read(int head, Scratch* scratch) const;

  Shape shape_;
  std::span<const TokenTurn> tokens_;
  int32_t tokens_in_total_;
  TagTime time_;
  int32_t length_ = 0;
  // Distinct sides by their bits, 16 first; and distinct pairs of them, bf16 first, with each format's pair.
  std::vector<int> key_bits_, value_bits_;
  std::vector<std::pair<size_t, size_t>> pairs_;
  std::array<size_t, kFormats> pair_of_{};
  std::vector<std::vector<float>> keys_, values_;  // [bits][kv_head][token][channel], as decoded
  std::vector<Errors> errors_;
};

}  // namespace triaxial

#endif  // TRIAXIAL_CALIB_TAG_ATTENTION_H_
