#include "ops/cuda/attention_plan.h"

#include <algorithm>
#include <array>
#include <cmath>

namespace triaxial::cuda {
namespace {

constexpr int kClasses = 5;  // k2v2, k4v2, k4v4, fp8, bf16
constexpr std::array<int, kClasses> kPieces = {1, 1, 1, 2, 4};
// What a block of each class costs, in blocks of k2v2 (measured where many thread blocks share the memory).
constexpr std::array<double, kClasses> kWeights = {1.0, 1.45, 1.9, 3.7, 7.2};

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

double WeightOf(const KvBlockRef& block) {
  const double weight = kWeights[static_cast<size_t>(ClassOf(block.format))];
  return block.format == Format::kBf16 ? weight * ((block.tokens + 15) / 16) / 4 : weight;
}

// Microseconds, measured (docs/kernels.md): a round of pieces of k2v2, alone and among as many thread blocks
// as fit; what an item costs besides; what merging its splits costs.
constexpr double kRoundAlone = 0.8, kRoundFull = 2.4, kItemCost = 2.0, kMergeCost = 1.5,
                 kMergeCostPerSplit = 0.06;
constexpr int kMaxSplits = 64;
// Items beyond one for each head, for each thread block that runs at a time: bounds the workspace.
constexpr int kExtraItems = 4;

int SplitsFor(double weight, double share, size_t blocks) {
  if (!(share > 0)) return 1;
  const double splits = std::ceil(weight / share - 1e-9);
  return static_cast<int>(
      std::clamp(splits, 1.0, static_cast<double>(std::clamp<size_t>(blocks, 1, kMaxSplits))));
}

// Time of a step whose sequences are cut into items of at most `share` weight, by playing through the
// schedule: items are taken heaviest first by whoever is free. `lanes`: how many items of each (sequence,
// head) pair run at a time.
double Simulate(const std::vector<double>& weights, const std::vector<size_t>& blocks, double share,
                int pairs, const DecodeMachine& machine, std::vector<double>* lanes,
                std::vector<double>* costs) {
  costs->clear();
  int items = 0;
  for (size_t i = 0; i < weights.size(); ++i) items += SplitsFor(weights[i], share, blocks[i]);
  const double busy = std::min(1.0, static_cast<double>(items) * pairs / machine.blocks);
  const double round = std::max(kRoundAlone, kRoundFull * busy);
  double merge = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    const int splits = SplitsFor(weights[i], share, blocks[i]);
    const double rounds = std::ceil(std::max(1.0, weights[i] / splits) / machine.warps - 1e-6);
    costs->insert(costs->end(), static_cast<size_t>(splits), rounds * round + kItemCost);
    if (splits > 1) merge = std::max(merge, kMergeCost + kMergeCostPerSplit * splits);
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
  return end + merge;
}

// The weight of an item at which the step is shortest.
double BestShare(const std::vector<double>& weights, const std::vector<size_t>& blocks, int pairs,
                 const DecodeMachine& machine) {
  const double most = std::max(1.0, *std::max_element(weights.begin(), weights.end()));
  double total = 0;
  for (const double weight : weights) total += weight;
  std::vector<double> lanes, costs;
  double best = most, best_time = Simulate(weights, blocks, most, pairs, machine, &lanes, &costs);
  const auto attempt = [&](double share) {
    int64_t items = 0;
    for (size_t i = 0; i < weights.size(); ++i)
      items += int64_t{SplitsFor(weights[i], share, blocks[i])} * pairs;
    if (items > static_cast<int64_t>(weights.size()) * pairs + kExtraItems * machine.blocks) return;
    const double time = Simulate(weights, blocks, share, pairs, machine, &lanes, &costs);
    if (time < best_time) best_time = time, best = share;
  };
  // The longest sequence in so many parts; more parts than thread blocks are of no use.
  const int limit = std::clamp(2 * machine.blocks / pairs, 1, kMaxSplits);
  for (int parts = 2; parts <= limit && most / parts >= 1; parts += 1 + parts / 16) attempt(most / parts);
  // Even shares of the whole, in whole rounds of the machine.
  const double lanes_count = std::max(1, machine.blocks / pairs);
  for (int rounds = 1; rounds <= 4; ++rounds) {
    const double share = total / (lanes_count * rounds);
    if (share >= 1 && share < most && most / share <= kMaxSplits) attempt(share * 1.02);
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
  std::vector<double> weights;
  std::vector<size_t> blocks;
  for (const AttentionSequence& sequence : sequences) {
    if (sequence.rows != 1) continue;
    Sequence s = {sequence.row_begin, static_cast<int32_t>(plan->table.size()), sequence.blocks.size(), {}};
    double weight = 0;
    for (const KvBlockRef& block : sequence.blocks) {
      ++s.counts[static_cast<size_t>(ClassOf(block.format))];
      weight += WeightOf(block);
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
    weights.push_back(weight);
    blocks.push_back(s.blocks);
  }
  if (decoding.empty()) return;

  const int group = num_heads / geometry.num_kv_heads;
  const int parts = (group + kItemHeads - 1) / kItemHeads;
  const int pairs = geometry.num_kv_heads * parts;
  const double share = splits > 0 ? *std::max_element(weights.begin(), weights.end()) / splits
                                  : BestShare(weights, blocks, pairs, machine);
  struct Cut {
    double weight;
    DecodeItem item;
  };
  std::vector<Cut> cuts;
  for (size_t i = 0; i < decoding.size(); ++i) {
    const Sequence& s = decoding[i];
    const int count = SplitsFor(weights[i], share, s.blocks);
    size_t begin = 0;
    double passed = 0;
    for (int split = 0; split < count; ++split) {
      const double until = weights[i] * (split + 1) / count;
      Cut cut = {
          0, {.row = s.row, .table = s.table + static_cast<int32_t>(begin), .split = split, .splits = count}};
      std::array<int, kClasses> counts = {};
      size_t end = begin;
      while (end < s.blocks) {
        const KvBlockRef& block = plan->table[static_cast<size_t>(s.table) + end];
        const double weight = WeightOf(block);
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
  return geometry.num_kv_heads * (sequences + rows * group / kPrefillTileQueries);
}

void PlanPrefill(const KvGeometry& geometry, int num_heads, int least, int most,
                 std::span<const AttentionSequence> sequences, PrefillPlan* plan) {
  plan->table.clear();
  plan->items.clear();
  const int group = num_heads / geometry.num_kv_heads;
  struct Tile {
    int64_t tokens;  // to be attended to
    PrefillItem item;
  };
  std::vector<Tile> tiles;
  for (const AttentionSequence& sequence : sequences) {
    if (sequence.rows < least || sequence.rows > most) continue;
    const auto table = static_cast<int32_t>(plan->table.size());
    for (const KvBlockRef& block : sequence.blocks) {
      plan->table.push_back({.unit_row = block.unit_row,
                             .tokens = block.tokens,
                             .capacity = block.capacity,
                             .k_bits = static_cast<uint8_t>(Bits(block.format, Side::kK)),
                             .v_bits = static_cast<uint8_t>(Bits(block.format, Side::kV))});
    }
    for (int first = 0; first < sequence.rows * group; first += kPrefillTileQueries) {
      const int last_row = std::min(sequence.rows - 1, (first + kPrefillTileQueries - 1) / group);
      tiles.push_back({static_cast<int64_t>(sequence.blocks.size()) * kBlockTokens + last_row + 1,
                       {.row_begin = sequence.row_begin,
                        .rows = sequence.rows,
                        .first = first,
                        .table = table,
                        .blocks = static_cast<int32_t>(sequence.blocks.size())}});
    }
  }
  std::stable_sort(tiles.begin(), tiles.end(),
                   [](const Tile& a, const Tile& b) { return a.tokens > b.tokens; });
  for (Tile& tile : tiles) {
    for (int head = 0; head < geometry.num_kv_heads; ++head) {
      tile.item.kv_head = head;
      plan->items.push_back(tile.item);
    }
  }
}

}  // namespace triaxial::cuda
