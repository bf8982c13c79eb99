#include "text/bpe.h"

#include <algorithm>
#include <bit>
#include <queue>

namespace triaxial {
namespace {

constexpr uint32_t kNoRank = UINT32_MAX;
constexpr size_t kShort = 48;                 // up to here a scan for the best pair beats a queue
constexpr size_t kLongest = size_t{1} << 31;  // no word; it keeps positions within 32 bits

}  // namespace

Bpe::Bpe(const std::array<int32_t, 256>& bytes, const std::vector<Merge>& merges) : bytes_(bytes) {
  const size_t capacity = std::bit_ceil(std::max<size_t>(merges.size() * 2, 2));
  shift_ = 64 - std::countr_zero(capacity);
  slots_.assign(capacity, Slot{0, kNoRank, 0});
  for (size_t rank = 0; rank < merges.size(); ++rank) {
    const Merge& merge = merges[rank];
    Slot& slot = const_cast<Slot&>(Find(merge.left, merge.right));
    slot = {Pair(merge.left, merge.right), static_cast<uint32_t>(rank), merge.result};
  }
}

const Bpe::Slot& Bpe::Find(int32_t left, int32_t right) const {
  const uint64_t pair = Pair(left, right);
  size_t i = Home(pair);
  while (slots_[i].rank != kNoRank && slots_[i].pair != pair) i = (i + 1) & (slots_.size() - 1);
  return slots_[i];
}

void Bpe::Append(std::string_view piece, std::vector<int32_t>* ids) const {
  for (; piece.size() > kLongest; piece.remove_prefix(kLongest)) AppendLong(piece.substr(0, kLongest), ids);
  if (piece.size() <= kShort) {
    AppendShort(piece, ids);
  } else {
    AppendLong(piece, ids);
  }
}

void Bpe::AppendShort(std::string_view piece, std::vector<int32_t>* ids) const {
  struct Part {
    int32_t id;
    uint32_t rank;   // of merging with the next part
    int32_t result;  // of that merge
  } parts[kShort];
  size_t n = piece.size();
  const auto rate = [&](size_t i) {
    if (i + 1 >= n) {
      parts[i].rank = kNoRank;
      return;
    }
    const Slot& slot = Find(parts[i].id, parts[i + 1].id);
    parts[i].rank = slot.rank;
    parts[i].result = slot.result;
  };
  for (size_t i = 0; i < n; ++i) parts[i].id = bytes_[static_cast<uint8_t>(piece[i])];
  for (size_t i = 0; i < n; ++i) rate(i);
  while (n > 1) {
    size_t best = 0;
    for (size_t i = 1; i + 1 < n; ++i) {
      if (parts[i].rank < parts[best].rank) best = i;
    }
    if (parts[best].rank == kNoRank) break;
    parts[best].id = parts[best].result;
    std::copy(parts + best + 2, parts + n, parts + best + 1);
    --n;
    rate(best);
    if (best > 0) rate(best - 1);
  }
  for (size_t i = 0; i < n; ++i) ids->push_back(parts[i].id);
}

void Bpe::AppendLong(std::string_view piece, std::vector<int32_t>* ids) const {
  // 32-bit links halve what a hostile request of one long word costs.
  constexpr uint32_t kNone = UINT32_MAX;
  struct Part {
    int32_t id;  // -1: merged into a part on its left
    uint32_t previous, next;
  };
  struct Candidate {
    uint32_t rank;
    uint32_t at;
    bool operator>(const Candidate& other) const {
      return rank != other.rank ? rank > other.rank : at > other.at;
    }
  };
  const auto n = static_cast<uint32_t>(piece.size());
  std::vector<Part> parts(n);
  for (uint32_t i = 0; i < n; ++i) {
    parts[i] = {bytes_[static_cast<uint8_t>(piece[i])], i > 0 ? i - 1 : kNone, i + 1 < n ? i + 1 : kNone};
  }
  std::priority_queue<Candidate, std::vector<Candidate>, std::greater<>> queue;
  const auto offer = [&](uint32_t i) {
    if (i == kNone || parts[i].next == kNone) return;
    const Slot& slot = Find(parts[i].id, parts[parts[i].next].id);
    if (slot.rank != kNoRank) queue.push({slot.rank, i});
  };
  for (uint32_t i = 0; i + 1 < n; ++i) offer(i);
  while (!queue.empty()) {
    const Candidate candidate = queue.top();
    queue.pop();
    Part& left = parts[candidate.at];
    if (left.id < 0 || left.next == kNone) continue;
    const Slot& slot = Find(left.id, parts[left.next].id);
    if (slot.rank != candidate.rank) continue;  // one of the two was merged with somebody else meanwhile
    Part& right = parts[left.next];
    left.id = slot.result;
    left.next = right.next;
    if (right.next != kNone) parts[right.next].previous = candidate.at;
    right.id = -1;
    offer(candidate.at);
    offer(left.previous);
  }
  for (uint32_t i = 0; i != kNone; i = parts[i].next) ids->push_back(parts[i].id);
}

}  // namespace triaxial
