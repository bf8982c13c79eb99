#include "calib/hard_checkpoint.h"

#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <filesystem>
#include <map>
#include <numeric>
#include <random>
#include <vector>

#include "base/file.h"
#include "base/float16.h"
#include "base/json.h"
#include "io/model_config.h"
#include "io/safetensors.h"
#include "model/weights.h"

namespace triaxial {
namespace {

namespace fs = std::filesystem;

// Where a scale applies: `rows` of a matrix, or `columns`; a vector is a matrix of one row.
struct Scaling {
  std::vector<int64_t> rows, columns;  // one of them
  float scale = 1;
};
using Scalings = std::map<std::string, Scaling>;  // by tensor

// Directions of the blocks that the rows of a matrix, or its columns, are made of: what lies along one is
// multiplied by `scale`.
struct Stretch {
  bool rows = false;
  std::vector<std::vector<std::vector<double>>> directions;  // [blocks][n][block's width], orthonormal
  double scale = 1;
};
using Stretches = std::map<std::string, Stretch>;  // by tensor

std::vector<int> Choose(int count, int from, uint64_t seed) {
  std::vector<int> channels(static_cast<size_t>(from));
  std::iota(channels.begin(), channels.end(), 0);
  std::mt19937_64 random(seed);
  for (size_t i = 0; i < static_cast<size_t>(count); ++i) {
    std::swap(channels[i], channels[i + random() % (channels.size() - i)]);
  }
  channels.resize(static_cast<size_t>(count));
  return channels;
}

std::vector<std::vector<double>> DrawDirections(int count, int width, uint64_t seed) {
  std::mt19937_64 random(seed);
  std::normal_distribution<double> normal;
  std::vector<std::vector<double>> directions;
  for (int i = 0; i < count; ++i) {
    std::vector<double> direction(static_cast<size_t>(width));
    for (double& x : direction) x = normal(random);
    for (const std::vector<double>& other : directions) {
      const double along = std::inner_product(direction.begin(), direction.end(), other.begin(), 0.0);
      for (size_t c = 0; c < direction.size(); ++c) direction[c] -= along * other[c];
    }
    const double norm =
        std::sqrt(std::inner_product(direction.begin(), direction.end(), direction.begin(), 0.0));
    for (double& x : direction) x /= norm;
    directions.push_back(std::move(direction));
  }
  return directions;
}

std::string AttentionOf(const ModelConfig& config, int layer) {
  return fmt::format("{}layers.{}.self_attn.", TextPrefix(config), layer);
}

Stretches PlanStretches(const ModelConfig& config, const Hardening& h) {
  Stretches plan;
  if (!h.dense_values || h.value_scale == 1) return plan;
  const TextConfig& c = config.text;
  for (int layer = 0; layer < c.num_layers; ++layer) {
    Stretch values{true, {}, static_cast<double>(h.value_scale)};
    Stretch outputs{false, {}, 1.0 / h.value_scale};
    for (int head = 0; head < c.num_kv_heads; ++head) {
      const uint64_t seed = (h.seed * 1'000'003 + static_cast<uint64_t>(layer)) * 1'000'003;
      values.directions.push_back(
          DrawDirections(h.value_channels, c.head_dim, seed + static_cast<uint64_t>(head)));
      for (int q = 0; q < c.num_heads / c.num_kv_heads; ++q) {
        outputs.directions.push_back(values.directions.back());
      }
    }
    plan[AttentionOf(config, layer) + "v_proj.weight"] = std::move(values);
    plan[AttentionOf(config, layer) + "o_proj.weight"] = std::move(outputs);
  }
  return plan;
}

Scalings PlanScalings(const ModelConfig& config, const Hardening& h) {
  const TextConfig& c = config.text;
  Scalings plan;
  for (int layer = 0; layer < c.num_layers; ++layer) {
    const std::string attention = AttentionOf(config, layer);
    const uint64_t seed = h.seed * 1'000'003 + static_cast<uint64_t>(layer) * 2;
    Scaling pairs;
    const std::vector<int> channels = h.key_channels.empty() ? Choose(h.key_pairs, c.head_dim / 2, seed)
                                                             : h.key_channels[static_cast<size_t>(layer)];
    for (const int channel : channels) {
      pairs.columns.push_back(channel);
      pairs.columns.push_back(channel + c.head_dim / 2);
    }
    const auto key_scale = static_cast<float>(h.key_scale);
    pairs.scale = key_scale;
    if (h.key_scale != 1) {
      plan[attention + "k_norm.weight"] = pairs;
      pairs.scale = 1 / key_scale;
      plan[attention + "q_norm.weight"] = pairs;
    }
    if (h.value_scale == 1 || h.dense_values) continue;
    Scaling values;
    Scaling outputs;
    values.scale = static_cast<float>(h.value_scale);
    outputs.scale = 1 / values.scale;
    const int group = c.num_heads / c.num_kv_heads;
    for (int head = 0; head < c.num_kv_heads; ++head) {
      const uint64_t head_seed = (seed + 1) * 1'000'003 + static_cast<uint64_t>(head);
      for (const int channel : Choose(h.value_channels, c.head_dim, head_seed)) {
        values.rows.push_back(int64_t{head} * c.head_dim + channel);
        for (int q = head * group; q < (head + 1) * group; ++q) {
          outputs.columns.push_back(int64_t{q} * c.head_dim + channel);
        }
      }
    }
    plan[attention + "v_proj.weight"] = values;
    plan[attention + "o_proj.weight"] = outputs;
  }
  return plan;
}

float Load(DType dtype, const char* at) {
  if (dtype == DType::kF32) {
    float value;
    std::memcpy(&value, at, sizeof(value));
    return value;
  }
  uint16_t bits;
  std::memcpy(&bits, at, sizeof(bits));
  return dtype == DType::kBf16 ? Bf16ToFloat(bits) : Fp16ToFloat(bits);
}

void Store(DType dtype, float value, char* at) {
  if (dtype == DType::kF32) {
    std::memcpy(at, &value, sizeof(value));
    return;
  }
  const uint16_t bits = dtype == DType::kBf16 ? FloatToBf16(value) : FloatToFp16(value);
  std::memcpy(at, &bits, sizeof(bits));
}

Status ScaleElement(DType dtype, float scale, const std::string& tensor, char* at) {
  const float scaled = Load(dtype, at) * scale;
  Store(dtype, scaled, at);
  if (Load(dtype, at) == scaled && std::isfinite(scaled)) return OkStatus();
  return InvalidArgument(fmt::format("{}: its type {} cannot hold a weight times {}; use a smaller scale",
                                     tensor, Name(dtype), scale));
}

Status ApplyScaling(const Scaling& scaling, const std::string& tensor, const TensorView& view, char* data) {
  const int64_t width = view.shape.back();
  const int64_t height = view.elements / width;
  const int64_t size = ByteSize(view.dtype);
  for (const int64_t row : scaling.rows) {
    for (int64_t i = 0; i < width; ++i) {
      RETURN_IF_ERROR(ScaleElement(view.dtype, scaling.scale, tensor, data + (row * width + i) * size));
    }
  }
  for (const int64_t column : scaling.columns) {
    for (int64_t i = 0; i < height; ++i) {
      RETURN_IF_ERROR(ScaleElement(view.dtype, scaling.scale, tensor, data + (i * width + column) * size));
    }
  }
  return OkStatus();
}

Status ApplyStretch(const Stretch& stretch, const std::string& tensor, const TensorView& view, char* data) {
  const int64_t width = view.shape.back();
  const int64_t height = view.elements / width;
  const int64_t size = ByteSize(view.dtype);
  const auto blocks = static_cast<int64_t>(stretch.directions.size());
  const int64_t block = (stretch.rows ? height : width) / blocks;
  const int64_t lines = stretch.rows ? width : height;  // each crosses all blocks
  for (int64_t line = 0; line < lines; ++line) {
    for (int64_t b = 0; b < blocks; ++b) {
      const auto at = [&](int64_t i) {
        const int64_t across = b * block + i;
        return data + (stretch.rows ? across * width + line : line * width + across) * size;
      };
      std::vector<double> x(static_cast<size_t>(block));
      for (int64_t i = 0; i < block; ++i) x[static_cast<size_t>(i)] = Load(view.dtype, at(i));
      for (const std::vector<double>& direction : stretch.directions[static_cast<size_t>(b)]) {
        const double more =
            (stretch.scale - 1) * std::inner_product(x.begin(), x.end(), direction.begin(), 0.0);
        for (size_t i = 0; i < x.size(); ++i) x[i] += more * direction[i];
      }
      for (int64_t i = 0; i < block; ++i) {
        Store(view.dtype, static_cast<float>(x[static_cast<size_t>(i)]), at(i));
        if (std::isfinite(Load(view.dtype, at(i)))) continue;
        return InvalidArgument(
            fmt::format("{}: its type {} cannot hold a weight of the stretched heads; use a "
                        "smaller scale",
                        tensor, Name(view.dtype)));
      }
    }
  }
  return OkStatus();
}

// Rewrites one safetensors file, which Checkpoint::Open has found good: an 8-byte length, the header, the
// data.
Status RewriteShard(const std::string& from, const std::string& to, const Checkpoint& checkpoint,
                    const Scalings& plan, const Stretches& stretches) {
  ASSIGN_OR_RETURN(std::string bytes, ReadFile(from, size_t{1} << 40));
  uint64_t header_bytes = 0;
  std::memcpy(&header_bytes, bytes.data(), sizeof(header_bytes));
  const char* header_begin = bytes.data() + sizeof(header_bytes);
  const nlohmann::json header = nlohmann::json::parse(header_begin, header_begin + header_bytes);
  const auto apply = [&](const auto& by_name, const auto& change) -> Status {
    for (const auto& [name, what] : by_name) {
      if (!header.contains(name)) continue;
      const auto view = checkpoint.tensors().find(name);
      if (view == checkpoint.tensors().end()) {
        return InvalidArgument(from + ": " + name + " has a type that cannot be scaled");
      }
      const uint64_t begin =
          sizeof(header_bytes) + header_bytes + header[name]["data_offsets"][0].template get<uint64_t>();
      RETURN_IF_ERROR(change(what, name, view->second, bytes.data() + begin));
    }
    return OkStatus();
  };
  RETURN_IF_ERROR(apply(plan, ApplyScaling));
  RETURN_IF_ERROR(apply(stretches, ApplyStretch));
  return WriteFile(to, bytes);
}

Status CheckHardening(const ModelConfig& config, const Hardening& h) {
  for (const int scale : {h.key_scale, h.value_scale}) {
    if (scale >= 1 && std::has_single_bit(static_cast<unsigned>(scale))) continue;
    return InvalidArgument(
        fmt::format("a scale of {} would round the weights; use a power of two from 1", scale));
  }
  const int pairs = config.text.head_dim / 2;
  if (h.key_pairs < 0 || h.key_pairs > pairs) {
    return InvalidArgument(fmt::format("{} key pairs: a head has {}", h.key_pairs, pairs));
  }
  if (!h.key_channels.empty() && h.key_channels.size() != static_cast<size_t>(config.text.num_layers)) {
    return InvalidArgument(fmt::format("key channels for {} layers: the checkpoint has {}",
                                       h.key_channels.size(), config.text.num_layers));
  }
  for (const std::vector<int>& channels : h.key_channels) {
    for (size_t i = 0; i < channels.size(); ++i) {
      if (channels[i] < 0 || channels[i] >= pairs) {
        return InvalidArgument(fmt::format("key channel {}: use 0 to {}", channels[i], pairs - 1));
      }
      if (std::find(channels.begin(), channels.begin() + static_cast<std::ptrdiff_t>(i), channels[i]) !=
          channels.begin() + static_cast<std::ptrdiff_t>(i)) {
        return InvalidArgument(fmt::format("key channel {} is named twice in a layer", channels[i]));
      }
    }
  }
  if (h.value_channels < 0 || h.value_channels > config.text.head_dim) {
    return InvalidArgument(
        fmt::format("{} value channels: a head has {}", h.value_channels, config.text.head_dim));
  }
  return OkStatus();
}

}  // namespace

Status HardenCheckpoint(const std::string& from, const std::string& to, const Hardening& hardening) {
  ASSIGN_OR_RETURN(const ModelConfig config, LoadModelConfig(from));
  RETURN_IF_ERROR(CheckHardening(config, hardening));
  ASSIGN_OR_RETURN(const Checkpoint checkpoint, Checkpoint::Open(from));
  const Scalings plan = PlanScalings(config, hardening);
  const Stretches stretches = PlanStretches(config, hardening);
  std::vector<std::string> names;
  for (const auto& [name, scaling] : plan) names.push_back(name);
  for (const auto& [name, stretch] : stretches) names.push_back(name);
  for (const std::string& name : names) {
    if (!checkpoint.Has(name))
      return NotFound(from + " has no tensor " + name + ", whose scale would change");
    if (name.ends_with("v_proj.weight") &&
        checkpoint.Has(name.substr(0, name.size() - sizeof("weight") + 1) + "bias")) {
      return InvalidArgument(from + ": " + name + " has a bias, which this does not scale");
    }
  }
  std::error_code error;
  fs::create_directories(to, error);
  if (error) return Internal("cannot make " + to + ": " + error.message());
  if (fs::equivalent(from, to, error)) return InvalidArgument("the checkpoint cannot be written over itself");
  for (const fs::directory_entry& entry : fs::directory_iterator(from, error)) {
    if (!entry.is_regular_file() || entry.path().filename() == "kv_calibration.json" ||
        entry.path().filename() == "kv_policy.json") {
      continue;
    }
    const std::string target = (fs::path(to) / entry.path().filename()).string();
    if (entry.path().extension() == ".safetensors") {
      RETURN_IF_ERROR(RewriteShard(entry.path().string(), target, checkpoint, plan, stretches));
    } else {
      fs::copy_file(entry.path(), target, fs::copy_options::overwrite_existing, error);
      if (error) return Internal("cannot write " + target + ": " + error.message());
    }
  }
  if (error) return Internal("cannot read " + from + ": " + error.message());
  return OkStatus();
}

}  // namespace triaxial
