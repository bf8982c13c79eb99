#include "calib/tag_attention.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>

#include "base/check.h"
#include "base/parallel.h"
#include "calib/tag_attention_math.h"
#include "ops/kv_codec.h"
#include "ops/matmul.h"

namespace triaxial {
namespace {

constexpr float kNever = -std::numeric_limits<float>::infinity();
constexpr int32_t kTaskRows = 128;  // queries of a task times the query heads that share a KV head
constexpr int32_t kTileKeys = 512;

// The place of `bits` in `list`, which it joins if it is new.
size_t PlaceOf(int bits, std::vector<int>* list) {
  const auto found = std::find(list->begin(), list->end(), bits);
  if (found != list->end()) return static_cast<size_t>(found - list->begin());
  list->push_back(bits);
  return list->size() - 1;
}

// Unnormalized attention over some keys: weights are relative to exp(top).
struct Partial {
  float top = kNever;
  float sum = 0;
};

// Factors that bring two partial results under the larger top.
struct Merge {
  Merge(const Partial& x, const Partial& y)
      : top(std::max(x.top, y.top)),
        a(x.top == kNever ? 0 : std::exp(x.top - top)),
        b(y.top == kNever ? 0 : std::exp(y.top - top)) {}
  float top, a, b;
};

}  // namespace

std::vector<TokenTurn> TurnsOf(std::span<const TagSpan> spans) {
  std::vector<TokenTurn> tokens;
  for (const TagSpan& span : spans) {
    CHECK(span.begin == static_cast<int32_t>(tokens.size()) && span.end >= span.begin);
    tokens.resize(static_cast<size_t>(span.end), {span.turn, span.modal, span.semantic});
  }
  return tokens;
}

TagTotals TokensByTag(std::span<const TokenTurn> tokens, TagTime time) {
  TagTotals totals{};
  if (tokens.empty()) return totals;
  const auto tag_at = [&](size_t token, int32_t turn) {
    return static_cast<size_t>(
        Tag{Age(tokens[token].turn, turn), tokens[token].modal, tokens[token].semantic}.index());
  };
  if (time == TagTime::kEnd) {
    for (size_t i = 0; i < tokens.size(); ++i) totals[tag_at(i, tokens.back().turn)] += 1;
    return totals;
  }
  const double n = static_cast<double>(tokens.size());
  for (size_t begin = 0; begin < tokens.size();) {
    const int32_t turn = tokens[begin].turn;
    size_t end = begin;
    while (end < tokens.size() && tokens[end].turn == turn) ++end;
    // Those before the turn are seen by all of its queries, those of the turn by the ones that follow.
    for (size_t i = 0; i < end; ++i) {
      totals[tag_at(i, turn)] += static_cast<double>(end - std::max(i, begin)) / n;
    }
    begin = end;
  }
  return totals;
}

struct TagAttention::Scratch {
  std::vector<float> q;                       // [rows][head_dim], scaled
  std::vector<float> keys, values;            // [kTileKeys][head_dim]
  std::vector<std::vector<float>> scores;     // [key bits][rows][kTileKeys]
  std::vector<float> factors;                 // [key bits][rows]
  std::vector<std::vector<Partial>> partial;  // [key bits][segment * rows + row]
  std::vector<std::vector<float>> sums;       // [pair][(segment * rows + row) * head_dim]
  std::vector<float> suffix;                  // [segments + 1][head_dim]
  std::vector<Partial> suffix_partial;        // [segments + 1]
  std::vector<float> prefix, rest, exact;     // [head_dim]
  std::vector<float> errors, read;            // [places][head_dim], with a gram
  std::vector<double*> places;                // that they are added to
  int64_t rows = 0;
};

TagAttention::TagAttention(const Shape& shape, std::span<const TokenTurn> tokens, TagTime time)
    : shape_(shape),
      tokens_(tokens),
      tokens_in_total_(static_cast<int32_t>(tokens.size())),
      time_(time),
      key_bits_{16},
      value_bits_{16},
      pairs_{{0, 0}},
      errors_(static_cast<size_t>(shape.num_heads)) {
  CHECK(shape.num_heads % shape.geometry.num_kv_heads == 0);
  for (int f = 0; f < kFormats; ++f) {
    const std::pair<size_t, size_t> pair = {PlaceOf(Bits(static_cast<Format>(f), Side::kK), &key_bits_),
                                            PlaceOf(Bits(static_cast<Format>(f), Side::kV), &value_bits_)};
    const auto found = std::find(pairs_.begin(), pairs_.end(), pair);
    pair_of_[static_cast<size_t>(f)] = static_cast<size_t>(found - pairs_.begin());
    if (found == pairs_.end()) pairs_.push_back(pair);
  }
  const auto size = static_cast<size_t>(shape.geometry.num_kv_heads * Stride());
  keys_.assign(key_bits_.size(), std::vector<float>(size));
  values_.assign(value_bits_.size(), std::vector<float>(size));
}

void TagAttention::Store(int64_t rows, const float* k, const float* v) {
  const KvGeometry& g = shape_.geometry;
  const int64_t stride = int64_t{g.num_kv_heads} * g.head_dim;
  const int64_t blocks = (rows + kBlockTokens - 1) / kBlockTokens;
  ParallelFor(blocks * g.num_kv_heads, [&](int64_t task) {
    const auto head = static_cast<int>(task % g.num_kv_heads);
    const int64_t first = task / g.num_kv_heads * kBlockTokens;
    const auto count = static_cast<int>(std::min<int64_t>(kBlockTokens, rows - first));
    const int64_t place = head * Stride() + (length_ + first) * g.head_dim;
    // As the cache does, everything is rounded to BF16 before it is quantized.
    const auto round = [&](const float* from, float* to) {
      for (int t = 0; t < count; ++t) {
        RoundToBf16(from + (first + t) * stride + head * g.head_dim, g.head_dim, to + t * g.head_dim);
      }
    };
    float* exact_k = keys_[0].data() + place;
    float* exact_v = values_[0].data() + place;
    round(k, exact_k);
    round(v, exact_v);
    std::vector<uint8_t> block(static_cast<size_t>(HeadBytes(g, Format::kBf16)));
    for (int f = 0; f < kFormats; ++f) {
      const auto format = static_cast<Format>(f);
      const auto [kb, vb] = pairs_[pair_of_[static_cast<size_t>(f)]];
      if (kb == 0 && vb == 0) continue;
      EncodeBlock(g, format, shape_.clip, exact_k, exact_v, g.head_dim, count, block.data());
      if (kb > 0) DecodeSide(g, format, Side::kK, block.data(), count, keys_[kb].data() + place);
      if (vb > 0) DecodeSide(g, format, Side::kV, block.data(), count, values_[vb].data() + place);
    }
  });
}

std::vector<TagAttention::Segment> TagAttention::SegmentsFor(int32_t first_query, int32_t end) const {
  const int32_t turn =
      time_ == TagTime::kEnd ? tokens_.back().turn : tokens_[static_cast<size_t>(first_query)].turn;
  std::vector<Segment> by_tag(kTags);
  for (int32_t i = 0; i < end; ++i) {
    const TokenTurn& token = tokens_[static_cast<size_t>(i)];
    const int tag = Tag{Age(token.turn, turn), token.modal, token.semantic}.index();
    by_tag[static_cast<size_t>(tag)].tag = tag;
    by_tag[static_cast<size_t>(tag)].keys.push_back(i);
  }
  std::erase_if(by_tag, [](const Segment& segment) { return segment.keys.empty(); });
  return by_tag;
}

void TagAttention::Append(int64_t rows, const float* q, const float* k, const float* v) {
  CHECK(length_ % kBlockTokens == 0 && length_ + rows <= tokens_in_total_);
  Store(rows, k, v);
  const KvGeometry& g = shape_.geometry;
  const int32_t q_begin = length_;
  const auto end = static_cast<int32_t>(length_ + rows);
  const int group = shape_.num_heads / g.num_kv_heads;
  const int32_t step = std::max(1, kTaskRows / group);
  std::vector<std::unique_ptr<Scratch>> scratch(static_cast<size_t>(ComputeThreads()));
  for (int32_t begin = length_; begin < end;) {
    // Queries to which all keys have the same tags.
    int32_t last = end;
    if (time_ == TagTime::kTurn) {
      last = begin;
      while (last < end &&
             tokens_[static_cast<size_t>(last)].turn == tokens_[static_cast<size_t>(begin)].turn) {
        ++last;
      }
    }
    const std::vector<Segment> segments = SegmentsFor(begin, last);
    std::vector<Task> tasks;
    for (int32_t from = begin; from < last; from += step) {
      for (int head = 0; head < g.num_kv_heads; ++head) {
        tasks.push_back({head, from, std::min(last, from + step)});
      }
    }
    // Added up in the order of tasks, so that the sums do not depend on the threads.
    std::vector<std::vector<Errors>> errors(tasks.size());
    ParallelFor(static_cast<int64_t>(tasks.size()), [&](int64_t i) {
      std::unique_ptr<Scratch>& own = scratch[static_cast<size_t>(omp_get_thread_num())];
      if (own == nullptr) own = std::make_unique<Scratch>();
      errors[static_cast<size_t>(i)].resize(static_cast<size_t>(group));
      RunTask(tasks[static_cast<size_t>(i)], segments, q, q_begin, own.get(),
              &errors[static_cast<size_t>(i)]);
    });
    for (size_t i = 0; i < tasks.size(); ++i) {
      for (int h = 0; h < group; ++h) {
        Errors& to = errors_[static_cast<size_t>(int64_t{tasks[i].kv_head} * group + h)];
        for (const Segment& segment : segments) {
          const auto tag = static_cast<size_t>(segment.tag);
          for (size_t f = 0; f < kFormats; ++f)
            to.sum[tag][f] += errors[i][static_cast<size_t>(h)].sum[tag][f];
        }
      }
    }
    begin = last;
  }
  length_ = end;
}

void TagAttention::RunTask(const Task& task, const std::vector<Segment>& segments, const float* q,
                           int32_t q_begin, Scratch* scratch, std::vector<Errors>* errors) const {
  const int dim = shape_.geometry.head_dim;
  const int group = shape_.num_heads / shape_.geometry.num_kv_heads;
  scratch->rows = int64_t{task.end - task.begin} * group;
  const size_t rows = static_cast<size_t>(scratch->rows);
  const size_t width = static_cast<size_t>(dim);
  scratch->q.resize(rows * width);
  scratch->scores.resize(key_bits_.size());
  for (std::vector<float>& scores : scratch->scores) scores.resize(rows * kTileKeys);
  scratch->factors.resize(key_bits_.size() * rows);
  scratch->keys.resize(kTileKeys * width);
  scratch->values.resize(kTileKeys * width);
  scratch->partial.assign(key_bits_.size(), std::vector<Partial>(segments.size() * rows));
  scratch->sums.resize(pairs_.size());
  for (std::vector<float>& sums : scratch->sums) sums.resize(segments.size() * rows * width);
  scratch->suffix.resize((segments.size() + 1) * width);
  scratch->suffix_partial.resize(segments.size() + 1);
  for (auto* row : {&scratch->prefix, &scratch->rest, &scratch->exact}) row->resize(width);

  const float scale = 1.0f / std::sqrt(static_cast<float>(dim));
  for (int64_t row = 0; row < scratch->rows; ++row) {
    const int64_t token = task.begin - q_begin + row / group;
    const float* from = q + (token * shape_.num_heads + task.kv_head * group + row % group) * dim;
    for (int c = 0; c < dim; ++c) scratch->q[static_cast<size_t>(row * dim + c)] = from[c] * scale;
  }
  for (size_t s = 0; s < segments.size(); ++s) AttendSegment(task, segments[s], s, scratch);
  for (int h = 0; h < group; ++h) {
    for (int64_t row = h; row < scratch->rows; row += group) {
      Judge(segments, row, scratch, &(*errors)[static_cast<size_t>(h)]);
    }
    if (shape_.gram != nullptr) Read(task.kv_head * group + h, scratch);
  }
}

void TagAttention::Read(int head, Scratch* scratch) const {
  const int dim = shape_.geometry.head_dim;
  const auto count = static_cast<int64_t>(scratch->places.size());
  scratch->read.resize(scratch->errors.size());
  MatMul(count, dim, dim, scratch->errors.data(), dim, shape_.gram + int64_t{head} * dim * dim, dim,
         /*add=*/false, scratch->read.data(), dim);
  for (int64_t i = 0; i < count; ++i) {
    double sum = 0;
    for (int64_t c = i * dim; c < (i + 1) * dim; ++c) {
      sum += double{scratch->errors[static_cast<size_t>(c)]} * scratch->read[static_cast<size_t>(c)];
    }
    *scratch->places[static_cast<size_t>(i)] += std::max(0.0, sum);
  }
  scratch->places.clear();
  scratch->errors.clear();
}

void TagAttention::AttendSegment(const Task& task, const Segment& segment, size_t s, Scratch* scratch) const {
  const int dim = shape_.geometry.head_dim;
  const int group = shape_.num_heads / shape_.geometry.num_kv_heads;
  const int64_t rows = scratch->rows;
  // Only keys up to the last query are seen by any of them.
  const auto seen = static_cast<int32_t>(
      std::lower_bound(segment.keys.begin(), segment.keys.end(), task.end) - segment.keys.begin());
  for (int32_t tile = 0; tile < seen; tile += kTileKeys) {
    const int32_t count = std::min(kTileKeys, seen - tile);
    const std::span<const int32_t> keys =
        std::span(segment.keys).subspan(static_cast<size_t>(tile), static_cast<size_t>(count));
    const bool contiguous = keys.back() - keys.front() == count - 1;
    const auto gather = [&](const std::vector<float>& side, std::vector<float>* own) {
      if (contiguous) return Row(side, task.kv_head, keys.front());
      for (int32_t i = 0; i < count; ++i) {
        std::copy_n(Row(side, task.kv_head, keys[static_cast<size_t>(i)]), dim,
                    own->data() + int64_t{i} * dim);
      }
      return static_cast<const float*>(own->data());
    };
    for (size_t kb = 0; kb < key_bits_.size(); ++kb) {
      float* scores = scratch->scores[kb].data();
      MatMulTransposed(rows, count, dim, scratch->q.data(), dim, gather(keys_[kb], &scratch->keys), dim,
                       scores, count);
      for (int64_t row = 0; row < rows; ++row) {
        const auto query = static_cast<int32_t>(task.begin + row / group);
        const auto visible = std::upper_bound(keys.begin(), keys.end(), query) - keys.begin();
        float* own = scores + row * count;
        Partial& partial = scratch->partial[kb][s * static_cast<size_t>(rows) + static_cast<size_t>(row)];
        float factor = 1;
        if (visible > 0) {
          const float top = std::max(partial.top, LargestOf(own, visible));
          factor = partial.top == kNever ? 0 : std::exp(partial.top - top);
          partial.sum = partial.sum * factor + ExpAndSum(own, visible, top);
          partial.top = top;
        }
        scratch->factors[kb * static_cast<size_t>(rows) + static_cast<size_t>(row)] = factor;
        std::fill(own + visible, own + count, 0.0f);
      }
    }
    for (size_t p = 0; p < pairs_.size(); ++p) {
      const auto [kb, vb] = pairs_[p];
      float* sums = scratch->sums[p].data() + static_cast<int64_t>(s) * rows * dim;
      if (tile > 0) {
        for (int64_t row = 0; row < rows; ++row) {
          const float factor = scratch->factors[kb * static_cast<size_t>(rows) + static_cast<size_t>(row)];
          if (factor != 1) Blend(0, sums + row * dim, factor, sums + row * dim, dim);
        }
      }
      MatMul(rows, dim, count, scratch->scores[kb].data(), count, gather(values_[vb], &scratch->values), dim,
             /*add=*/tile > 0, sums, dim);
    }
  }
}

void TagAttention::Judge(const std::vector<Segment>& segments, int64_t row, Scratch* scratch,
                         Errors* errors) const {
  const int dim = shape_.geometry.head_dim;
  const auto rows = static_cast<size_t>(scratch->rows);
  const auto partial = [&](size_t kb, size_t s) {
    return scratch->partial[kb][s * rows + static_cast<size_t>(row)];
  };
  const auto sums = [&](size_t pair, size_t s) {
    return scratch->sums[pair].data() + (static_cast<int64_t>(s * rows) + row) * dim;
  };
  // What all segments but one contribute comes from those before it and those behind it, never from a
  // difference: a tag that takes nearly all of the attention would leave nothing but rounding errors.
  const size_t n = segments.size();
  scratch->suffix_partial[n] = {};
  std::fill_n(scratch->suffix.begin() + static_cast<int64_t>(n) * dim, dim, 0.0f);
  for (size_t s = n; s-- > 0;) {
    const float* behind = scratch->suffix.data() + static_cast<int64_t>(s + 1) * dim;
    float* to = scratch->suffix.data() + static_cast<int64_t>(s) * dim;
    std::copy_n(behind, dim, to);
    scratch->suffix_partial[s] = scratch->suffix_partial[s + 1];
    const Partial own = partial(0, s);
    if (own.top == kNever) continue;
    const Merge merge(own, scratch->suffix_partial[s + 1]);
    Blend(merge.a, sums(0, s), merge.b, to, dim);
    scratch->suffix_partial[s] = {merge.top,
                                  merge.a * own.sum + merge.b * scratch->suffix_partial[s + 1].sum};
  }
  std::copy_n(scratch->suffix.data(), dim, scratch->exact.data());
  Blend(0, scratch->exact.data(), 1 / scratch->suffix_partial[0].sum, scratch->exact.data(), dim);

  Partial before;
  std::fill(scratch->prefix.begin(), scratch->prefix.end(), 0.0f);
  for (size_t s = 0; s < n; ++s) {
    const Partial own = partial(0, s);
    if (own.top == kNever) continue;  // nothing of this tag is visible
    const Partial& behind = scratch->suffix_partial[s + 1];
    const Merge around(before, behind);
    std::copy_n(scratch->suffix.data() + static_cast<int64_t>(s + 1) * dim, dim, scratch->rest.data());
    Blend(around.a, scratch->prefix.data(), around.b, scratch->rest.data(), dim);
    const Partial rest = {around.top, around.a * before.sum + around.b * behind.sum};
    for (size_t f = 0; f < kFormats; ++f) {
      const size_t pair = pair_of_[f];
      if (pair == 0) continue;
      const Partial stored = partial(pairs_[pair].first, s);
      const Merge merge(rest, stored);
      const float inverse = 1 / (merge.a * rest.sum + merge.b * stored.sum);
      double& place = errors->sum[static_cast<size_t>(segments[s].tag)][f];
      const float* own_sums = sums(pair, s);
      if (shape_.gram == nullptr) {
        place += SquaredError(merge.a * inverse, scratch->rest.data(), merge.b * inverse, own_sums,
                              scratch->exact.data(), dim) /
                 dim;
        continue;
      }
      scratch->places.push_back(&place);
      for (int c = 0; c < dim; ++c) {
        const auto at = static_cast<size_t>(c);
        scratch->errors.push_back(merge.a * inverse * scratch->rest[at] + merge.b * inverse * own_sums[c] -
                                  scratch->exact[at]);
      }
    }
    const Merge merge(own, before);
    Blend(merge.a, sums(0, s), merge.b, scratch->prefix.data(), dim);
    before = {merge.top, merge.a * own.sum + merge.b * before.sum};
  }
}

}  // namespace triaxial
