// Where room comes from: which block is re-quantized next, which is dropped, and what a byte costs meanwhile.
#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>

#include "base/check.h"
#include "kv/cache.h"

namespace triaxial {

int KvCache::FloorRows(const KvBlock& b) const {
  return Units(b.format) - Units(std::min(b.format, FloorFormat(needs_, b.need)));
}

// What it costs to compute a block again, per byte, on top of the clock, which goes on by what is dropped
// (GreedyDual-Size, Cao and Irani 1997) and by one whenever as many rows as the arena has were given up: so
// what has not been used for long is worth less, as with LRU.
double KvCache::ValueOf(const KvBlock& b) const {
  constexpr double kAttentionEqualsProducts = 32768;  // position at which both take about as long
  return clock_ + (1 + b.position / kAttentionEqualsProducts) * Units(Format::kK4V4) / Units(b);
}

void KvCache::Unlist(BlockId id) {
  demotable_.Erase(id);
  evictable_.Erase(id);
  slack_rows_ -= std::exchange(block(id).slack, 0);
}

void KvCache::Reorder(BlockId id) {
  Unlist(id);
  KvBlock& b = block(id);
  if (!b.complete()) return;
  if (needs_.priced) {
    const DemotionStep next = NextDemotion(needs_, b.need, geometry_, b.format);
    if (next.to != b.format) {
      demotable_.Insert(next.slope, id);
      b.slack = FloorRows(b);
    }
  }
  if (b.node != kNoNode && !tree_.needed(b.node)) b.slack = Units(b);
  slack_rows_ += b.slack;
  if (b.node != kNoNode && b.users == 0 && tree_.free_to_go(b.node)) evictable_.Insert(b.last_value, id);
}

bool KvCache::Demote(double limit, Cause cause, std::vector<KvConvert>* converts) {
  if (demotable_.empty()) return false;
  const auto [slope, id] = demotable_.least();
  if (slope > limit) return false;
  ReserveChanges({&id, 1}, converts);
  price_ = std::max(price_, slope);
  ChangeFormat(id, NextDemotion(needs_, block(id).need, geometry_, block(id).format).to, cause, converts);
  return true;
}

void KvCache::SleepBlock(const KvBlock& b, const Sleep& sleep) {
  const auto contents_of = [this](BlockId id) -> const auto& { return block(id).contents; };
  const BlockKey key = tree_.Key(b.node, contents_of);
  sleep(b, key, tree_.Key(tree_.parent(b.node), contents_of));
}

bool KvCache::Evict(const Sleep& sleep) {
  if (evictable_.empty()) return false;
  const auto [value, id] = evictable_.least();
  KvBlock& b = block(id);
  clock_ = std::max(clock_, value);
  // Bytes that are not yet what they will be, or that are not to be trusted, are not kept.
  if (sleep && b.convert_step != step_ && tree_.found(b.node)) SleepBlock(b, sleep);
  const NodeId node = std::exchange(b.node, kNoNode);
  const NodeId parent = tree_.parent(node);
  const BlockId above = tree_.block(parent);
  cached_rows_ -= Units(b);
  cached_tokens_ -= b.tokens;
  FreeBlock(id, /*in_step=*/false);
  tree_.Remove(node);  // and the root, if this was its last
  if (above != kNoBlock) Reorder(above);
  ++evictions_;
  return true;
}

int64_t KvCache::Reclaim(int64_t rows, std::vector<KvConvert>* converts, const Sleep& sleep) {
  CHECK(in_step_.empty());
  const double infinity = std::numeric_limits<double>::infinity();
  const double patience = needs_.rest_price > 0 ? kPatience * needs_.rest_price : infinity;
  const auto missing = [&] { return allocator_.free_rows() < rows; };
  if (converts != nullptr) {
    while (missing() && Demote(patience, Cause::kPressure, converts)) {
    }
  }
  while (missing() && Evict(sleep)) {
  }
  if (converts != nullptr) {
    while (missing() && Demote(infinity, Cause::kPressure, converts)) {
    }
  }
  return allocator_.free_rows();
}

// Whether somebody who holds it counts its tokens among the newest.
bool KvCache::Recent(const KvBlock& b) const {
  return std::any_of(b.holders.begin(), b.holders.end(), [&](SequenceId id) {
    const Sequence& holder = Find(id);
    return b.position + kBlockTokens > std::max(holder.length, holder.prompt_length) - needs_.recent_window;
  });
}

void KvCache::AgeBlocks(int blocks, std::vector<KvConvert>* converts) {
  CHECK(in_step_.empty());
  while (blocks > 0 && !ageing_.empty()) {
    const BlockId id = ageing_.back();
    ReserveChanges({&id, 1}, converts);
    ageing_.pop_back();
    KvBlock& b = block(id);
    if (!std::exchange(b.ages, false)) continue;  // it was dropped since
    const Format to = Choose(needs_, b.need, geometry_, price_);
    if (to >= b.format || Recent(b)) continue;
    ChangeFormat(id, to, Cause::kAge, converts);
    --blocks;
  }
}

void KvCache::KeepBudget(int blocks, std::vector<KvConvert>* converts) {
  CHECK(in_step_.empty());
  if (needs_.budget_bits <= 0 || 2 * allocator_.free_rows() > total_rows()) return;
  const auto over = [&] {
    const int64_t tokens = usage_.total_tokens() - usage_.tail_tokens;
    const int64_t bytes = usage_.total_bytes() - usage_.tail_bytes;
    const double elements = 2.0 * static_cast<double>(tokens) * geometry_.num_layers *
                            geometry_.num_kv_heads * geometry_.head_dim;
    return 8.0 * static_cast<double>(bytes) > needs_.budget_bits * elements;
  };
  while (blocks-- > 0 && over() &&
         Demote(std::numeric_limits<double>::infinity(), Cause::kBudget, converts)) {
  }
}

// Pressure is over when a tenth of the arena is free or could be: the price of new blocks falls back slowly.
void KvCache::RelaxPrice() {
  if (price_ <= needs_.rest_price || 10 * (free_rows() + cached_rows_) < total_rows()) return;
  price_ = std::max(needs_.rest_price, price_ * 0.98);
}

void KvCache::SleepAll(const Sleep& sleep) {
  for (const KvBlock& b : blocks_) {
    if (b.in_use && b.node != kNoNode && b.users == 0 && tree_.found(b.node)) SleepBlock(b, sleep);
  }
}

void KvCache::DropCached() {
  while (Evict({})) {
  }
  tree_.ForEach([this](NodeId node) {
    if (!tree_.is_root(node)) tree_.Hide(node);
  });
}

}  // namespace triaxial
