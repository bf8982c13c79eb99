#include "io/safetensors.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <limits>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>
#include <tuple>
#include <utility>

#include "base/checked_math.h"
#include "base/float16.h"

namespace triaxial {
namespace {

static_assert(std::endian::native == std::endian::little, "safetensors are little-endian and used in place");

constexpr size_t kPrefixBytes = 8;                   // the header's length, u64
constexpr uint64_t kMaxHeaderBytes = 100'000'000;    // the limit of the reference implementation
constexpr size_t kMaxIndexBytes = size_t{64} << 20;  // real ones stay below one MiB
constexpr size_t kMaxDepth = 4;                      // object, tensor, shape: neither file nests deeper

// A map-based DOM, because the ordered one searches linearly and headers can hold a million names.
using SortedJson = nlohmann::json;

// Names come from the file: escaped and shortened, they keep a message to one line.
std::string Quoted(std::string_view name) {
  constexpr size_t kMaxShown = 120;
  std::string text =
      SortedJson(name.substr(0, kMaxShown)).dump(-1, ' ', true, SortedJson::error_handler_t::replace);
  if (name.size() > kMaxShown) text += "...";
  return text;
}

std::string ShapeString(const std::vector<int64_t>& shape) {
  std::string text = "[";
  for (const int64_t dim : shape) {
    if (text.size() > 1) text += ", ";
    text += std::to_string(dim);
  }
  return text + "]";
}

// Parses a JSON object and refuses what the grammar leaves open: a key that occurs twice in one object, and
// nesting that no valid file has.
Result<SortedJson> ParseObject(std::string_view text, const std::string& what) {
  std::vector<std::set<std::string>> open_objects;
  std::string error;
  const auto inspect = [&](int depth, SortedJson::parse_event_t event, const SortedJson& value) {
    if (!error.empty()) return false;
    if (static_cast<size_t>(depth) > kMaxDepth) {
      error = "nests deeper than " + std::to_string(kMaxDepth) + " levels";
      return false;
    }
    if (event == SortedJson::parse_event_t::object_start) open_objects.emplace_back();
    if (event == SortedJson::parse_event_t::object_end) open_objects.pop_back();
    if (event == SortedJson::parse_event_t::key) {
      const std::string& key = value.get_ref<const std::string&>();
      if (!open_objects.back().insert(key).second) error = "names " + Quoted(key) + " twice";
    }
    return error.empty();
  };
  try {
    SortedJson json = SortedJson::parse(text.begin(), text.end(), inspect);
    if (!error.empty()) return InvalidArgument(what + " " + error);
    if (!json.is_object()) return InvalidArgument(what + " must be a JSON object");
    return json;
  } catch (const SortedJson::parse_error& parse_error) {
    return InvalidArgument(what + " is not valid JSON: error at byte " + std::to_string(parse_error.byte));
  } catch (const SortedJson::exception&) {
    return InvalidArgument(what + " is not valid JSON: a number is out of range");
  }
}

std::optional<DType> ParseDType(std::string_view name) {
  for (const DType dtype : {DType::kF32, DType::kBf16, DType::kF16}) {
    if (name == Name(dtype)) return dtype;
  }
  return std::nullopt;
}

struct Entry {
  std::string name;
  std::string dtype;
  std::vector<int64_t> shape;
  uint64_t begin = 0;  // byte range relative to the end of the header
  uint64_t end = 0;
};

Result<Entry> ParseEntry(const std::string& tensor, const std::string& name, const SortedJson& json) {
  const auto field = [&json](const char* key) -> const SortedJson* {
    const auto it = json.is_object() ? json.find(key) : json.end();
    return json.is_object() && it != json.end() ? &*it : nullptr;
  };
  const SortedJson* dtype = field("dtype");
  const SortedJson* shape = field("shape");
  const SortedJson* offsets = field("data_offsets");
  if (dtype == nullptr || !dtype->is_string()) return InvalidArgument(tensor + " lacks a dtype (a string)");
  if (shape == nullptr || !shape->is_array()) return InvalidArgument(tensor + " lacks a shape (an array)");
  if (offsets == nullptr || !offsets->is_array() || offsets->size() != 2 ||
      !(*offsets)[0].is_number_unsigned() || !(*offsets)[1].is_number_unsigned()) {
    return InvalidArgument(tensor + " lacks data_offsets (two integers that are not negative)");
  }
  Entry entry;
  entry.name = name;
  entry.dtype = dtype->get<std::string>();
  entry.begin = (*offsets)[0].get<uint64_t>();
  entry.end = (*offsets)[1].get<uint64_t>();
  for (const SortedJson& dim : *shape) {
    if (!dim.is_number_unsigned() || dim.get<uint64_t>() > uint64_t{std::numeric_limits<int64_t>::max()}) {
      return InvalidArgument(tensor + " has a dimension that is not an integer from 0 to 2^63 - 1");
    }
    entry.shape.push_back(static_cast<int64_t>(dim.get<uint64_t>()));
  }
  return entry;
}

// Whether the shape times the element size is what the byte range holds; false also when the product
// overflows.
bool SizeMatches(const Entry& entry, DType dtype) {
  uint64_t bytes = static_cast<uint64_t>(ByteSize(dtype));
  for (const int64_t dim : entry.shape) {
    if (!CheckedMul(bytes, static_cast<uint64_t>(dim), &bytes)) return false;
  }
  return bytes == entry.end - entry.begin;
}

// The header's entries in the order of their bytes. They tile the rest of the file exactly: no overlap, no
// hole, nothing behind the last one. That is what the reference implementation accepts, too.
Result<std::vector<Entry>> ParseHeader(const MappedFile& file, uint64_t header_bytes) {
  const std::string_view text(reinterpret_cast<const char*>(file.data()) + kPrefixBytes, header_bytes);
  if (!text.starts_with('{')) return InvalidArgument(file.path() + ": header must begin with '{'");
  ASSIGN_OR_RETURN(const SortedJson header, ParseObject(text, file.path() + ": header"));
  std::vector<Entry> entries;
  for (const auto& [name, json] : header.items()) {
    if (name == "__metadata__") continue;
    ASSIGN_OR_RETURN(Entry entry, ParseEntry(file.path() + ": tensor " + Quoted(name), name, json));
    entries.push_back(std::move(entry));
  }
  std::sort(entries.begin(), entries.end(), [](const Entry& a, const Entry& b) {
    return std::tie(a.begin, a.end, a.name) < std::tie(b.begin, b.end, b.name);
  });
  uint64_t expected = 0;
  for (const Entry& entry : entries) {
    if (entry.begin != expected || entry.end < entry.begin) {
      return InvalidArgument(file.path() + ": tensor " + Quoted(entry.name) + " must begin at byte " +
                             std::to_string(expected) +
                             " of the data, right behind its predecessor, found [" +
                             std::to_string(entry.begin) + ", " + std::to_string(entry.end) + ")");
    }
    expected = entry.end;
  }
  const uint64_t available = file.size() - kPrefixBytes - header_bytes;
  if (expected > available) {
    return DataLoss(file.path() + " is truncated: its header describes " + std::to_string(expected) +
                    " bytes of tensors, the file has " + std::to_string(available) + "; copy it again");
  }
  if (expected < available) {
    return InvalidArgument(file.path() + " has " + std::to_string(available - expected) +
                           " bytes behind the last tensor that its header describes");
  }
  return entries;
}

// The index's map from tensor to shard. Shards are files of the checkpoint's own directory.
Result<std::map<std::string, std::string, std::less<>>> ReadIndex(const std::string& path) {
  ASSIGN_OR_RETURN(const std::string text, ReadFile(path, kMaxIndexBytes));
  ASSIGN_OR_RETURN(const SortedJson index, ParseObject(text, path));
  const auto weight_map = index.find("weight_map");
  if (weight_map == index.end() || !weight_map->is_object() || weight_map->empty()) {
    return InvalidArgument(path +
                           ": weight_map must be an object from tensor to shard with at least one entry");
  }
  std::map<std::string, std::string, std::less<>> shards;
  for (const auto& [tensor, shard] : weight_map->items()) {
    const std::string name = shard.is_string() ? shard.get<std::string>() : "";
    if (name.empty() || name == "." || name == ".." || name.find('/') != std::string::npos ||
        name.find('\0') != std::string::npos) {
      return InvalidArgument(path + ": shard of tensor " + Quoted(tensor) +
                             " must be the name of a file in the same directory, found " +
                             (shard.is_string() ? Quoted(name) : std::string(shard.type_name())));
    }
    shards.emplace(tensor, name);
  }
  return shards;
}

template <typename Fn>
void ConvertEach(const uint8_t* in, int64_t n, float* out, const Fn& to_float) {
  for (int64_t i = 0; i < n; ++i) {
    uint16_t bits;
    std::memcpy(&bits, in + 2 * i, sizeof(bits));
    out[i] = to_float(bits);
  }
}

}  // namespace

std::string_view Name(DType dtype) {
  switch (dtype) {
    case DType::kF32:
      return "F32";
    case DType::kBf16:
      return "BF16";
    case DType::kF16:
      return "F16";
  }
  return "?";
}

void CopyToF32(const TensorView& view, float* out) {
  if (view.elements == 0) return;
  switch (view.dtype) {
    case DType::kF32:
      std::memcpy(out, view.data, static_cast<size_t>(view.elements) * sizeof(float));
      return;
    case DType::kBf16:
      ConvertEach(view.data, view.elements, out, Bf16ToFloat);
      return;
    case DType::kF16:
      ConvertEach(view.data, view.elements, out, Fp16ToFloat);
      return;
  }
}

template <typename Predicate>
Status Checkpoint::AddShard(const MappedFile& file, const Predicate& wanted) {
  uint64_t header_bytes = 0;
  if (file.size() < kPrefixBytes) {
    return DataLoss(file.path() + " is truncated: expected at least 8 bytes, found " +
                    std::to_string(file.size()));
  }
  std::memcpy(&header_bytes, file.data(), kPrefixBytes);
  if (header_bytes > kMaxHeaderBytes) {
    return InvalidArgument(file.path() + " is not a safetensors file: its header would take " +
                           std::to_string(header_bytes) + " bytes, the limit is " +
                           std::to_string(kMaxHeaderBytes));
  }
  if (header_bytes > file.size() - kPrefixBytes) {
    return DataLoss(file.path() + " is truncated: its header takes " + std::to_string(header_bytes) +
                    " bytes, the file has " + std::to_string(file.size() - kPrefixBytes) + "; copy it again");
  }
  ASSIGN_OR_RETURN(std::vector<Entry> entries, ParseHeader(file, header_bytes));
  const uint8_t* data = file.data() + kPrefixBytes + header_bytes;
  for (Entry& entry : entries) {
    const std::optional<DType> dtype = ParseDType(entry.dtype);
    const std::string tensor = file.path() + ": tensor " + Quoted(entry.name);
    if (dtype.has_value() && !SizeMatches(entry, *dtype)) {
      return InvalidArgument(tensor + " of dtype " + entry.dtype + " and shape " + ShapeString(entry.shape) +
                             " does not fit its " + std::to_string(entry.end - entry.begin) + " bytes");
    }
    if (!wanted(entry.name)) continue;
    if (!dtype.has_value()) {
      unreadable_.emplace(entry.name,
                          tensor + " must have dtype F32, BF16 or F16, found " + Quoted(entry.dtype));
      continue;
    }
    TensorView view;
    view.dtype = *dtype;
    view.shape = std::move(entry.shape);
    view.data = data + entry.begin;
    view.elements = static_cast<int64_t>(entry.end - entry.begin) / ByteSize(*dtype);
    view.file = file.path();
    tensors_.emplace(std::move(entry.name), std::move(view));
  }
  return OkStatus();
}

Result<Checkpoint> Checkpoint::Open(const std::string& directory) {
  Checkpoint checkpoint;
  checkpoint.directory_ = directory;
  Result<MappedFile> single = MappedFile::Open(directory + "/model.safetensors");
  if (single.ok()) {
    checkpoint.files_.push_back(std::move(single).value());
    RETURN_IF_ERROR(checkpoint.AddShard(checkpoint.files_[0], [](const std::string&) { return true; }));
    return checkpoint;
  }
  if (single.status().code() != Code::kNotFound) return single.status();

  const std::string index_path = directory + "/model.safetensors.index.json";
  const auto index = ReadIndex(index_path);
  if (!index.ok() && index.status().code() == Code::kNotFound) {
    return NotFound("no weights in " + directory +
                    ": expected model.safetensors or model.safetensors.index.json with its shards");
  }
  if (!index.ok()) return index.status();
  std::set<std::string> shards;
  for (const auto& [tensor, shard] : *index) shards.insert(shard);
  checkpoint.files_.reserve(shards.size());  // views point into the files' paths: they must not move
  for (const std::string& shard : shards) {
    Result<MappedFile> file = MappedFile::Open(directory + "/" + shard);
    if (!file.ok()) {
      return Status(file.status().code(),
                    index_path + " names a shard that cannot be used: " + file.status().message());
    }
    checkpoint.files_.push_back(std::move(file).value());
    RETURN_IF_ERROR(checkpoint.AddShard(checkpoint.files_.back(), [&](const std::string& name) {
      const auto it = index->find(name);
      return it != index->end() && it->second == shard;
    }));
  }
  for (const auto& [tensor, shard] : *index) {
    if (!checkpoint.Has(tensor)) {
      return InvalidArgument(index_path + " places tensor " + Quoted(tensor) + " in " + Quoted(shard) +
                             ", which does not hold it");
    }
  }
  return checkpoint;
}

Result<TensorView> Checkpoint::Get(std::string_view name, const std::vector<int64_t>& shape) const {
  const auto it = tensors_.find(name);
  if (it == tensors_.end()) {
    if (const auto bad = unreadable_.find(name); bad != unreadable_.end())
      return InvalidArgument(bad->second);
    return NotFound("the weights in " + directory_ + " lack tensor " + Quoted(name) + " of shape " +
                    ShapeString(shape));
  }
  if (it->second.shape != shape) {
    return InvalidArgument(std::string(it->second.file) + ": tensor " + Quoted(name) + " must have shape " +
                           ShapeString(shape) + ", found " + ShapeString(it->second.shape));
  }
  return it->second;
}

}  // namespace triaxial
