#include "ops/cuda/attention_plan.h"

#include <algorithm>
#include <array>
#include <cmath>

#include "ops/cuda/layout.h"

namespace triaxial::cuda {
namespace {

constexpr int kClasses = 5;  // k2v2, k4v2, k4v4, fp8, bf16
constexpr std::array<int, kClasses> kPieces = {1, 1, 1, 2, 4};
// What a block of each class costs, in blocks of k2v2: where many thread blocks share the memory, and where
// one has a multiprocessor for itself and waits for its own instructions (both measured; docs/kernels.md has
// the times).
constexpr std::array<double, kClasses> kShared = {1.0, 1.45, 1.85, 3.6, 6.9};
constexpr std::array<double, kClasses> kAlone = {1.0, 1.2, 1.2, 1.6, 2.4};

struct Cost {
  double shared = 0;
  double alone = 0;
};

int ClassOf(Format format) {
  switch (Bits(format, Side::kK)) {
    case 2:
      return 0;
    case 4:
      return Bits(format, Side::kV) == 2 ? 1 : 2;
    case 8:
      return 3;
    default:
      return 4;
  }
}

Cost CostOf(const KvBlockRef& block) {
  const auto c = static_cast<size_t>(ClassOf(block.format));
  const int token_tiles = (block.tokens + kTileTokens - 1) / kTileTokens;
  const double part = block.format == Format::kBf16 ? token_tiles / 4.0 : 1.0;
  return {kShared[c] * part, kAlone[c] * part};
}

// Microseconds, measured as the weights: a round of one k2v2 block for each warp, among as many thread blocks
// as fit and alone; what an item costs besides; what merging splits costs.
constexpr double kRoundShared = 2.4, kRoundAlone = 1.35, kItemCost = 7.0, kMergeCost = 2.0;
constexpr double kUneven = 1.35, kCrowded = 1.75;
constexpr int kMaxSplits = 64;
// Items beyond one for each head, for each thread block that runs at a time: bounds the workspace.
constexpr int kExtraItems = 4;

int SplitsFor(double weight, double share, size_t blocks) {
  if (!(share > 0)) return 1;
  const double splits = std::ceil(weight / share - 1e-9);
  return static_cast<int>(
      std::clamp(splits, 1.0, static_cast<double>(std::clamp<size_t>(blocks, 1, kMaxSplits))));
}

// A sequence to be cut.
struct Work {
  Cost cost;
  size_t blocks = 0;
  int pieces = 0;
};

// Time of a step whose sequences are cut into items of at most `share`, by playing through the schedule:
// items are taken heaviest first by whoever is free. `pairs`: KV heads (and parts of their groups), which all
// have the same items.
double Simulate(const std::vector<Work>& work, double share, int pairs, const DecodeMachine& machine,
                std::vector<double>* lanes, std::vector<double>* costs) {
  costs->clear();
  int items = 0;
  for (const Work& w : work) items += SplitsFor(w.cost.shared, share, w.blocks) * pairs;
  // Blocks of a small grid are not spread evenly: some multiprocessors get two while others have none.
  const double busy = std::min(1.0, kUneven * items / machine.blocks);
  const double alone = kRoundAlone * (4 * items > machine.blocks ? kCrowded : 1.0);
  bool merges = false;
  for (const Work& w : work) {
    const int splits = SplitsFor(w.cost.shared, share, w.blocks);
    const double rounds = std::ceil(static_cast<double>(w.pieces) / splits / machine.warps - 1e-6);
    const double of_a_piece = rounds / std::max(1, w.pieces);
    const double time = of_a_piece * std::max(w.cost.shared * kRoundShared * busy, w.cost.alone * alone);
    costs->insert(costs->end(), static_cast<size_t>(splits), time + kItemCost);
    merges |= splits > 1;
  }
  std::sort(costs->begin(), costs->end(), std::greater<>());
  lanes->assign(static_cast<size_t>(std::max(1, machine.blocks / pairs)), 0.0);
  double end = 0;
  for (const double cost : *costs) {
    std::pop_heap(lanes->begin(), lanes->end(), std::greater<>());
    lanes->back() += cost;
    end = std::max(end, lanes->back());
    std::push_heap(lanes->begin(), lanes->end(), std::greater<>());
  }
  return end + (merges ? kMergeCost : 0);
}

// The weight of an item at which the step is shortest.
double BestShare(const std::vector<Work>& work, int pairs, const DecodeMachine& machine) {
  double most = 1, total = 0;
  for (const Work& w : work) most = std::max(most, w.cost.shared), total += w.cost.shared;
  std::vector<double> lanes, costs;
  double best = most, best_time = Simulate(work, most, pairs, machine, &lanes, &costs);
  const auto attempt = [&](double share) {
    int64_t items = 0;
    for (const Work& w : work) items += int64_t{SplitsFor(w.cost.shared, share, w.blocks)} * pairs;
    if (items > static_cast<int64_t>(work.size()) * pairs + kExtraItems * machine.blocks) return;
    const double time = Simulate(work, share, pairs, machine, &lanes, &costs);
    if (time < best_time) best_time = time, best = share;
  };
  // The longest sequence in so many parts.
  for (int parts = 2; parts <= kMaxSplits && most / parts >= 1; parts += 1 + parts / 16)
    attempt(most / parts);
  // Even shares of the whole, for those who run at a time.
  const double even = total * pairs / machine.blocks;
  for (const double share : {even, even * 1.1, even * 1.25}) {
    if (share < most) attempt(share);
  }
  return best;
}

}  // namespace

int MaxItems(const KvGeometry& geometry, int num_heads, const DecodeMachine& machine, int sequences) {
  const int group = num_heads / geometry.num_kv_heads;
  const int pairs = geometry.num_kv_heads * ((group + kItemHeads - 1) / kItemHeads);
  return sequences * pairs + kExtraItems * machine.blocks;
}

void PlanDecode(const KvGeometry& geometry, int num_heads, const DecodeMachine& machine,
                std::span<const AttentionSequence> sequences, DecodePlan* plan, int splits) {
  plan->table.clear();
  plan->items.clear();
  plan->slots = plan->counters = 0;
  struct Sequence {
    int32_t row;
    int32_t table;
    size_t blocks;
    std::array<int, kClasses> counts;
  };
  std::vector<Sequence> decoding;
  std::vector<Work> work;
  for (const AttentionSequence& sequence : sequences) {
    if (sequence.rows != 1) continue;
    Sequence s = {sequence.row_begin, static_cast<int32_t>(plan->table.size()), sequence.blocks.size(), {}};
    Work w = {{}, s.blocks, 0};
    for (const KvBlockRef& block : sequence.blocks) {
      ++s.counts[static_cast<size_t>(ClassOf(block.format))];
      const Cost cost = CostOf(block);
      w.cost.shared += cost.shared, w.cost.alone += cost.alone;
      w.pieces += kPieces[static_cast<size_t>(ClassOf(block.format))];
    }
    std::array<size_t, kClasses> next;
    size_t at = plan->table.size();
    for (int c = 0; c < kClasses; ++c) {
      next[static_cast<size_t>(c)] = at;
      at += static_cast<size_t>(s.counts[static_cast<size_t>(c)]);
    }
    plan->table.resize(at);
    for (const KvBlockRef& block : sequence.blocks) {
      plan->table[next[static_cast<size_t>(ClassOf(block.format))]++] = block;
    }
    decoding.push_back(s);
    work.push_back(w);
  }
  if (decoding.empty()) return;

  const int group = num_heads / geometry.num_kv_heads;
  const int parts = (group + kItemHeads - 1) / kItemHeads;
  const int pairs = geometry.num_kv_heads * parts;
  double most = 0;
  for (const Work& w : work) most = std::max(most, w.cost.shared);
  const double share = splits > 0 ? most / splits : BestShare(work, pairs, machine);
  struct Cut {
    double weight;
    DecodeItem item;
  };
  std::vector<Cut> cuts;
  for (size_t i = 0; i < decoding.size(); ++i) {
    const Sequence& s = decoding[i];
    const int count = SplitsFor(work[i].cost.shared, share, s.blocks);
    size_t begin = 0;
    double passed = 0;
    for (int split = 0; split < count; ++split) {
      const double until = work[i].cost.shared * (split + 1) / count;
      Cut cut = {
          0, {.row = s.row, .table = s.table + static_cast<int32_t>(begin), .split = split, .splits = count}};
      std::array<int, kClasses> counts = {};
      size_t end = begin;
      while (end < s.blocks) {
        const KvBlockRef& block = plan->table[static_cast<size_t>(s.table) + end];
        const double weight = CostOf(block).shared;
        if (split + 1 < count && passed + weight / 2 > until) break;
        passed += weight;
        cut.weight += weight;
        ++counts[static_cast<size_t>(ClassOf(block.format))];
        ++end;
      }
      begin = end;
      int pieces = 0;
      for (size_t c = 0; c < kClasses; ++c) cut.item.end[c] = pieces += counts[c] * kPieces[c];
      cuts.push_back(cut);
    }
  }
  // Heaviest first; the heads of a cut beside each other.
  std::vector<size_t> order(cuts.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  std::stable_sort(order.begin(), order.end(),
                   [&](size_t a, size_t b) { return cuts[a].weight > cuts[b].weight; });
  std::vector<int> slot_of(cuts.size());
  for (size_t i = 0; i < cuts.size(); ++i) {
    if (cuts[i].item.split == 0) {
      cuts[i].item.slot = plan->slots;
      cuts[i].item.counter = plan->counters;
      if (cuts[i].item.splits > 1) plan->slots += cuts[i].item.splits * pairs;
      plan->counters += pairs;
    } else {
      cuts[i].item.slot = cuts[i - 1].item.slot;
      cuts[i].item.counter = cuts[i - 1].item.counter;
    }
  }
  plan->items.reserve(cuts.size() * static_cast<size_t>(pairs));
  for (const size_t index : order) {
    for (int pair = 0; pair < pairs; ++pair) {
      DecodeItem item = cuts[index].item;
      item.kv_head = static_cast<int16_t>(pair / parts);
      item.first_head = static_cast<int16_t>(pair / parts * group + pair % parts * kItemHeads);
      item.heads = std::min(kItemHeads, group - pair % parts * kItemHeads);
      item.slot += pair * item.splits;
      item.counter += pair;
      plan->items.push_back(item);
    }
  }
  for (DecodeItem& item : plan->items) item.items = static_cast<int32_t>(plan->items.size());
}

int MaxPrefillItems(const KvGeometry& geometry, int num_heads, int sequences, int rows) {
  const int group = num_heads / geometry.num_kv_heads;
  return geometry.num_kv_heads * (sequences + rows * group / kPrefillItemQueries);
}

void PlanPrefill(const KvGeometry& geometry, int num_heads, int at_a_time, int least,
                 std::span<const AttentionSequence> sequences, PrefillPlan* plan) {
  plan->table.clear();
  plan->row_tiles = 0;
  plan->items.clear();
  const int group = num_heads / geometry.num_kv_heads;
  for (const AttentionSequence& sequence : sequences) {
    if (sequence.rows < least) continue;
    PrefillItem item = {.row_begin = sequence.row_begin,
                        .rows = sequence.rows,
                        .table = static_cast<int32_t>(plan->table.size()),
                        .blocks = static_cast<int32_t>(sequence.blocks.size()),
                        .row_tile = plan->row_tiles};
    plan->row_tiles += (sequence.rows + kBlockTokens - 1) / kBlockTokens;
    for (const KvBlockRef& block : sequence.blocks) {
      plan->table.push_back({.unit_row = block.unit_row,
                             .tokens = block.tokens,
                             .capacity = block.capacity,
                             .k_bits = static_cast<uint8_t>(Bits(block.format, Side::kK)),
                             .v_bits = static_cast<uint8_t>(Bits(block.format, Side::kV))});
    }
    for (; item.kv_head < geometry.num_kv_heads; ++item.kv_head) {
      for (item.first = 0; item.first < item.rows * group; item.first += kPrefillItemQueries) {
        plan->items.push_back(item);
      }
    }
  }

  for (const AttentionSequence& sequence : sequences) {
    if (sequence.rows < least) continue;
    for (int row = 0; row < sequence.rows; row += kBlockTokens) {
      plan->table.push_back({.unit_row = static_cast<uint32_t>(sequence.row_begin + row),
                             .tokens = static_cast<uint8_t>(std::min(sequence.rows - row, kBlockTokens))});
    }
  }

  const auto tokens = [&](const PrefillItem& item) {  // to be attended to
    const int last_row = std::min(item.rows - 1, (item.first + kPrefillItemQueries - 1) / group);
    return int64_t{item.blocks} * kBlockTokens + last_row + 1;
  };
  // Heaviest first, heads beside each other; and whoever had the heaviest of a round has the lightest of the
  // next one.
  std::stable_sort(plan->items.begin(), plan->items.end(),
                   [&](const PrefillItem& a, const PrefillItem& b) { return tokens(a) > tokens(b); });
  const auto items = std::span(plan->items);
  const auto round = static_cast<size_t>(at_a_time);
  for (size_t i = round; i < items.size(); i += 2 * round) {
    const auto part = items.subspan(i, std::min(round, items.size() - i));
    std::reverse(part.begin(), part.end());
  }
}

}  // namespace triaxial::cuda
