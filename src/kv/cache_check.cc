// The cache counted again from its tables: what tests and idle servers compare it with.
#include <algorithm>
#include <map>
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

auto OrderOf(const KvBlockRef& ref) { return std::tuple(ref.format, ref.unit_row, ref.tokens, ref.capacity); }

KvBlockRef RefOf(const KvBlock& b) {
  return {.unit_row = b.unit_row, .tokens = b.tokens, .format = b.format, .capacity = b.capacity};
}

}  // namespace

Status KvCache::CheckSequence(const Sequence& sequence) const {
  const auto at = [](const KvBlock& b) { return "the block at position " + std::to_string(b.position); };
  int32_t position = 0;
  std::vector<KvBlockRef> refs;
  for (const BlockId id : sequence.blocks) {
    const KvBlock& b = block(id);
    if (!b.in_use) return Internal(at(b) + " is free");
    if (!b.complete()) return Internal(at(b) + " counts as complete and is not");
    if (b.position != position) return Internal(at(b) + " belongs at " + std::to_string(position));
    if (b.format < sequence.min_format) return Internal(at(b) + " has fewer bits than the sequence allows");
    position += kBlockTokens;
    refs.push_back(RefOf(b));
  }
  if (sequence.tail != kNoBlock) {
    const KvBlock& tail = block(sequence.tail);
    if (!tail.in_use || tail.users != 1) return Internal("a tail has not one user");
    if (tail.format != Format::kBf16) return Internal("a tail is not bf16");
    if (tail.tokens == 0 || tail.complete() || tail.tokens > tail.capacity) {
      return Internal("a tail holds " + std::to_string(tail.tokens) + " of " + std::to_string(tail.capacity) +
                      " tokens");
    }
    if (tail.position != position)
      return Internal("the tail " + at(tail) + " belongs at " + std::to_string(position));
    position += tail.tokens;
  }
  if (position != sequence.length) {
    return Internal("its blocks hold " + std::to_string(position) + " tokens, its length is " +
                    std::to_string(sequence.length));
  }
  for (size_t i = sequence.ahead.size(); i-- > 0;) {
    const KvBlock& b = block(sequence.ahead[i]);
    if (!b.in_use || b.position < position) return Internal("what it matched lies behind it");
    position = b.position + kBlockTokens;
  }
  if (sequence.settled > sequence.blocks.size()) return Internal("more blocks are settled than exist");
  if (sequence.entered > sequence.blocks.size()) return Internal("more blocks are in the tree than exist");
  if (sequence.last_step == step_) return OkStatus();  // its view still shows the time before the step

  std::vector<KvBlockRef> view = sequence.view;
  if (sequence.tail != kNoBlock) {
    if (view.empty() || OrderOf(view.back()) != OrderOf(RefOf(block(sequence.tail)))) {
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

// Nodes and blocks know each other; children, pins, cached rows and the two orders are as counted.
Status KvCache::CheckTree() const {
  std::map<NodeId, int32_t> children, pins;
  Status status = OkStatus();
  size_t blocks_in_tree = 0;
  tree_.ForEach([&](NodeId node) {
    if (tree_.is_root(node)) return;
    ++children[tree_.parent(node)];
    ++blocks_in_tree;
    const BlockId b = tree_.block(node);
    if (b == kNoBlock || !block(b).in_use || block(b).node != node || !block(b).complete()) {
      status = Internal("node " + std::to_string(node) + " of the tree and its block disagree");
    }
  });
  RETURN_IF_ERROR(status);
  for (const auto& [id, sequence] : sequences_) {
    if (sequence.node != kNoNode) ++pins[sequence.node];
  }
  if (waking_ != kNoNode) ++pins[waking_];
  std::map<NodeId, int32_t> reasons = pins;
  tree_.ForEach([&](NodeId node) {
    if (!tree_.is_root(node) && block(tree_.block(node)).users > 0) ++reasons[node];
  });
  std::vector<NodeId> needed;
  for (const auto& [node, count] : reasons) needed.push_back(node);
  while (!needed.empty()) {
    const NodeId parent = tree_.parent(needed.back());
    needed.pop_back();
    if (parent != kNoNode && ++reasons[parent] == 1) needed.push_back(parent);
  }
  tree_.ForEach([&](NodeId node) {
    if (tree_.reasons(node) != reasons[node]) {
      status = Internal("node " + std::to_string(node) + " counts " + std::to_string(tree_.reasons(node)) +
                        " reasons to stay, found " + std::to_string(reasons[node]));
    }
    if (tree_.children(node) != children[node] || tree_.pins(node) != pins[node]) {
      status = Internal("node " + std::to_string(node) + " counts " + std::to_string(tree_.children(node)) +
                        " children and " + std::to_string(tree_.pins(node)) + " pins, found " +
                        std::to_string(children[node]) + " and " + std::to_string(pins[node]));
    }
    if (tree_.is_root(node) && tree_.free_to_go(node)) status = Internal("an empty root is left");
  });
  RETURN_IF_ERROR(status);

  int64_t cached_rows = 0, cached_tokens = 0, slack_rows = 0;
  size_t demotable = 0, evictable = 0;
  for (size_t i = 0; i < blocks_.size(); ++i) {
    const KvBlock& b = blocks_[i];
    const auto id = static_cast<BlockId>(i);
    if (!b.in_use) {
      if (demotable_.Contains(id) || evictable_.Contains(id) || b.node != kNoNode)
        return Internal("a free block is listed");
      continue;
    }
    if (b.node != kNoNode) --blocks_in_tree;
    if (b.users == 0) {
      if (b.node == kNoNode) return Internal("block " + std::to_string(i) + " is nobody's");
      cached_rows += Units(b);
      cached_tokens += b.tokens;
    }
    slack_rows += b.slack;
    if (b.node != kNoNode && !tree_.needed(b.node) && b.slack != Units(b)) {
      return Internal("block " + std::to_string(i) + " is nobody's and does not count as reclaimable");
    }
    if (demotable_.Contains(id)) {
      ++demotable;
      if (!needs_.priced || demotable_.key(id) != NextDemotion(needs_, b.need, geometry_, b.format).slope) {
        return Internal("block " + std::to_string(i) + " is listed to be demoted at a wrong price");
      }
    }
    const bool may_go = b.node != kNoNode && b.users == 0 && tree_.free_to_go(b.node);
    if (may_go != evictable_.Contains(id)) {
      return Internal(
          "block " + std::to_string(i) +
          (may_go ? " could be dropped and is not listed" : " is listed to be dropped and is needed"));
    }
    if (may_go) ++evictable;
  }
  if (blocks_in_tree != 0) return Internal("blocks and nodes of the tree differ in number");
  if (demotable != demotable_.size())
    return Internal("the order of demotion lists blocks that are not there");
  if (evictable != evictable_.size())
    return Internal("the order of eviction lists blocks that are not there");
  if (cached_rows != cached_rows_ || cached_tokens != cached_tokens_) {
    return Internal("cached blocks have " + std::to_string(cached_rows) + " rows, counted are " +
                    std::to_string(cached_rows_));
  }
  if (slack_rows != slack_rows_) return Internal("the rows that can be reclaimed are miscounted");
  return OkStatus();
}

Status KvCache::CheckIntegrity() const {
  // Users of each block, and the counters.
  std::vector<std::vector<SequenceId>> holders(blocks_.size());
  for (const auto& [id, sequence] : sequences_) {
    if (const Status status = CheckSequence(sequence); !status.ok()) {
      return Internal("sequence " + std::to_string(id) + ": " + status.message());
    }
    for (const BlockId b : sequence.blocks) holders[static_cast<size_t>(b)].push_back(id);
    for (const BlockId b : sequence.ahead) holders[static_cast<size_t>(b)].push_back(id);
    if (sequence.tail != kNoBlock) holders[static_cast<size_t>(sequence.tail)].push_back(id);
  }
  KvUsage usage;
  std::array<int64_t, kTags> by_tag{};
  std::vector<Run> runs;
  size_t free_slots = 0;
  for (size_t i = 0; i < blocks_.size(); ++i) {
    const KvBlock& b = blocks_[i];
    const std::string name = "block " + std::to_string(i);
    std::vector<SequenceId> said = b.holders;
    std::sort(said.begin(), said.end());
    std::sort(holders[i].begin(), holders[i].end());
    if (said != holders[i] || static_cast<size_t>(b.users) != said.size()) {
      return Internal(name + " counts " + std::to_string(b.users) + " users and " +
                      std::to_string(holders[i].size()) + " tables hold it");
    }
    if (!b.in_use) {
      ++free_slots;
      continue;
    }
    usage.tokens[static_cast<size_t>(b.format)] += b.tokens;
    usage.bytes[static_cast<size_t>(b.format)] += Bytes(b);
    if (!b.complete()) {
      usage.tail_tokens += b.tokens;
      usage.tail_bytes += Bytes(b);
    }
    for (size_t t = 0; t < b.tokens; ++t) ++by_tag[b.tags[t]];
    runs.push_back({b.unit_row, Units(b), name});
  }
  if (free_slots != free_blocks_.size()) {
    return Internal(std::to_string(free_slots) + " block slots are free and " +
                    std::to_string(free_blocks_.size()) + " are listed");
  }
  if (usage != usage_) return Internal("the usage counters differ from the blocks");
  if (by_tag != tokens_by_tag_) return Internal("the tokens by tag differ from the blocks");
  RETURN_IF_ERROR(CheckTree());

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
