#include "ops/cuda/attention.h"

#include <algorithm>
#include <cstring>
#include <numbers>

#include "base/check.h"
#include "ops/cuda/attention_plan.h"
#include "ops/cuda/decode_attention_sm90.h"
#include "ops/cuda/device.h"

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

constexpr size_t Aligned(size_t bytes) { return (bytes + 255) / 256 * 256; }

DecodeMachine MachineOf(const DeviceInfo& device) {
  return {.blocks = device.multiprocessors * kDecodeBlocksPerSm, .warps = kDecodeWarps};
}

}  // namespace

struct Attention::State {
  State(const KvGeometry& g, int heads, const AttentionLimits& l)
      : geometry(g),
        num_heads(heads),
        limits(l),
        machine(MachineOf(CurrentDevice())),
        max_items(MaxItems(g, heads, machine, l.sequences)),
        items_at(Aligned(static_cast<size_t>(l.blocks) * sizeof(KvBlockRef))),
        decode(items_at + static_cast<size_t>(max_items + machine.blocks) * sizeof(DecodeItem)) {
    const auto slots = static_cast<size_t>(max_items);
    partial_out.Reserve(slots * kItemHeads * static_cast<size_t>(g.head_dim) * sizeof(float));
    partial_sums.Reserve(slots * kItemHeads * sizeof(float2));
    const size_t counter_bytes = (slots + 1) * sizeof(int);
    CUDA_OK(cudaMemset(counters.Reserve(counter_bytes), 0, counter_bytes));
    // A graph may be captured before the first plan: no items.
    CUDA_OK(
        cudaMemset(decode.device() + items_at, 0, static_cast<size_t>(machine.blocks) * sizeof(DecodeItem)));
    CUDA_OK(cudaDeviceSynchronize());
  }

  const KvGeometry geometry;
  const int num_heads;
  const AttentionLimits limits;
  const DecodeMachine machine;
  const int max_items;
  const size_t items_at;  // of the upload, after the block table
  Upload decode;
  DecodePlan plan;
  DeviceBuffer partial_out, partial_sums, counters;
};

Attention::Attention(const KvGeometry& geometry, int num_heads, const AttentionLimits& limits) {
  CHECK((geometry.head_dim == 64 || geometry.head_dim == 128) && num_heads % geometry.num_kv_heads == 0);
  CHECK(num_heads / geometry.num_kv_heads <= 2 * kItemHeads);
  state_ = std::make_unique<State>(geometry, num_heads, limits);
}

Attention::~Attention() = default;

void Attention::Plan(std::span<const AttentionSequence> sequences, cudaStream_t stream) {
  State& s = *state_;
  PlanDecode(s.geometry, s.num_heads, s.machine, sequences, &s.plan);
  CHECK(static_cast<int64_t>(s.plan.table.size()) <= s.limits.blocks &&
        static_cast<int>(s.plan.items.size()) <= s.max_items && s.plan.slots <= s.max_items);
  uint8_t* host = s.decode.Begin();
  const size_t item_bytes = s.plan.items.size() * sizeof(DecodeItem);
  const size_t end_bytes = static_cast<size_t>(s.machine.blocks) * sizeof(DecodeItem);
  const size_t table_bytes = s.plan.table.size() * sizeof(KvBlockRef);
  std::memcpy(host, s.plan.table.data(), table_bytes);
  std::memcpy(host + s.items_at, s.plan.items.data(), item_bytes);
  std::memset(host + s.items_at + item_bytes, 0, end_bytes);
  s.decode.Send(0, table_bytes, stream);
  s.decode.Send(s.items_at, item_bytes + end_bytes, stream);
  s.decode.End(stream);
}

bool Attention::has_decode() const { return !state_->plan.items.empty(); }

void Attention::RunDecode(const LayerAttention& layer, cudaStream_t stream) {
  const State& s = *state_;
  LaunchDecodeSm90({.layer = layer,
                    .num_heads = s.num_heads,
                    .num_kv_heads = s.geometry.num_kv_heads,
                    .scale_log2 = layer.scale * std::numbers::log2e_v<float>,
                    .table = reinterpret_cast<const KvBlockRef*>(s.decode.device()),
                    .items = reinterpret_cast<const DecodeItem*>(s.decode.device() + s.items_at),
                    .counters = s.counters.data<int>(),
                    .partial_out = s.partial_out.data<float>(),
                    .partial_sums = s.partial_sums.data<float2>()},
                   s.geometry.head_dim, s.machine.blocks, stream);
}

}  // namespace triaxial::cuda
