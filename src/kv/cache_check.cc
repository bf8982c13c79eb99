// The cache counted again from its tables: what tests and idle servers compare it with.
#include <algorithm>
#include <string>
#include <tuple>
#include <vector>

#include "kv/cache.h"

namespace triaxial {
namespace {

struct Run {
  int64_t row = 0;
  int64_t rows = 0;
  std::string what;
};

auto OrderOf(const KvBlockRef& ref) { return std::tuple(ref.format, ref.unit_row, ref.tokens); }

}  // namespace

Status KvCache::CheckSequence(const Sequence& sequence) const {
  const auto at = [](const KvBlock& b) { return "the block at position " + std::to_string(b.position); };
  int32_t position = 0;
  std::vector<KvBlockRef> refs;
  for (const BlockId id : sequence.blocks) {
    const KvBlock& b = block(id);
    if (b.users < 1) return Internal(at(b) + " is free");
    if (b.tokens != kBlockTokens) return Internal(at(b) + " counts as complete and is not");
    if (b.position != position) return Internal(at(b) + " belongs at " + std::to_string(position));
    position += kBlockTokens;
    refs.push_back({.unit_row = b.unit_row, .tokens = b.tokens, .format = b.format});
  }
  if (sequence.tail >= 0) {
    const KvBlock& tail = block(sequence.tail);
    if (tail.users != 1) return Internal("a tail has " + std::to_string(tail.users) + " users");
    if (tail.format != Format::kBf16) return Internal("a tail is not bf16");
    if (tail.tokens >= kBlockTokens) return Internal("a tail is full");
    if (tail.tokens > 0 && tail.position != position) {
      return Internal("the tail " + at(tail) + " belongs at " + std::to_string(position));
    }
    position += tail.tokens;
  }
  if (position != sequence.length) {
    return Internal("its blocks hold " + std::to_string(position) + " tokens, its length is " +
                    std::to_string(sequence.length));
  }
  if (sequence.settled > sequence.blocks.size()) return Internal("more blocks are settled than exist");
  if (sequence.last_step == step_) return OkStatus();  // its view still shows the time before the step

  std::vector<KvBlockRef> view = sequence.view;
  if (sequence.tail >= 0 && block(sequence.tail).tokens > 0) {
    const KvBlock& tail = block(sequence.tail);
    if (view.empty() ||
        OrderOf(view.back()) !=
            OrderOf({.unit_row = tail.unit_row, .tokens = tail.tokens, .format = tail.format})) {
      return Internal("its view does not end with the tail");
    }
    view.pop_back();
  }
  for (size_t i = 1; i < view.size(); ++i) {
    if (view[i].format < view[i - 1].format) return Internal("its view is not sorted by format");
  }
  const auto before = [](const KvBlockRef& a, const KvBlockRef& b) { return OrderOf(a) < OrderOf(b); };
  std::sort(view.begin(), view.end(), before);
  std::sort(refs.begin(), refs.end(), before);
  if (!std::equal(view.begin(), view.end(), refs.begin(), refs.end(),
                  [](const KvBlockRef& a, const KvBlockRef& b) { return OrderOf(a) == OrderOf(b); })) {
    return Internal("its view shows other blocks than its table");
  }
  return OkStatus();
}

Status KvCache::CheckIntegrity() const {
  // Users of each block, and the counters.
  std::vector<int32_t> users(blocks_.size(), 0);
  KvUsage usage;
  std::array<int64_t, kTags> by_tag{};
  for (const auto& [id, sequence] : sequences_) {
    if (const Status status = CheckSequence(sequence); !status.ok()) {
      return Internal("sequence " + std::to_string(id) + ": " + status.message());
    }
    for (const BlockId b : sequence.blocks) ++users[static_cast<size_t>(b)];
    if (sequence.tail < 0) continue;
    ++users[static_cast<size_t>(sequence.tail)];
    usage.tail_tokens += block(sequence.tail).tokens;
    usage.tail_bytes += BlockBytes(geometry_, Format::kBf16);
  }
  std::vector<Run> runs;
  size_t free_slots = 0;
  for (size_t i = 0; i < blocks_.size(); ++i) {
    const KvBlock& b = blocks_[i];
    const std::string name = "block " + std::to_string(i);
    if (b.users != users[i]) {
      return Internal(name + " counts " + std::to_string(b.users) + " users and " + std::to_string(users[i]) +
                      " tables hold it");
    }
    if (b.users == 0) {
      ++free_slots;
      continue;
    }
    usage.tokens[static_cast<size_t>(b.format)] += b.tokens;
    usage.bytes[static_cast<size_t>(b.format)] += BlockBytes(geometry_, b.format);
    for (size_t t = 0; t < b.tokens; ++t) ++by_tag[b.token[t].tag];
    runs.push_back({b.unit_row, Units(b.format), name});
  }
  if (free_slots != free_blocks_.size()) {
    return Internal(std::to_string(free_slots) + " block slots are free and " +
                    std::to_string(free_blocks_.size()) + " are listed");
  }
  if (usage != usage_) return Internal("the usage counters differ from the blocks");
  if (by_tag != tokens_by_tag_) return Internal("the tokens by tag differ from the blocks");

  // Blocks, free runs and rows to be freed tile the arena.
  int64_t free = 0;
  for (const auto& [row, rows] : allocator_.free_runs()) {
    runs.push_back({row, rows, "a free run"});
    free += rows;
  }
  if (free != allocator_.free_rows()) return Internal("the free rows are miscounted");
  for (const auto& [row, rows] : freed_in_step_) runs.push_back({row, rows, "a run freed in this step"});
  std::sort(runs.begin(), runs.end(), [](const Run& a, const Run& b) { return a.row < b.row; });
  int64_t row = 0;
  for (const Run& run : runs) {
    if (run.row != row) {
      return Internal(run.what + " begins at unit row " + std::to_string(run.row) +
                      (run.row < row ? ", inside" : ", past the end of") +
                      " what precedes it, which ends at " + std::to_string(row));
    }
    row += run.rows;
  }
  if (row != total_rows()) {
    return Internal("rows in use and free end at " + std::to_string(row) + " of " +
                    std::to_string(total_rows()));
  }
  return OkStatus();
}

}  // namespace triaxial
