#include "ops/attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "base/check.h"
#include "base/checked_math.h"
#include "base/parallel.h"
#include "ops/attention_amx.h"
#include "ops/attention_item.h"
#include "ops/attention_vnni.h"
#include "ops/buffer.h"

namespace triaxial {
namespace {

// Blocks of context to one item, if it has few queries (decode) or many (prefill, which has rows to spread).
// Fixed, so that results do not depend on the number of threads.
constexpr int64_t kDecodeQueries = 16;
constexpr int64_t kBlocksDecode = 32;
constexpr int64_t kBlocksPrefill = 128;

// Items [first, first + count) share their rows: their partial states make the result.
struct Merge {
  int64_t first;
  int64_t count;
};

}  // namespace

struct Attention::Scratch {
  bool integer;
  bool matrix;
  std::vector<AttentionItem> items;
  std::vector<Merge> merges;
  std::vector<Buffer> workspaces;      // AttentionWorkspace by thread
  std::vector<Buffer> amx_workspaces;  // AmxWorkspace by thread
  Buffer partials;
};

namespace {

// Plans the items of a sequence; returns the first free place among the partial states.
int64_t PlanSequence(const AttentionArgs& args, const AttentionSequence& sequence, bool has_matrix,
                     int64_t place, std::vector<AttentionItem>& items, std::vector<Merge>& merges) {
  const KvGeometry& g = args.geometry;
  const int group = args.num_heads / g.num_kv_heads;
  const bool matrix = has_matrix && int64_t{sequence.rows} * group > kDecodeQueries;
  const int tile_rows = (matrix ? kAmxQueries : kItemQueries) / group;
  const auto blocks = static_cast<int64_t>(sequence.blocks.size());
  // The last rows attend to most, so they start first.
  for (int64_t tile = CeilDiv(sequence.rows, tile_rows) - 1; tile >= 0; --tile) {
    const int row = static_cast<int>(tile) * tile_rows;
    const int rows = std::min(tile_rows, sequence.rows - row);
    const int queries = rows * group;
    const int64_t split = queries <= kDecodeQueries ? kBlocksDecode : kBlocksPrefill;
    const int64_t splits = std::max<int64_t>(1, CeilDiv(blocks, split));
    for (int head = 0; head < g.num_kv_heads; ++head) {
      if (splits > 1) merges.push_back({static_cast<int64_t>(items.size()), splits});
      for (int64_t s = 0; s < splits; ++s) {
        items.push_back({.sequence = &sequence,
                         .kv_head = head,
                         .row = row,
                         .rows = rows,
                         .block_begin = s * split,
                         .block_end = std::min(blocks, (s + 1) * split),
                         .step = s + 1 == splits,
                         .matrix = matrix,
                         .partial_place = splits > 1 ? place : -1});
        if (splits > 1) place += PartialFloats(queries, g.head_dim);
      }
    }
  }
  return place;
}

// One query vector's result from the states of all items of its context, in their order.
void MergeQuery(const float* states, int64_t stride, int64_t count, int queries, int query, int head_dim,
                float* out) {
  const float* tops = states + queries * head_dim + query;
  const float* sums = tops + queries;
  float top = tops[0];
  for (int64_t i = 1; i < count; ++i) top = std::max(top, tops[i * stride]);
  float sum = 0;
  std::fill_n(out, head_dim, 0.0f);
  for (int64_t i = 0; i < count; ++i) {
    const float factor = std::exp2(tops[i * stride] - top);
    const float* values = states + i * stride + query * head_dim;
    for (int c = 0; c < head_dim; ++c) out[c] += factor * values[c];
    sum += factor * sums[i * stride];
  }
  const float inverse = 1.0f / sum;
  for (int c = 0; c < head_dim; ++c) out[c] *= inverse;
}

}  // namespace

Attention::Attention(Element products, AttentionPath path) : scratch_(new Scratch) {
  scratch_->integer = path == AttentionPath::kFastest && CpuHasVnni();
  scratch_->matrix = path == AttentionPath::kFastest && products == Element::kBf16 && CpuHasAmx();
}

Attention::~Attention() { delete scratch_; }

void Attention::Run(const AttentionArgs& args) {
  const KvGeometry& g = args.geometry;
  CHECK(g.head_dim == 64 || g.head_dim == 128);
  CHECK(args.num_heads > 0 && args.num_heads % g.num_kv_heads == 0);
  const int group = args.num_heads / g.num_kv_heads;
  CHECK(group <= kItemQueries);

  Scratch& s = *scratch_;
  s.items.clear();
  s.merges.clear();
  int64_t partial_floats = 0;
  for (const AttentionSequence& sequence : args.sequences) {
    partial_floats = PlanSequence(args, sequence, s.matrix, partial_floats, s.items, s.merges);
  }
  float* partials = s.partials.Reserve<float>(partial_floats);
  while (static_cast<int>(s.workspaces.size()) < ComputeThreads()) {
    Buffer& workspace = s.workspaces.emplace_back();
    std::memset(workspace.Reserve(sizeof(AttentionWorkspace)), 0, sizeof(AttentionWorkspace));
    if (s.matrix) s.amx_workspaces.emplace_back().Reserve(sizeof(AmxWorkspace));
  }

  ParallelFor(static_cast<int64_t>(s.items.size()), [&](int64_t i) {
    const auto thread = static_cast<size_t>(omp_get_thread_num());
    const AttentionItem& item = s.items[static_cast<size_t>(i)];
    if (item.matrix) {
      auto& workspace = *reinterpret_cast<AmxWorkspace*>(s.amx_workspaces[thread].data());
      return RunAmxItem(args, item, workspace, partials);
    }
    auto& workspace = *reinterpret_cast<AttentionWorkspace*>(s.workspaces[thread].data());
    RunAttentionItem(args, item, s.integer, workspace, partials);
  });
  ParallelFor(static_cast<int64_t>(s.merges.size()), [&](int64_t i) {
    const Merge& merge = s.merges[static_cast<size_t>(i)];
    const AttentionItem& item = s.items[static_cast<size_t>(merge.first)];
    const int queries = item.rows * group;
    for (int query = 0; query < queries; ++query) {
      const int64_t row = int64_t{item.sequence->row_begin} + item.row + query / group;
      const int64_t head = int64_t{item.kv_head} * group + query % group;
      MergeQuery(partials + item.partial_place, PartialFloats(queries, g.head_dim), merge.count, queries,
                 query, g.head_dim, args.out + (row * args.num_heads + head) * g.head_dim);
    }
  });
}

}  // namespace triaxial
