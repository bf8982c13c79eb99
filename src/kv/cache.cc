#include "kv/cache.h"

#include <algorithm>
#include <numeric>
#include <string>

#include "base/check.h"
#include "base/checked_math.h"
#include "base/reserve.h"

namespace triaxial {
namespace {

constexpr size_t kChangesRemembered = 16;  // of a block

size_t Index(Format format) { return static_cast<size_t>(format); }

}  // namespace

int64_t KvUsage::total_tokens() const { return std::accumulate(tokens.begin(), tokens.end(), int64_t{0}); }
int64_t KvUsage::total_bytes() const { return std::accumulate(bytes.begin(), bytes.end(), int64_t{0}); }

double KvUsage::effective_bits(const KvGeometry& g) const {
  const int64_t elements = 2 * total_tokens() * g.num_layers * g.num_kv_heads * g.head_dim;
  return elements == 0 ? 0 : 8.0 * static_cast<double>(total_bytes()) / static_cast<double>(elements);
}

KvCache::KvCache(const KvGeometry& geometry, int64_t total_rows, const TagNeeds& needs, PrefixTree::Hash hash)
    : geometry_(geometry), needs_(needs), allocator_(total_rows), tree_(hash), price_(needs.rest_price) {}

const KvCache::Sequence& KvCache::Find(SequenceId id) const {
  const auto found = sequences_.find(id);
  CHECK(found != sequences_.end());
  return found->second;
}

void KvCache::CountBlock(const KvBlock& b, int sign) {
  const int64_t bytes = Bytes(b);
  usage_.tokens[Index(b.format)] += sign * b.tokens;
  usage_.bytes[Index(b.format)] += sign * bytes;
  if (b.complete()) return;
  usage_.tail_tokens += sign * b.tokens;
  usage_.tail_bytes += sign * bytes;
}

// For `more` blocks besides those in use, and for whatever becomes of any block: that it is held once,
// listed, found, freed.
void KvCache::ReserveBlocks(size_t more) {
  const size_t blocks = blocks_.size() - free_blocks_.size() + more;
  ReserveAtLeast(&blocks_, blocks);
  ReserveAtLeast(&free_blocks_, blocks);
  ReserveAtLeast(&freed_in_step_, freed_in_step_.size() + blocks);
  demotable_.Reserve(blocks);
  evictable_.Reserve(blocks);
  tree_.Reserve(blocks);
  while (blocks_.size() < blocks) {
    KvBlock b;
    b.holders.reserve(1);
    free_blocks_.push_back(static_cast<BlockId>(blocks_.size()));
    blocks_.push_back(std::move(b));
  }
}

BlockId KvCache::NewBlock(Format format, int capacity, uint32_t unit_row, int32_t position) {
  const BlockId id = free_blocks_.back();
  free_blocks_.pop_back();
  KvBlock& b = block(id);
  b.in_use = true;
  b.serial = next_serial_++;
  b.unit_row = unit_row;
  b.position = position;
  b.format = format;
  b.capacity = static_cast<uint8_t>(capacity);
  return id;
}

// Kernels of the current step may still read or write it if `in_step`.
void KvCache::FreeBlock(BlockId id, bool in_step) {
  Unlist(id);
  KvBlock& b = block(id);
  CHECK(b.in_use && b.node == kNoNode);
  CountBlock(b, -1);
  for (size_t i = 0; i < b.tokens; ++i) --tokens_by_tag_[b.tags[i]];
  if (in_step) {
    freed_in_step_.emplace_back(b.unit_row, Units(b));
  } else {
    allocator_.Free(b.unit_row, Units(b));
  }
  KvBlock empty;
  empty.holders.swap(b.holders);  // its memory stays
  empty.holders.clear();
  b = std::move(empty);
  free_blocks_.push_back(id);
}

Format KvCache::FormatOfBlock(const Sequence& sequence, const KvBlock* tail, size_t from_tail,
                              std::span<const KvToken> rows, int64_t position) const {
  std::array<uint8_t, kBlockTokens> tags;
  for (size_t i = 0; i < from_tail; ++i) tags[i] = tail->tags[i];
  for (size_t i = 0; i < rows.size(); ++i) tags[from_tail + i] = rows[i].tag;
  const BlockNeed need = NeedOf(needs_, std::span(tags).first(from_tail + rows.size()), position == 0);
  return std::max(Choose(needs_, need, geometry_, price_), sequence.min_format);
}

void KvCache::MakePlan(const Sequence& sequence, std::span<const KvToken> tokens) const {
  Plan& plan = plan_;
  plan.conversions.clear();
  plan.wishes.clear();
  plan.fills.clear();
  plan.rows = 0;
  plan.settled = sequence.settled;
  const auto left_window = [&](int64_t end, int64_t length) { return end <= length - needs_.recent_window; };

  // Blocks that have left the window before this step, so that its first query still finds a whole window.
  // One with other users stays: it may be in their windows; when it is matched again, it ages.
  for (; plan.settled < sequence.blocks.size(); ++plan.settled) {
    const BlockId id = sequence.blocks[plan.settled];
    const KvBlock& b = block(id);
    if (!left_window(b.position + kBlockTokens, sequence.length)) break;
    if (needs_.recent_window == 0 || b.format != Format::kBf16 || b.users > 1) continue;
    const Format wish = std::max(Choose(needs_, b.need, geometry_, price_), sequence.min_format);
    if (wish == Format::kBf16) continue;
    plan.conversions.push_back(id);
    plan.wishes.push_back(wish);
  }

  const int64_t length = sequence.length + static_cast<int64_t>(tokens.size());
  int capacity = sequence.tail == kNoBlock ? 0 : block(sequence.tail).capacity;
  size_t from_tail = static_cast<size_t>(sequence.length) % kBlockTokens;
  int64_t begin_of_block = sequence.length - static_cast<int64_t>(from_tail);
  for (size_t row = 0; row < tokens.size();) {
    const size_t rows = std::min(kBlockTokens - from_tail, tokens.size() - row);
    Fill fill{.row_begin = static_cast<int32_t>(row),
              .from_tail = static_cast<uint8_t>(from_tail),
              .rows = static_cast<uint8_t>(rows)};
    if (fill.completes() && left_window(begin_of_block + kBlockTokens, length)) {
      fill.format = FormatOfBlock(sequence, from_tail > 0 ? &block(sequence.tail) : nullptr, from_tail,
                                  tokens.subspan(row, rows), begin_of_block);
    }
    if (fill.format == Format::kBf16) {
      const auto needed = static_cast<int>(CeilDiv(from_tail + rows, kTailStep) * kTailStep);
      fill.allocates = needed > capacity;
      fill.capacity = static_cast<uint8_t>(std::max(needed, capacity));
    } else {
      fill.allocates = true;
    }
    if (fill.allocates) plan.rows += UnitsOf(geometry_, fill.format, fill.capacity);
    plan.fills.push_back(fill);
    row += rows;
    from_tail = 0;
    capacity = 0;
    begin_of_block += kBlockTokens;
  }
}

int64_t KvCache::RowsToAppend(SequenceId id, std::span<const KvToken> tokens) const {
  MakePlan(Find(id), tokens);
  return plan_.rows;
}

// All that carrying out plan_, and then FinishStep, may need.
void KvCache::ReservePlan(Sequence* sequence, KvAppend* append) {
  const size_t fills = plan_.fills.size();
  ReserveBlocks(fills + 1);  // one more for the place that a tail leaves
  allocator_.Reserve(fills);
  ReserveAtLeast(&rows_, fills);
  ReserveAtLeast(&append->stores, fills);
  ReserveChanges(plan_.conversions, &append->converts);
  ReserveAtLeast(&in_step_, in_step_.size() + 1);
  const size_t blocks = sequence->blocks.size() + sequence->ahead.size() + fills;
  ReserveAtLeast(&sequence->blocks, blocks);
  ReserveAtLeast(&sequence->view, blocks + 1);
}

// Takes the rows of plan_, all or none.
Status KvCache::AllocatePlan(size_t tokens) {
  rows_.clear();
  if (plan_.rows == 0) return OkStatus();
  bool complete = plan_.rows <= allocator_.free_rows();
  const auto units = [&](const Fill& fill) { return UnitsOf(geometry_, fill.format, fill.capacity); };
  for (const Fill& fill : plan_.fills) {
    if (!fill.allocates || !complete) continue;
    const std::optional<uint32_t> row =
        allocator_.Allocate(units(fill), /*from_top=*/fill.format == Format::kBf16);
    complete = row.has_value();
    if (complete) rows_.push_back(*row);
  }
  if (complete) return OkStatus();

  size_t taken = 0;
  for (const Fill& fill : plan_.fills) {
    if (fill.allocates && taken < rows_.size()) allocator_.Free(rows_[taken++], units(fill));
  }
  const bool fragmented = plan_.rows <= allocator_.free_rows();
  return ResourceExhausted("appending " + std::to_string(tokens) + " tokens takes " +
                           std::to_string(plan_.rows) + " unit rows of KV memory and " +
                           std::to_string(allocator_.free_rows()) + " of " +
                           std::to_string(allocator_.total_rows()) + " are free" +
                           (fragmented ? ", but not together; compact the arena"
                                       : "; wait until other requests finish, or raise --kv-memory"));
}

Status KvCache::Append(SequenceId id, std::span<const KvToken> tokens, KvAppend* append) {
  append->converts.clear();
  append->stores.clear();
  Sequence& sequence = Find(id);
  CHECK(sequence.last_step != step_);
  CHECK(tokens.size() <= static_cast<size_t>(NextStop(id)));
  MakePlan(sequence, tokens);
  ReservePlan(&sequence, append);
  RETURN_IF_ERROR(AllocatePlan(tokens.size()));
  sequence.last_step = step_;
  in_step_.push_back(id);

  for (size_t i = 0; i < plan_.conversions.size(); ++i) {
    ChangeFormat(plan_.conversions[i], plan_.wishes[i], Cause::kWindow, &append->converts);
  }
  sequence.settled = plan_.settled;
  size_t taken = 0;
  for (const Fill& fill : plan_.fills) {
    const uint32_t row = fill.allocates ? rows_[taken++] : 0;
    append->stores.emplace_back();
    Extend(id, &sequence, fill, tokens.subspan(static_cast<size_t>(fill.row_begin), fill.rows), row,
           &append->stores.back());
  }
  CHECK(taken == rows_.size());
  for (const KvToken& token : tokens) {
    CHECK(token.tag < kTags);
    ++tokens_by_tag_[token.tag];
  }
  return OkStatus();
}

// Applies one fill; `row` is where the block lies that it allocates, if it does.
void KvCache::Extend(SequenceId id, Sequence* sequence, const Fill& fill, std::span<const KvToken> tokens,
                     uint32_t row, KvStore* store) {
  *store = {
      .row_begin = fill.row_begin, .from_tail = fill.from_tail, .rows = fill.rows, .format = fill.format};
  const int32_t position = sequence->length - fill.from_tail;
  sequence->length += fill.rows;
  const auto add_tokens = [&](KvBlock* b) {
    for (size_t i = 0; i < tokens.size(); ++i) {
      b->contents[fill.from_tail + i] = tokens[i].content;
      b->tags[fill.from_tail + i] = tokens[i].tag;
    }
    b->tokens = static_cast<uint8_t>(fill.from_tail + fill.rows);
  };
  const auto complete = [&](BlockId b) {
    block(b).need = NeedOf(needs_, block(b).tags, position == 0);
    block(b).need.floor = std::max(block(b).need.floor, sequence->min_format);
    sequence->blocks.push_back(b);
  };

  if (fill.format == Format::kBf16) {
    if (sequence->tail == kNoBlock) {
      sequence->tail = NewBlock(Format::kBf16, fill.capacity, row, position);
      Hold(id, sequence->tail);
      store->tail_row = row;
      store->tail_capacity = fill.capacity;
    } else {
      KvBlock& tail = block(sequence->tail);
      CountBlock(tail, -1);
      store->tail_row = tail.unit_row;
      store->tail_capacity = tail.capacity;
      if (fill.allocates) {
        freed_in_step_.emplace_back(tail.unit_row, Units(tail));
        tail.unit_row = row;
        tail.capacity = fill.capacity;
      }
    }
    KvBlock& tail = block(sequence->tail);
    add_tokens(&tail);
    CountBlock(tail, 1);
    store->unit_row = tail.unit_row;
    store->capacity = tail.capacity;
    if (fill.completes()) complete(std::exchange(sequence->tail, kNoBlock));
    return;
  }

  const BlockId b = NewBlock(fill.format, kBlockTokens, row, position);
  Hold(id, b);
  store->unit_row = store->tail_row = row;
  if (fill.from_tail > 0) {
    KvBlock& tail = block(sequence->tail);
    store->tail_row = tail.unit_row;
    store->tail_capacity = tail.capacity;
    std::copy_n(tail.contents.begin(), fill.from_tail, block(b).contents.begin());
    std::copy_n(tail.tags.begin(), fill.from_tail, block(b).tags.begin());
    for (size_t i = 0; i < fill.from_tail; ++i) ++tokens_by_tag_[tail.tags[i]];  // FreeBlock counts them out
    FreeBlock(std::exchange(sequence->tail, kNoBlock), /*in_step=*/true);
  }
  add_tokens(&block(b));
  CountBlock(block(b), 1);
  complete(b);
}

void KvCache::ReserveChanges(std::span<const BlockId> ids, std::vector<KvConvert>* converts) {
  ReserveAtLeast(converts, converts->size() + ids.size());
  ReserveAtLeast(&converted_, converted_.size() + ids.size());
  for (const BlockId id : ids) {
    ReserveAtLeast(&block(id).history, std::min(block(id).history.size() + 1, kChangesRemembered));
  }
}

// In place. The rows that it leaves can be used at once: converts run before stores.
void KvCache::ChangeFormat(BlockId id, Format to, Cause cause, std::vector<KvConvert>* converts) {
  Unlist(id);
  KvBlock& b = block(id);
  CHECK(b.complete() && to < b.format && b.capacity == kBlockTokens);
  const Format from = b.format;
  if (b.convert_step == step_) {  // not run yet: one conversion does both
    (*converts)[b.convert_index].to = to;
  } else {
    b.convert_step = step_;
    b.convert_index = converts->size();
    converts->push_back({.from_row = b.unit_row, .to_row = b.unit_row, .from = from, .to = to});
    converted_.push_back(id);
  }
  CountBlock(b, -1);
  const int left = Units(from) - Units(to);
  allocator_.FreeEnd(b.unit_row + static_cast<uint32_t>(Units(to)), left);
  if (b.users == 0) cached_rows_ -= left;
  b.format = to;
  CountBlock(b, 1);
  for (const SequenceId holder : b.holders) MoveInView(&Find(holder), b.unit_row, from, to);
  ++demotions_[Index(from)][Index(to)][static_cast<size_t>(cause)];
  if (b.history.size() == kChangesRemembered) b.history.erase(b.history.begin());
  b.history.push_back({from, to, cause, price_, step_});
  Reorder(id);
}

void KvCache::FinishStep() {
  for (const auto& [row, rows] : freed_in_step_) allocator_.Free(row, rows);
  freed_in_step_.clear();
  for (const SequenceId id : in_step_) {
    const auto found = sequences_.find(id);
    if (found == sequences_.end()) continue;
    EnterTree(id, &found->second);
    Adopt(&found->second);
    EnterTree(id, &found->second);
    RefreshView(&found->second);
  }
  in_step_.clear();
  converted_.clear();
  RelaxPrice();
  ++step_;
}

void KvCache::AbortStep() {
  const auto lose = [this](SequenceId id) {
    const auto found = sequences_.find(id);
    if (found != sequences_.end()) found->second.lost = true;
  };
  for (const SequenceId id : in_step_) lose(id);
  for (const BlockId id : converted_) {
    KvBlock& b = block(id);
    if (!b.in_use || b.convert_step != step_) continue;  // dropped since, and perhaps another by now
    if (b.node != kNoNode) tree_.Hide(b.node);
    for (const SequenceId holder : b.holders) lose(holder);
  }
  for (const auto& [row, rows] : freed_in_step_) allocator_.Free(row, rows);
  freed_in_step_.clear();
  in_step_.clear();
  converted_.clear();
  ++step_;
}

// Puts a complete block behind those of its format.
void KvCache::AddToView(Sequence* sequence, const KvBlock& b) const {
  std::ptrdiff_t at = 0;
  for (size_t f = 0; f <= Index(b.format); ++f) at += sequence->in_view[f];
  sequence->view.insert(sequence->view.begin() + at,
                        {.unit_row = b.unit_row, .tokens = b.tokens, .format = b.format});
  ++sequence->in_view[Index(b.format)];
}

// Nothing if the view does not show it: it is matched and the sequence has not got there.
void KvCache::MoveInView(Sequence* sequence, uint32_t unit_row, Format from, Format to) const {
  const auto found = std::find_if(sequence->view.begin(), sequence->view.end(),
                                  [&](const KvBlockRef& ref) { return ref.unit_row == unit_row; });
  if (found == sequence->view.end()) return;
  std::ptrdiff_t place = 0;
  for (size_t f = 0; f <= Index(to); ++f) place += sequence->in_view[f];
  found->format = to;
  std::rotate(sequence->view.begin() + place, found, found + 1);
  --sequence->in_view[Index(from)];
  ++sequence->in_view[Index(to)];
}

// Brings the view up to the table: the blocks completed since, and the tail as it is now.
void KvCache::RefreshView(Sequence* sequence) const {
  sequence->view.resize(sequence->viewed);  // without the old tail
  for (; sequence->viewed < sequence->blocks.size(); ++sequence->viewed) {
    AddToView(sequence, block(sequence->blocks[sequence->viewed]));
  }
  if (sequence->tail == kNoBlock) return;
  const KvBlock& tail = block(sequence->tail);
  sequence->view.push_back(
      {.unit_row = tail.unit_row, .tokens = tail.tokens, .format = tail.format, .capacity = tail.capacity});
}

std::span<const KvBlockRef> KvCache::View(SequenceId id) const { return Find(id).view; }

int32_t KvCache::Length(SequenceId id) const { return Find(id).length; }

std::vector<const KvBlock*> KvCache::Blocks(SequenceId id) const {
  const Sequence& sequence = Find(id);
  std::vector<const KvBlock*> blocks;
  blocks.reserve(sequence.blocks.size() + 1);
  ForEachBlock(id, [&](const KvBlock& b) { blocks.push_back(&b); });
  return blocks;
}

std::vector<BlockHandle> KvCache::Handles(SequenceId id) const {
  const Sequence& sequence = Find(id);
  std::vector<BlockHandle> handles;
  for (const BlockId b : sequence.blocks) handles.push_back({b, block(b).serial});
  if (sequence.tail != kNoBlock) handles.push_back({sequence.tail, block(sequence.tail).serial});
  return handles;
}

const KvBlock* KvCache::Block(const BlockHandle& handle) const {
  const KvBlock& b = block(handle.id);
  return b.in_use && b.serial == handle.serial ? &b : nullptr;
}

void KvCache::Compact(const std::function<void(uint32_t from_row, uint32_t to_row, int rows)>& move) {
  CHECK(in_step_.empty() && freed_in_step_.empty() && converted_.empty());
  if (allocator_.free_runs().size() <= 1) return;
  std::vector<BlockId> used;
  for (size_t i = 0; i < blocks_.size(); ++i) {
    if (blocks_[i].in_use) used.push_back(static_cast<BlockId>(i));
  }
  std::sort(used.begin(), used.end(),
            [&](BlockId a, BlockId b) { return block(a).unit_row < block(b).unit_row; });

  // Blocks below the largest free run slide down and those above it slide up, so that none has to cross it.
  const auto largest = std::max_element(allocator_.free_runs().begin(), allocator_.free_runs().end(),
                                        [](const auto& a, const auto& b) { return a.second < b.second; });
  const uint32_t middle = largest->first;
  const auto place = [&](BlockId id, int64_t row) {
    KvBlock& b = block(id);
    const uint32_t from = b.unit_row;
    if (from == row) return;
    b.unit_row = static_cast<uint32_t>(row);
    move(from, b.unit_row, Units(b));
  };
  const auto first_above =
      std::partition_point(used.begin(), used.end(), [&](BlockId b) { return block(b).unit_row < middle; });
  int64_t low = 0;
  for (auto b = used.begin(); b != first_above; ++b) {
    place(*b, low);
    low += Units(block(*b));
  }
  int64_t high = total_rows();
  for (auto b = used.end(); b != first_above;) {
    --b;
    high -= Units(block(*b));
    place(*b, high);
  }
  CHECK(high - low == free_rows());
  allocator_.Reset(static_cast<uint32_t>(low), high - low);
  for (auto& [id, sequence] : sequences_) {
    sequence.view.clear();
    sequence.in_view.fill(0);
    sequence.viewed = 0;
    RefreshView(&sequence);
  }
}

KvUsage KvCache::Usage(SequenceId id) const {
  KvUsage usage;
  ForEachBlock(id, [&](const KvBlock& b) {
    usage.tokens[Index(b.format)] += b.tokens;
    usage.bytes[Index(b.format)] += Bytes(b);
    if (b.complete()) return;
    usage.tail_tokens += b.tokens;
    usage.tail_bytes += Bytes(b);
  });
  return usage;
}

}  // namespace triaxial
