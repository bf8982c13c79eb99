#include "ops/cuda/attention.h"

#include <algorithm>
#include <cstring>
#include <numbers>
#include <vector>

#include "base/check.h"
#include "ops/cuda/attention_plan.h"
#include "ops/cuda/decode_attention_sm90.h"
#include "ops/cuda/device.h"
#include "ops/cuda/prefill_attention_sm90.h"

namespace triaxial::cuda {
namespace {

// Index arrays on their way to the device: written into pinned memory, of which two take turns, so that the
// next plan is built while the last one is being copied.
class Upload {
 public:
  explicit Upload(size_t bytes) : device_(bytes) {
    for (int i = 0; i < 2; ++i) {
      host_[i].Reserve(bytes);
      CUDA_OK(cudaEventCreateWithFlags(&copied_[i], cudaEventDisableTiming));
    }
  }
  ~Upload() {
    for (cudaEvent_t event : copied_) cudaEventDestroy(event);
  }
  Upload(const Upload&) = delete;
  Upload& operator=(const Upload&) = delete;

  // Memory to write to; then Send parts of it, then End.
  uint8_t* Begin() {
    turn_ ^= 1;
    CUDA_OK(cudaEventSynchronize(copied_[turn_]));
    return host_[turn_].data();
  }
  void Send(size_t begin, size_t bytes, cudaStream_t stream) {
    if (bytes == 0) return;
    CUDA_OK(cudaMemcpyAsync(device_.data() + begin, host_[turn_].data() + begin, bytes,
                            cudaMemcpyHostToDevice, stream));
  }
  void End(cudaStream_t stream) { CUDA_OK(cudaEventRecord(copied_[turn_], stream)); }
  uint8_t* device() const { return device_.data(); }

 private:
  PinnedBuffer host_[2];
  DeviceBuffer device_;
  cudaEvent_t copied_[2] = {};
  int turn_ = 0;
};

// A block table and a list of items for one kernel; the list ends with as many empty items as `thread_blocks`
// that take items until they find one.
template <typename Block, typename Item>
class WorkList {
 public:
  WorkList(int64_t max_blocks, int max_items, int thread_blocks)
      : max_blocks_(static_cast<size_t>(max_blocks)),
        max_items_(static_cast<size_t>(max_items)),
        end_bytes_(static_cast<size_t>(thread_blocks) * sizeof(Item)),
        items_at_((max_blocks_ * sizeof(Block) + 255) / 256 * 256),
        upload_(items_at_ + max_items_ * sizeof(Item) + end_bytes_) {
    // Without a plan there are no items; a graph may be captured before the first plan.
    CUDA_OK(cudaMemset(upload_.device() + items_at_, 0, end_bytes_));
  }
  void Send(const std::vector<Block>& table, const std::vector<Item>& items, cudaStream_t stream) {
    CHECK(table.size() <= max_blocks_ && items.size() <= max_items_);
    uint8_t* host = upload_.Begin();
    const size_t table_bytes = table.size() * sizeof(Block), item_bytes = items.size() * sizeof(Item);
    std::memcpy(host, table.data(), table_bytes);
    std::memcpy(host + items_at_, items.data(), item_bytes);
    std::memset(host + items_at_ + item_bytes, 0, end_bytes_);
    upload_.Send(0, table_bytes, stream);
    upload_.Send(items_at_, item_bytes + end_bytes_, stream);
    upload_.End(stream);
  }
  const Block* table() const { return reinterpret_cast<const Block*>(upload_.device()); }
  const Item* items() const { return reinterpret_cast<const Item*>(upload_.device() + items_at_); }

 private:
  const size_t max_blocks_, max_items_, end_bytes_, items_at_;
  Upload upload_;
};
using DecodeList = WorkList<KvBlockRef, DecodeItem>;
using PrefillList = WorkList<PrefillBlock, PrefillItem>;

}  // namespace

struct Attention::State {
  State(const KvGeometry& g, int heads, const AttentionLimits& limits)
      : geometry(g), num_heads(heads), multiprocessors(CurrentDevice().multiprocessors) {
    machine = {.blocks = multiprocessors * kDecodeBlocksPerSm, .warps = kDecodeWarps};
    const int tiles = MaxRowTiles(limits.sequences, limits.rows);
    prefill_list = std::make_unique<PrefillList>(limits.blocks + tiles,
                                                 MaxPrefillItems(g, heads, limits.sequences, limits.rows), 0);
    row_tiles.Reserve(static_cast<size_t>(tiles * g.num_kv_heads * PrefillTileBytes(g.head_dim)));
    if (g.codec == Codec::kRotated) {
      const int items = MaxItems(g, heads, machine, limits.sequences);
      decode_list = std::make_unique<DecodeList>(limits.blocks, items, machine.blocks);
      const auto slots = static_cast<size_t>(items);
      partial_out.Reserve(slots * kItemHeads * static_cast<size_t>(g.head_dim) * sizeof(uint16_t));
      partial_sums.Reserve(slots * kItemHeads * sizeof(float2));
      const size_t counter_bytes = (slots + 1) * sizeof(int);
      CUDA_OK(cudaMemset(counters.Reserve(counter_bytes), 0, counter_bytes));
    }
    CUDA_OK(cudaDeviceSynchronize());
  }

  const KvGeometry geometry;
  const int num_heads;
  const int multiprocessors;
  DecodeMachine machine;
  // Without decode_list (kPaper, which is there to compare with), sequences with one row go through prefill.
  std::unique_ptr<DecodeList> decode_list;
  std::unique_ptr<PrefillList> prefill_list;
  DecodePlan decode;
  PrefillPlan prefill;
  DeviceBuffer row_tiles, partial_out, partial_sums, counters;
};

Attention::Attention(const KvGeometry& geometry, int num_heads, const AttentionLimits& limits) {
  CHECK((geometry.head_dim == 64 || geometry.head_dim == 128) && num_heads % geometry.num_kv_heads == 0);
  CHECK(num_heads / geometry.num_kv_heads <= 2 * kItemHeads);
  state_ = std::make_unique<State>(geometry, num_heads, limits);
}

Attention::~Attention() = default;

void Attention::Plan(std::span<const AttentionSequence> sequences, cudaStream_t stream) {
  State& s = *state_;
  if (s.decode_list) {
    PlanDecode(s.geometry, s.num_heads, s.machine, sequences, &s.decode);
    s.decode_list->Send(s.decode.table, s.decode.items, stream);
  }
  PlanPrefill(s.geometry, s.num_heads, s.multiprocessors / 2, s.decode_list ? 2 : 1, sequences, &s.prefill);
  if (has_prefill()) s.prefill_list->Send(s.prefill.table, s.prefill.items, stream);
}

bool Attention::has_decode() const { return !state_->decode.items.empty(); }
bool Attention::has_prefill() const { return !state_->prefill.items.empty(); }

void Attention::RunDecode(const LayerAttention& layer, cudaStream_t stream) {
  const State& s = *state_;
  if (!s.decode_list) return;
  LaunchDecodeSm90({.layer = layer,
                    .num_heads = s.num_heads,
                    .num_kv_heads = s.geometry.num_kv_heads,
                    .scale_log2 = layer.scale * std::numbers::log2e_v<float>,
                    .table = s.decode_list->table(),
                    .items = s.decode_list->items(),
                    .counters = s.counters.data<int>(),
                    .partial_out = s.partial_out.data<uint32_t>(),
                    .partial_sums = s.partial_sums.data<float2>()},
                   s.geometry.head_dim, s.machine.blocks, stream);
}

void Attention::RunPrefill(const LayerAttention& layer, cudaStream_t stream) {
  const State& s = *state_;
  if (!has_prefill()) return;
  LaunchPrefillSm90({.layer = layer,
                     .codec = s.geometry.codec,
                     .num_heads = s.num_heads,
                     .num_kv_heads = s.geometry.num_kv_heads,
                     .scale_log2 = layer.scale * std::numbers::log2e_v<float>,
                     .table = s.prefill_list->table(),
                     .row_table = static_cast<int>(s.prefill.table.size()) - s.prefill.row_tiles,
                     .row_tile_count = s.prefill.row_tiles,
                     .row_tiles = s.row_tiles.data(),
                     .items = s.prefill_list->items(),
                     .item_count = static_cast<int>(s.prefill.items.size())},
                    s.geometry.head_dim, s.multiprocessors, stream);
}

}  // namespace triaxial::cuda
