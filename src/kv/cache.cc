#include "kv/cache.h"

#include <algorithm>
#include <numeric>
#include <string>

#include "base/check.h"
#include "kv/policy.h"

namespace triaxial {
namespace {

constexpr BlockId kNone = -1;

size_t Index(Format format) { return static_cast<size_t>(format); }

// What the first `from_tail` tokens of `tail` and the tokens `rows` wish for together.
Format WishOf(const KvBlock* tail, size_t from_tail, std::span<const KvToken> rows) {
  std::array<Format, kBlockTokens> wishes;
  for (size_t i = 0; i < from_tail; ++i) wishes[i] = tail->token[i].wish;
  for (size_t i = 0; i < rows.size(); ++i) wishes[from_tail + i] = rows[i].wish;
  return BlockFormat(std::span(wishes).first(from_tail + rows.size()));
}

}  // namespace

int64_t KvUsage::total_tokens() const { return std::accumulate(tokens.begin(), tokens.end(), int64_t{0}); }
int64_t KvUsage::total_bytes() const { return std::accumulate(bytes.begin(), bytes.end(), int64_t{0}); }

double KvUsage::effective_bits(const KvGeometry& g) const {
  const int64_t elements = 2 * total_tokens() * g.num_layers * g.num_kv_heads * g.head_dim;
  return elements == 0 ? 0 : 8.0 * static_cast<double>(total_bytes()) / static_cast<double>(elements);
}

KvUsage& KvUsage::operator+=(const KvUsage& other) {
  for (size_t f = 0; f < kFormats; ++f) {
    tokens[f] += other.tokens[f];
    bytes[f] += other.bytes[f];
  }
  tail_tokens += other.tail_tokens;
  tail_bytes += other.tail_bytes;
  return *this;
}

KvCache::KvCache(const KvGeometry& geometry, int64_t total_rows)
    : geometry_(geometry), allocator_(total_rows) {}

const KvCache::Sequence& KvCache::Find(SequenceId id) const {
  const auto found = sequences_.find(id);
  CHECK(found != sequences_.end());
  return found->second;
}

SequenceId KvCache::CreateSequence(int recent_window) {
  CHECK(recent_window >= 0);
  sequences_[next_id_].recent_window = recent_window;
  return next_id_++;
}

void KvCache::FreeSequence(SequenceId id) {
  const Sequence& sequence = Find(id);
  const bool in_step = sequence.last_step == step_;
  if (sequence.tail != kNone) {
    usage_.tail_tokens -= block(sequence.tail).tokens;
    usage_.tail_bytes -= BlockBytes(geometry_, Format::kBf16);
    ReleaseBlock(sequence.tail, in_step);
  }
  for (const BlockId b : sequence.blocks) ReleaseBlock(b, in_step);
  sequences_.erase(id);
}

// Gives up one use of a block. Kernels of the current step may still read or write it if `in_step`.
void KvCache::ReleaseBlock(BlockId id, bool in_step) {
  KvBlock& b = block(id);
  if (--b.users > 0) return;
  usage_.tokens[Index(b.format)] -= b.tokens;
  usage_.bytes[Index(b.format)] -= BlockBytes(geometry_, b.format);
  for (size_t i = 0; i < b.tokens; ++i) --tokens_by_tag_[b.token[i].tag];
  if (in_step) {
    freed_in_step_.emplace_back(b.unit_row, Units(b.format));
  } else {
    allocator_.Free(b.unit_row, Units(b.format));
  }
  free_blocks_.push_back(id);
}

BlockId KvCache::NewBlock(Format format, uint32_t unit_row, int32_t position) {
  if (free_blocks_.empty()) {
    free_blocks_.push_back(static_cast<BlockId>(blocks_.size()));
    blocks_.emplace_back();
  }
  const BlockId id = free_blocks_.back();
  free_blocks_.pop_back();
  KvBlock& b = block(id);
  b.unit_row = unit_row;
  b.position = position;
  b.tokens = 0;
  b.format = format;
  b.users = 1;
  usage_.bytes[Index(format)] += BlockBytes(geometry_, format);
  return id;
}

void KvCache::MakePlan(const Sequence& sequence, std::span<const KvToken> tokens) const {
  Plan& plan = plan_;
  plan.conversions.clear();
  plan.fills.clear();
  plan.rows = 0;
  plan.settled = sequence.settled;
  const auto left_window = [&](int64_t end, int64_t length) {
    return end <= length - sequence.recent_window;
  };

  // Blocks that have left the window before this step, so that its first query still finds a whole window.
  for (; plan.settled < sequence.blocks.size(); ++plan.settled) {
    const KvBlock& b = block(sequence.blocks[plan.settled]);
    if (!left_window(b.position + kBlockTokens, sequence.length)) break;
    if (sequence.recent_window == 0 || b.format != Format::kBf16) continue;  // was stored as it deserves
    const Format wish = WishOf(nullptr, 0, b.token);
    if (wish == Format::kBf16) continue;
    plan.conversions.emplace_back(sequence.blocks[plan.settled], wish);
    plan.rows += Units(wish);
  }

  const int64_t length = sequence.length + static_cast<int64_t>(tokens.size());
  bool has_tail = sequence.tail != kNone;
  size_t from_tail = static_cast<size_t>(sequence.length) % kBlockTokens;
  int64_t begin_of_block = sequence.length - static_cast<int64_t>(from_tail);
  for (size_t row = 0; row < tokens.size();) {
    const size_t rows = std::min(kBlockTokens - from_tail, tokens.size() - row);
    Fill fill{.row_begin = static_cast<int32_t>(row),
              .from_tail = static_cast<uint8_t>(from_tail),
              .rows = static_cast<uint8_t>(rows)};
    if (fill.completes() && left_window(begin_of_block + kBlockTokens, length)) {
      fill.format =
          WishOf(from_tail > 0 ? &block(sequence.tail) : nullptr, from_tail, tokens.subspan(row, rows));
    }
    fill.allocates = !fill.in_place() || !has_tail;
    if (fill.in_place()) has_tail = !fill.completes();  // a complete tail becomes the block
    if (fill.allocates) plan.rows += Units(fill.format);
    plan.fills.push_back(fill);
    row += rows;
    from_tail = 0;
    begin_of_block += kBlockTokens;
  }
}

int64_t KvCache::RowsToAppend(SequenceId id, std::span<const KvToken> tokens) const {
  MakePlan(Find(id), tokens);
  return plan_.rows;
}

// Takes the rows of plan_, all or none.
Status KvCache::AllocatePlan(size_t tokens) {
  rows_.clear();
  if (plan_.rows == 0) return OkStatus();
  bool complete = plan_.rows <= allocator_.free_rows();
  const auto take = [&](Format format) {
    const auto row =
        complete ? allocator_.Allocate(Units(format), /*from_top=*/format == Format::kBf16) : std::nullopt;
    complete = row.has_value();
    if (complete) rows_.push_back(*row);
  };
  for (const auto& [id, format] : plan_.conversions) take(format);
  for (const Fill& fill : plan_.fills) {
    if (fill.allocates) take(fill.format);
  }
  if (complete) return OkStatus();

  size_t taken = 0;
  const auto give_back = [&](Format format) {
    if (taken < rows_.size()) allocator_.Free(rows_[taken++], Units(format));
  };
  for (const auto& [id, format] : plan_.conversions) give_back(format);
  for (const Fill& fill : plan_.fills) {
    if (fill.allocates) give_back(fill.format);
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
  CHECK(tokens.size() <= static_cast<size_t>(INT32_MAX - sequence.length));
  MakePlan(sequence, tokens);
  RETURN_IF_ERROR(AllocatePlan(tokens.size()));
  sequence.last_step = step_;
  in_step_.push_back(id);

  size_t taken = 0;
  for (const auto& [b, format] : plan_.conversions) Convert(&sequence, b, format, rows_[taken++], append);
  sequence.settled = plan_.settled;
  for (const Fill& fill : plan_.fills) {
    const uint32_t row = fill.allocates ? rows_[taken++] : 0;
    append->stores.emplace_back();
    Extend(&sequence, fill, tokens.subspan(static_cast<size_t>(fill.row_begin), fill.rows), row,
           &append->stores.back());
  }
  CHECK(taken == rows_.size());
  for (const KvToken& token : tokens) {
    CHECK(token.tag < kTags);
    ++tokens_by_tag_[token.tag];
  }
  return OkStatus();
}

void KvCache::Convert(Sequence* sequence, BlockId id, Format to, uint32_t to_row, KvAppend* append) {
  KvBlock& b = block(id);
  append->converts.push_back({.from_row = b.unit_row, .to_row = to_row, .from = b.format, .to = to});
  freed_in_step_.emplace_back(b.unit_row, Units(b.format));
  usage_.tokens[Index(b.format)] -= kBlockTokens;
  usage_.bytes[Index(b.format)] -= BlockBytes(geometry_, b.format);
  usage_.tokens[Index(to)] += kBlockTokens;
  usage_.bytes[Index(to)] += BlockBytes(geometry_, to);
  const auto old = std::find_if(sequence->view.begin(), sequence->view.end(),
                                [&](const KvBlockRef& ref) { return ref.unit_row == b.unit_row; });
  CHECK(old != sequence->view.end());
  sequence->view.erase(old);
  --sequence->in_view[Index(b.format)];
  b.unit_row = to_row;
  b.format = to;
  AddToView(sequence, b);
}

// Applies one fill; `row` is where the block lies that it allocates, if it does.
void KvCache::Extend(Sequence* sequence, const Fill& fill, std::span<const KvToken> tokens, uint32_t row,
                     KvStore* store) {
  *store = {
      .row_begin = fill.row_begin, .from_tail = fill.from_tail, .rows = fill.rows, .format = fill.format};
  const int32_t position = sequence->length - fill.from_tail;
  sequence->length += fill.rows;
  if (fill.in_place()) {
    if (fill.allocates) {
      sequence->tail = NewBlock(Format::kBf16, row, position);
      usage_.tail_bytes += BlockBytes(geometry_, Format::kBf16);
    }
    KvBlock& tail = block(sequence->tail);
    tail.position = position;
    std::copy(tokens.begin(), tokens.end(), tail.token.begin() + fill.from_tail);
    tail.tokens = static_cast<uint8_t>(fill.from_tail + fill.rows);
    store->unit_row = store->tail_row = tail.unit_row;
    usage_.tokens[Index(Format::kBf16)] += fill.rows;
    usage_.tail_tokens += fill.rows;
    if (!fill.completes()) return;
    usage_.tail_tokens -= kBlockTokens;
    usage_.tail_bytes -= BlockBytes(geometry_, Format::kBf16);
    sequence->blocks.push_back(sequence->tail);
    sequence->tail = kNone;
    return;
  }
  const BlockId id = NewBlock(fill.format, row, position);
  KvBlock& b = block(id);
  store->unit_row = store->tail_row = row;
  if (fill.from_tail > 0) {
    KvBlock& tail = block(sequence->tail);
    store->tail_row = tail.unit_row;
    std::copy_n(tail.token.begin(), fill.from_tail, b.token.begin());
    tail.tokens = 0;
    usage_.tokens[Index(Format::kBf16)] -= fill.from_tail;
    usage_.tail_tokens -= fill.from_tail;
  }
  std::copy(tokens.begin(), tokens.end(), b.token.begin() + fill.from_tail);
  b.tokens = kBlockTokens;
  usage_.tokens[Index(fill.format)] += kBlockTokens;
  sequence->blocks.push_back(id);
}

void KvCache::TruncateTail(SequenceId id, int32_t length) {
  Sequence& sequence = Find(id);
  const int32_t dropped = sequence.length - length;
  CHECK(dropped >= 0);
  if (dropped == 0) return;
  CHECK(sequence.tail != kNone && dropped <= block(sequence.tail).tokens);
  KvBlock& tail = block(sequence.tail);
  for (int32_t i = tail.tokens - dropped; i < tail.tokens; ++i) {
    --tokens_by_tag_[tail.token[static_cast<size_t>(i)].tag];
  }
  tail.tokens = static_cast<uint8_t>(tail.tokens - dropped);
  sequence.length = length;
  usage_.tokens[Index(Format::kBf16)] -= dropped;
  usage_.tail_tokens -= dropped;
  if (sequence.last_step != step_) RefreshView(&sequence);
}

void KvCache::FinishStep() {
  for (const auto& [row, rows] : freed_in_step_) allocator_.Free(row, rows);
  freed_in_step_.clear();
  for (const SequenceId id : in_step_) {
    const auto found = sequences_.find(id);
    if (found != sequences_.end()) RefreshView(&found->second);
  }
  in_step_.clear();
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

// Brings the view up to the table: the blocks completed since, and the tail as it is now.
void KvCache::RefreshView(Sequence* sequence) const {
  sequence->view.resize(sequence->viewed);  // without the old tail
  for (; sequence->viewed < sequence->blocks.size(); ++sequence->viewed) {
    AddToView(sequence, block(sequence->blocks[sequence->viewed]));
  }
  if (sequence->tail == kNone || block(sequence->tail).tokens == 0) return;
  const KvBlock& tail = block(sequence->tail);
  sequence->view.push_back({.unit_row = tail.unit_row, .tokens = tail.tokens, .format = tail.format});
}

std::span<const KvBlockRef> KvCache::View(SequenceId id) const { return Find(id).view; }

int32_t KvCache::Length(SequenceId id) const { return Find(id).length; }

std::vector<const KvBlock*> KvCache::Blocks(SequenceId id) const {
  const Sequence& sequence = Find(id);
  std::vector<const KvBlock*> blocks;
  blocks.reserve(sequence.blocks.size() + 1);
  for (const BlockId b : sequence.blocks) blocks.push_back(&block(b));
  if (sequence.tail != kNone && block(sequence.tail).tokens > 0) blocks.push_back(&block(sequence.tail));
  return blocks;
}

void KvCache::Compact(const std::function<void(uint32_t from_row, uint32_t to_row, int rows)>& move) {
  CHECK(in_step_.empty() && freed_in_step_.empty());
  if (allocator_.free_runs().size() <= 1) return;
  std::vector<BlockId> used;
  for (size_t i = 0; i < blocks_.size(); ++i) {
    if (blocks_[i].users > 0) used.push_back(static_cast<BlockId>(i));
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
    move(from, b.unit_row, Units(b.format));
  };
  const auto first_above =
      std::partition_point(used.begin(), used.end(), [&](BlockId b) { return block(b).unit_row < middle; });
  int64_t low = 0;
  for (auto b = used.begin(); b != first_above; ++b) {
    place(*b, low);
    low += Units(block(*b).format);
  }
  int64_t high = total_rows();
  for (auto b = used.end(); b != first_above;) {
    --b;
    high -= Units(block(*b).format);
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
  const Sequence& sequence = Find(id);
  KvUsage usage;
  const auto add = [&](const KvBlock& b) {
    usage.tokens[Index(b.format)] += b.tokens;
    usage.bytes[Index(b.format)] += BlockBytes(geometry_, b.format);
  };
  for (const BlockId b : sequence.blocks) add(block(b));
  if (sequence.tail != kNone) {
    add(block(sequence.tail));
    usage.tail_tokens = block(sequence.tail).tokens;
    usage.tail_bytes = BlockBytes(geometry_, Format::kBf16);
  }
  return usage;
}

}  // namespace triaxial
