// How sequences share blocks: what a prompt finds, how its blocks are held, how completed blocks enter the
// tree.
#include <algorithm>
#include <limits>
#include <new>

#include "base/check.h"
#include "base/reserve.h"
#include "kv/cache.h"

namespace triaxial {
namespace {

std::span<const KvToken> BlockTokens(const KvPrompt& prompt, size_t b) {
  return prompt.tokens.subspan(b * kBlockTokens, kBlockTokens);
}

// The last token is always computed.
size_t BlocksToMatch(const KvPrompt& prompt) {
  return prompt.tokens.empty() ? 0 : (prompt.tokens.size() - 1) / kBlockTokens;
}

}  // namespace

NodeId KvCache::ChildOf(NodeId node, std::span<const KvToken> tokens) const {
  std::array<ContentId, kBlockTokens> contents;
  for (size_t i = 0; i < kBlockTokens; ++i) contents[i] = tokens[i].content;
  return tree_.FindChild(node, contents, [&](BlockId b) { return block(b).contents == contents; });
}

KvMatch KvCache::Match(const KvPrompt& prompt) const {
  KvMatch match{.begin = 0, .stop = static_cast<int32_t>(prompt.tokens.size())};
  const size_t count = BlocksToMatch(prompt);
  bool stopped = false;
  NodeId node = tree_.FindRoot(prompt.salt);
  for (size_t b = 0; b < count && node != kNoNode; ++b) {
    node = ChildOf(node, BlockTokens(prompt, b));
    if (node == kNoNode) break;
    const KvBlock& found = block(tree_.block(node));
    if (found.format < prompt.min_format) continue;
    const auto position = static_cast<int32_t>(b * kBlockTokens);
    if (match.begin == position) {
      match.begin += kBlockTokens;
      if (found.users == 0) match.idle_rows += Units(found);
    } else if (!stopped) {
      stopped = true;
      match.stop = position;
    }
    match.tokens += kBlockTokens;
  }
  return match;
}

SequenceId KvCache::CreateSequence() {
  sequences_[next_id_];
  return next_id_++;
}

SequenceId KvCache::CreateSequence(const KvPrompt& prompt) {
  std::map<SequenceId, Sequence> created;
  const SequenceId id = next_id_;
  Sequence& sequence = created[id];
  sequence.min_format = prompt.min_format;
  sequence.prompt_length = static_cast<int32_t>(prompt.tokens.size());
  const size_t count = BlocksToMatch(prompt);
  NodeId node = tree_.FindRoot(prompt.salt);
  for (size_t b = 0; b < count && node != kNoNode; ++b) {
    node = ChildOf(node, BlockTokens(prompt, b));
    if (node == kNoNode) break;
    KvBlock& found = block(tree_.block(node));
    if (found.format < prompt.min_format) continue;
    ReserveAtLeast(&found.holders, found.holders.size() + 1);
    sequence.ahead.push_back(tree_.block(node));
  }
  sequence.blocks.reserve(sequence.ahead.size());
  sequence.view.reserve(sequence.ahead.size());
  ReserveAtLeast(&ageing_, ageing_.size() + sequence.ahead.size());
  const NodeId root = tree_.AddRoot(prompt.salt);
  // From here on no memory is needed.
  sequences_.insert(created.extract(id));
  ++next_id_;
  MoveTo(&sequence, root);
  for (const BlockId b : sequence.ahead) {
    KvBlock& found = block(b);
    MeetNeed(sequence, b, BlockTokens(prompt, static_cast<size_t>(found.position) / kBlockTokens));
    Hold(id, b);
    if (found.ages || Choose(needs_, found.need, geometry_, price_) >= found.format) continue;
    found.ages = true;
    ageing_.push_back(b);
  }
  std::reverse(sequence.ahead.begin(), sequence.ahead.end());
  Adopt(&sequence);
  EnterTree(id, &sequence);
  RefreshView(&sequence);
  return id;
}

void KvCache::FreeSequence(SequenceId id) {
  Sequence& sequence = Find(id);
  const bool in_step = sequence.last_step == step_;
  int64_t rows = 0;
  for (const BlockId b : sequence.blocks) rows += Units(block(b));
  clock_ += static_cast<double>(rows) / static_cast<double>(total_rows());
  if (sequence.tail != kNoBlock) Release(id, sequence.tail, in_step);
  for (const BlockId b : sequence.blocks) Release(id, b, in_step);
  for (const BlockId b : sequence.ahead) Release(id, b, in_step);
  MoveTo(&sequence, kNoNode);
  sequences_.erase(id);
}

int32_t KvCache::MatchedTokens(SequenceId id) const {
  const Sequence& sequence = Find(id);
  return sequence.length + static_cast<int32_t>(sequence.ahead.size()) * kBlockTokens;
}

int32_t KvCache::NextStop(SequenceId id) const {
  const Sequence& sequence = Find(id);
  return sequence.ahead.empty() ? std::numeric_limits<int32_t>::max()
                                : block(sequence.ahead.back()).position - sequence.length;
}

// The need of a block that is matched: that of the new user, or the most that all need.
void KvCache::MeetNeed(const Sequence& sequence, BlockId id, std::span<const KvToken> tokens) {
  KvBlock& b = block(id);
  std::array<uint8_t, kBlockTokens> tags;
  for (size_t i = 0; i < kBlockTokens; ++i) tags[i] = tokens[i].tag;
  BlockNeed need = NeedOf(needs_, tags, b.position == 0);
  need.floor = std::max(need.floor, sequence.min_format);
  if (b.users > 0) {
    b.need.Merge(need);
    return;
  }
  b.need = need;
  for (size_t i = 0; i < kBlockTokens; ++i) {
    --tokens_by_tag_[b.tags[i]];
    ++tokens_by_tag_[tags[i]];
  }
  b.tags = tags;
}

void KvCache::Hold(SequenceId id, BlockId b) {
  Unlist(b);
  KvBlock& held = block(b);
  if (held.users == 0 && held.node != kNoNode) {
    cached_rows_ -= Units(held);
    cached_tokens_ -= held.tokens;
  }
  if (held.users == 0 && held.node != kNoNode) CountReason(held.node, 1);
  ++held.users;
  held.holders.push_back(id);
  Reorder(b);
}

void KvCache::Release(SequenceId id, BlockId b, bool in_step) {
  Unlist(b);
  KvBlock& held = block(b);
  const auto holder = std::find(held.holders.begin(), held.holders.end(), id);
  CHECK(holder != held.holders.end());
  *holder = held.holders.back();
  held.holders.pop_back();
  --held.users;
  if (held.users == 0 && held.node == kNoNode) return FreeBlock(b, in_step);
  if (held.users == 0) {
    held.last_value = ValueOf(held);
    cached_rows_ += Units(held);
    cached_tokens_ += held.tokens;
    CountReason(held.node, -1);
  }
  Reorder(b);
}

// The sequence goes on from `node`.
void KvCache::MoveTo(Sequence* sequence, NodeId node) {
  if (node != kNoNode) Pin(node);
  const NodeId old = std::exchange(sequence->node, node);
  if (old != kNoNode) Unpin(old);
}

void KvCache::Pin(NodeId node) {
  tree_.Pin(node);
  CountReason(node, 1);
  if (const BlockId b = tree_.block(node); b != kNoBlock) Reorder(b);
}

void KvCache::Unpin(NodeId node) {
  const BlockId b = tree_.block(node);
  CountReason(node, -1);
  tree_.Unpin(node);  // a root may go
  if (b != kNoBlock) Reorder(b);
}

// One reason more (`by` 1) or less (-1) that a node must stay, and with it those above. Its own block is the
// caller's to reorder.
void KvCache::CountReason(NodeId node, int32_t by) {
  bool changed = tree_.CountReason(node, by);
  while (changed && !tree_.is_root(node)) {
    node = tree_.parent(node);
    changed = tree_.CountReason(node, by);
    if (changed && !tree_.is_root(node)) Reorder(tree_.block(node));
  }
}

// Takes hold of the matched run that begins where the sequence has got to.
void KvCache::Adopt(Sequence* sequence) {
  while (!sequence->ahead.empty() && block(sequence->ahead.back()).position == sequence->length) {
    sequence->blocks.push_back(sequence->ahead.back());
    sequence->ahead.pop_back();
    sequence->length += kBlockTokens;
  }
}

// False: there is no memory for one holder more.
bool KvCache::ReserveHolder(BlockId b) {
  try {
    ReserveAtLeast(&block(b).holders, block(b).holders.size() + 1);
    return true;
  } catch (const std::bad_alloc&) {
    return false;
  }
}

// Complete blocks become known. Where the same contents are known already, the more precise block stays. A
// sequence that cannot take hold of it, for want of memory, goes on alone with its own.
void KvCache::EnterTree(SequenceId id, Sequence* sequence) {
  for (; sequence->entered < sequence->blocks.size(); ++sequence->entered) {
    BlockId own = sequence->blocks[sequence->entered];
    if (sequence->node == kNoNode) {
      Reorder(own);
      continue;
    }
    const std::array<ContentId, kBlockTokens>& contents = block(own).contents;
    NodeId child =
        tree_.FindChild(sequence->node, contents, [&](BlockId b) { return block(b).contents == contents; });
    if (child == kNoNode && block(own).node != kNoNode) {
      child = block(own).node;  // matched, and hidden since
    } else if (child == kNoNode) {
      child = tree_.AddChild(sequence->node, contents, own);
      block(own).node = child;
      CountReason(child, 1);
    } else if (const BlockId known = tree_.block(child); known != own) {
      if (block(known).format >= block(own).format) {
        if (!ReserveHolder(known)) {
          MoveTo(sequence, kNoNode);
          Reorder(own);
          continue;
        }
        block(known).need.Merge(block(own).need);
        Hold(id, known);
        Release(id, own, /*in_step=*/false);
        sequence->blocks[sequence->entered] = known;
      } else {
        Unlist(known);
        KvBlock& worse = block(known);
        worse.node = kNoNode;
        if (worse.users == 0) {
          cached_rows_ -= Units(worse);
          cached_tokens_ -= worse.tokens;
          FreeBlock(known, /*in_step=*/false);
          CountReason(child, 1);
        } else {
          Reorder(known);
        }
        tree_.set_block(child, own);
        block(own).node = child;
      }
    }
    MoveTo(sequence, child);
    Reorder(sequence->blocks[sequence->entered]);
  }
}

KvCache::Waking KvCache::Awake(const KvPrompt& prompt) {
  Waking waking{.node = tree_.FindRoot(prompt.salt)};
  if (waking.node == kNoNode) {
    waking.key = RootKey(prompt.salt);
    return waking;
  }
  for (size_t b = 0; b < BlocksToMatch(prompt); ++b) {
    const NodeId child = ChildOf(waking.node, BlockTokens(prompt, b));
    if (child == kNoNode) break;
    waking.node = child;
    ++waking.blocks;
  }
  waking.key = tree_.Key(
      waking.node, [this](BlockId b) -> const auto& { return block(b).contents; });
  return waking;
}

KvCache::Waking KvCache::BeginWaking(const KvPrompt& prompt) {
  CHECK(waking_ == kNoNode);
  tree_.AddRoot(prompt.salt);
  const Waking waking = Awake(prompt);
  Pin(waking_ = waking.node);
  return waking;
}

bool KvCache::Wake(Format format, std::span<const KvToken> tokens,
                   const std::function<bool(uint32_t unit_row)>& fill, Waking* waking) {
  CHECK(tokens.size() == kBlockTokens && waking->node == waking_);
  ReserveBlocks(1);
  const std::optional<uint32_t> row =
      allocator_.Allocate(Units(format), /*from_top=*/format == Format::kBf16);
  if (!row) return false;
  bool filled = false;
  try {
    filled = fill(*row);
  } catch (...) {
    allocator_.Free(*row, Units(format));
    throw;
  }
  if (!filled) {
    allocator_.Free(*row, Units(format));
    return false;
  }
  const BlockId id = NewBlock(format, kBlockTokens, *row, waking->blocks * kBlockTokens);
  KvBlock& b = block(id);
  for (size_t i = 0; i < kBlockTokens; ++i) {
    b.contents[i] = tokens[i].content;
    b.tags[i] = tokens[i].tag;
    ++tokens_by_tag_[tokens[i].tag];
  }
  b.tokens = kBlockTokens;
  b.need = NeedOf(needs_, b.tags, b.position == 0);
  b.last_value = ValueOf(b);
  CountBlock(b, 1);
  cached_rows_ += Units(b);
  cached_tokens_ += kBlockTokens;
  b.node = tree_.AddChild(waking->node, b.contents, id);
  Pin(b.node);
  Unpin(std::exchange(waking_, b.node));
  waking->node = b.node;
  waking->key = tree_.Key(
      b.node, [this](BlockId known) -> const auto& { return block(known).contents; });
  ++waking->blocks;
  return true;
}

void KvCache::EndWaking() { Unpin(std::exchange(waking_, kNoNode)); }

}  // namespace triaxial
