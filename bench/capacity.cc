// How many bytes recorded agent conversations take in the KV arena under a policy, against BF16.
//
// Block tables are those of the real Qwen3-VL: its tokenizer, its chat template, the image tokens of the real
// screenshot sizes, the geometry of Qwen3-VL-32B. No weights are needed, because sizes do not depend on them;
// the cache does its whole bookkeeping, and what is counted are the unit rows that the arena hands out.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <map>
#include <memory>
#include <sstream>

#include "apps/terminal.h"
#include "base/file.h"
#include "base/json.h"
#include "io/image_processor.h"
#include "kv/cache.h"
#include "kv/policy.h"
#include "tests/golden/text_qwen_tokenizer.h"
#include "text/chat_template.h"

namespace triaxial {
namespace {

constexpr int kLayers = 64, kKvHeads = 8, kHeadDim = 128;  // Qwen3-VL-32B
constexpr int kStepTokens = 512;                           // a prefill chunk

struct Record {
  std::string id;
  std::string source;
  bool screenshots = false;
  std::vector<Tag> tags;  // one per token
};

// Why a token deserves more than the cheapest format, as the policy `paper` gives reasons.
enum Reason { kInstructions, kScaffolding, kToolCalls, kCurrentText, kRest, kReasons };
constexpr std::array<const char*, kReasons> kReasonNames = {"inst", "delim", "tool_call", "current text",
                                                            "rest"};

Reason ReasonOf(const Tag& tag) {
  if (tag.semantic == Semantic::kInst) return kInstructions;
  if (tag.semantic == Semantic::kDelim) return kScaffolding;
  if (tag.semantic == Semantic::kToolCall) return kToolCalls;
  return tag.temporal == Temporal::kCurrent && tag.modal == Modal::kText ? kCurrentText : kRest;
}

// Where the bits of a stored element go; all the numbers add up to 16 / ratio.
struct BitBudget {
  double base = 0;                      // every token at k2v2
  std::array<double, kReasons> more{};  // what tokens wish beyond that, by reason
  double blocks = 0;                    // a block has one format for all of its tokens
  double tail = 0;                      // the newest tokens in a whole BF16 block
};

// What a record takes with one codec.
struct Capacity {
  BitBudget bits;
  KvUsage usage;
  std::array<int64_t, kFormats> wishes{};  // tokens of complete blocks by what they wished for
  int64_t bytes = 0;                       // unit rows in use, in bytes
  double bf16_bytes = 0;                   // of exactly the same tokens
  double ratio = 0;                        // BF16 over bytes, tails included
  double block_ratio = 0;                  // the same for complete blocks alone
  double mix_ratio = 0;                    // what the formats of the complete blocks predict
  double wish_ratio = 0;  // what the tokens' own wishes predict: each token stored as it likes
};

Result<std::vector<std::shared_ptr<const ImagePatches>>> ImageGrids(const Conversation& conversation,
                                                                    const std::string& directory) {
  std::vector<std::shared_ptr<const ImagePatches>> images;
  for (const Message& message : conversation.messages) {
    for (const ContentPart& part : message.content) {
      if (part.kind != ContentPart::Kind::kImage) continue;
      const std::string path = (std::filesystem::path(directory) / part.text).string();
      ASSIGN_OR_RETURN(const std::string bytes, ReadFile(path, size_t{64} << 20));
      ASSIGN_OR_RETURN(const ImageSize size, ReadImageSize(bytes, {}));
      ASSIGN_OR_RETURN(const ImageSize grid, GridOf(size, {}));
      auto patches = std::make_shared<ImagePatches>();
      patches->grid_h = grid.height;
      patches->grid_w = grid.width;
      images.push_back(std::move(patches));
    }
  }
  return images;
}

// The records of a JSONL file. A conversation that ends with an answer is rendered as it is, one that waits
// for an answer with the generation prompt.
Status LoadRecords(const std::string& path, const std::string& images, const ChatTemplate& chat_template,
                   std::vector<Record>* records) {
  ASSIGN_OR_RETURN(const std::string text, ReadFile(path, size_t{256} << 20));
  std::istringstream lines(text);
  size_t number = 0;
  for (std::string line; std::getline(lines, line);) {
    const std::string what = path + " line " + std::to_string(++number);
    ASSIGN_OR_RETURN(Json json, ParseJson(line, what));
    Record record;
    record.source = json.value("source", std::filesystem::path(path).stem().string());
    record.id = json.contains("id") && json["id"].is_string() ? json["id"].get<std::string>()
                                                              : record.source + "/" + std::to_string(number);
    if (json.contains("request")) json = Json(json["request"]);
    ASSIGN_OR_RETURN(
        const Conversation conversation,
        ParseConversation(json["messages"], json.contains("tools") ? json["tools"] : Json(nullptr)));
    ASSIGN_OR_RETURN(const auto grids, ImageGrids(conversation, images));
    TemplateOptions options;
    options.add_generation_prompt = conversation.messages.back().role != Role::kAssistant;
    ASSIGN_OR_RETURN(const Prompt prompt,
                     chat_template.Render(conversation, grids, PreprocessorConfig{}.merge_size, options));
    record.screenshots = !prompt.images.empty();
    record.tags = TagTokens(prompt.spans, static_cast<int32_t>(prompt.tokens.size()));
    records->push_back(std::move(record));
  }
  return OkStatus();
}

// BF16 bits over those of a mix of formats.
double MixRatio(const KvGeometry& geometry, const std::array<int64_t, kFormats>& tokens) {
  double bits = 0, total = 0;
  for (size_t f = 0; f < kFormats; ++f) {
    bits += static_cast<double>(tokens[f]) * EffectiveBits(geometry, static_cast<Format>(f));
    total += static_cast<double>(tokens[f]);
  }
  return bits > 0 ? 16 * total / bits : 0;
}

BitBudget Budget(const Record& record, const std::vector<KvToken>& tokens, const Policy& policy,
                 const Capacity& capacity, const KvGeometry& geometry) {
  const auto total = static_cast<double>(tokens.size());
  const auto complete = tokens.size() - static_cast<size_t>(capacity.usage.tail_tokens);
  BitBudget budget;
  budget.base = EffectiveBits(geometry, Format::kK2V2);
  double complete_wishes = 0, all_wishes = 0;
  for (size_t i = 0; i < tokens.size(); ++i) {
    const double bits = EffectiveBits(geometry, policy.table[tokens[i].tag]);
    budget.more[ReasonOf(record.tags[i])] += (bits - budget.base) / total;
    all_wishes += bits / total;
    if (i < complete) complete_wishes += bits / total;
  }
  const double complete_bits = 16 / capacity.block_ratio * static_cast<double>(complete) / total;
  budget.blocks = complete_bits - complete_wishes;
  budget.tail = 16 / capacity.ratio - complete_bits - (all_wishes - complete_wishes);
  return budget;
}

Result<Capacity> Measure(const Record& record, const Policy& policy, const KvGeometry& geometry) {
  std::vector<KvToken> tokens;
  for (const Tag& tag : record.tags) tokens.push_back({{}, static_cast<uint8_t>(tag.index())});
  const auto blocks = static_cast<int64_t>(tokens.size()) / kBlockTokens + 2;
  KvCache cache(geometry, 2 * blocks * UnitsOf(geometry, Format::kBf16),
                ResolveNeeds(policy, geometry, /*two_bit_keys=*/true, /*budget_bits=*/0));
  const SequenceId id = cache.CreateSequence();
  KvAppend append;
  for (size_t begin = 0; begin < tokens.size(); begin += kStepTokens) {
    const size_t count = std::min<size_t>(kStepTokens, tokens.size() - begin);
    RETURN_IF_ERROR(cache.Append(id, std::span(tokens).subspan(begin, count), &append));
    cache.FinishStep();
  }
  RETURN_IF_ERROR(cache.CheckIntegrity());

  Capacity capacity;
  capacity.usage = cache.Usage();
  capacity.bytes = (cache.total_rows() - cache.free_rows()) * UnitRowBytes(geometry) * geometry.num_layers;
  if (capacity.bytes != capacity.usage.total_bytes())
    return Internal(record.id + ": the arena and the usage report disagree");
  const auto bf16 = [&](int64_t count) {
    return static_cast<double>(count) * static_cast<double>(BlockBytes(geometry, Format::kBf16)) /
           kBlockTokens;
  };
  capacity.bf16_bytes = bf16(static_cast<int64_t>(tokens.size()));
  capacity.ratio = capacity.bf16_bytes / static_cast<double>(capacity.bytes);
  std::array<int64_t, kFormats> mix = capacity.usage.tokens;
  mix[static_cast<size_t>(Format::kBf16)] -= capacity.usage.tail_tokens;
  const auto complete = static_cast<int64_t>(tokens.size()) - capacity.usage.tail_tokens;
  if (complete == 0) return capacity;
  capacity.block_ratio = bf16(complete) / static_cast<double>(capacity.bytes - capacity.usage.tail_bytes);
  capacity.mix_ratio = MixRatio(geometry, mix);
  for (int64_t i = 0; i < complete; ++i)
    ++capacity.wishes[static_cast<size_t>(policy.table[tokens[static_cast<size_t>(i)].tag])];
  capacity.wish_ratio = MixRatio(geometry, capacity.wishes);
  capacity.bits = Budget(record, tokens, policy, capacity, geometry);
  return capacity;
}

double Percent(double part, double whole) { return whole > 0 ? 100 * part / whole : 0; }

Json ByFormat(const std::array<int64_t, kFormats>& values) {
  Json json = Json::object();
  for (size_t f = 0; f < kFormats; ++f) json[std::string(Name(static_cast<Format>(f)))] = values[f];
  return json;
}

Json BudgetJson(const BitBudget& budget) {
  Json json = {{"all_k2v2", budget.base}};
  for (size_t r = 0; r < kReasons; ++r) json[kReasonNames[r]] = budget.more[r];
  json["one_format_a_block"] = budget.blocks;
  json["bf16_tail"] = budget.tail;
  return json;
}

Json CapacityJson(const Capacity& c) {
  return {{"bytes", c.bytes},
          {"bf16_bytes", c.bf16_bytes},
          {"ratio", c.ratio},
          {"tokens_by_format", ByFormat(c.usage.tokens)},
          {"bytes_by_format", ByFormat(c.usage.bytes)},
          {"tail_tokens", c.usage.tail_tokens},
          {"tail_bytes", c.usage.tail_bytes},
          {"bits_per_element", BudgetJson(c.bits)},
          {"complete_blocks",
           {{"ratio", c.block_ratio},
            {"predicted_by_formats", c.mix_ratio},
            {"difference_percent", Percent(c.block_ratio - c.mix_ratio, c.mix_ratio)},
            {"predicted_by_wishes", c.wish_ratio},
            {"difference_from_wishes_percent", Percent(c.block_ratio - c.wish_ratio, c.wish_ratio)},
            {"tokens_by_wish", ByFormat(c.wishes)}}}};
}

// Tokens by modality and role, and the text of the current turn.
Json TagJson(const Record& record) {
  std::map<std::string, int64_t> counts;
  for (const Tag& tag : record.tags) {
    ++counts[std::string(Name(tag.modal)) + "/" + std::string(Name(tag.semantic))];
    if (tag.temporal == Temporal::kCurrent && tag.modal == Modal::kText) ++counts["current/text"];
  }
  return counts;
}

void PrintCodec(const KvGeometry& geometry, const std::vector<Record>& records,
                const std::vector<Capacity>& capacities, double goal) {
  std::printf("\ncodec %s\n", Bold(Name(geometry.codec)).c_str());
  Table table({"record", "tokens", "k2v2", "k4v4", "tail", "bytes", "ratio", "without tail", "by formats",
               "off", "by wishes", "off"},
              std::vector<bool>{false, true, true, true, true, true, true, true, true, true, true, true});
  for (size_t i = 0; i < records.size(); ++i) {
    const Capacity& c = capacities[i];
    const auto total = static_cast<double>(records[i].tags.size());
    const auto share = [&](Format f) {
      return Fixed(Percent(static_cast<double>(c.usage.tokens[static_cast<size_t>(f)]), total), 1) + "%";
    };
    std::string ratio = Fixed(c.ratio, 2);
    if (records[i].screenshots && c.ratio < goal) ratio = "< " + Fixed(goal, 1) + "  " + ratio;
    table.Add({(records[i].screenshots ? "▣ " : "  ") + records[i].id, Count(static_cast<int64_t>(total)),
               share(Format::kK2V2), share(Format::kK4V4),
               Fixed(Percent(static_cast<double>(c.usage.tail_bytes), static_cast<double>(c.bytes)), 1) + "%",
               Bytes(static_cast<double>(c.bytes)), ratio, Fixed(c.block_ratio, 2), Fixed(c.mix_ratio, 2),
               Fixed(Percent(c.block_ratio - c.mix_ratio, c.mix_ratio), 2) + "%", Fixed(c.wish_ratio, 2),
               Fixed(Percent(c.block_ratio - c.wish_ratio, c.wish_ratio), 2) + "%"});
  }
  table.Print();
}

// What keeps the records with screenshots from the ratio that k2v2 alone would have.
void PrintBudgets(const std::vector<Record>& records, const std::vector<Capacity>& capacities) {
  std::puts("\nbits per element: where they go");
  std::vector<std::string> header = {"record", "all k2v2"};
  for (const char* reason : kReasonNames) header.push_back(std::string("+ ") + reason);
  header.insert(header.end(), {"+ one format a block", "+ BF16 tail", "= bits"});
  Table table(header, std::vector<bool>{false, true, true, true, true, true, true, true, true, true});
  for (size_t i = 0; i < records.size(); ++i) {
    if (!records[i].screenshots) continue;
    const BitBudget& bits = capacities[i].bits;
    std::vector<std::string> row = {records[i].id, Fixed(bits.base, 2)};
    for (const double more : bits.more) row.push_back(Fixed(more, 3));
    row.insert(row.end(), {Fixed(bits.blocks, 3), Fixed(bits.tail, 3), Fixed(16 / capacities[i].ratio, 3)});
    table.Add(std::move(row));
  }
  table.Print();
}

struct Flags {
  std::string policy = "paper";
  std::string template_name = "instruct";
  std::string out;
  bool json = false;
};

Status Run(const Flags& flags) {
  ASSIGN_OR_RETURN(const Policy policy, LoadPolicy(flags.policy));
  const TemplateKind kind =
      flags.template_name == "thinking" ? TemplateKind::kQwen3VlThinking : TemplateKind::kQwen3VlInstruct;
  ASSIGN_OR_RETURN(const ChatTemplate chat_template, ChatTemplate::Create(kind, QwenTokenizer()));
  std::vector<Record> records;
  for (const char* name : {"osworld_shape_requests", "trajectories"}) {
    RETURN_IF_ERROR(LoadRecords("tests/data/text/" + std::string(name) + ".jsonl", "tests/data/trajectories",
                                chat_template, &records));
  }
  std::stable_sort(records.begin(), records.end(),
                   [](const Record& a, const Record& b) { return a.screenshots > b.screenshots; });

  Json json = {{"policy", policy.name},
               {"template", std::string(Name(kind))},
               {"geometry", {{"layers", kLayers}, {"kv_heads", kKvHeads}, {"head_dim", kHeadDim}}},
               {"block_tokens", kBlockTokens},
               {"codecs", Json::object()},
               {"records", Json::array()}};
  for (const Record& record : records) {
    json["records"].push_back({{"id", record.id},
                               {"source", record.source},
                               {"screenshots", record.screenshots},
                               {"tokens", record.tags.size()},
                               {"tokens_by_tag", TagJson(record)}});
  }
  for (const auto& [codec, goal] : {std::pair{Codec::kPaper, 4.8}, std::pair{Codec::kRotated, 6.0}}) {
    const KvGeometry geometry = {kLayers, kKvHeads, kHeadDim, codec};
    std::vector<Capacity> capacities;
    int screenshots = 0, reach = 0;
    double lowest = 1e9, furthest = 0, furthest_wish = 0, bytes = 0, bf16_bytes = 0;
    for (size_t i = 0; i < records.size(); ++i) {
      ASSIGN_OR_RETURN(const Capacity c, Measure(records[i], policy, geometry));
      json["records"][i][std::string(Name(codec))] = CapacityJson(c);
      if (records[i].screenshots) {
        ++screenshots;
        reach += c.ratio >= goal ? 1 : 0;
        lowest = std::min(lowest, c.ratio);
        bytes += static_cast<double>(c.bytes);
        bf16_bytes += c.bf16_bytes;
      } else {
        furthest = std::max(furthest, std::abs(Percent(c.block_ratio - c.mix_ratio, c.mix_ratio)));
        furthest_wish =
            std::max(furthest_wish, std::abs(Percent(c.block_ratio - c.wish_ratio, c.wish_ratio)));
      }
      capacities.push_back(c);
    }
    json["codecs"][std::string(Name(codec))] = {{"goal", goal},
                                                {"screenshot_records", screenshots},
                                                {"reach_the_goal", reach},
                                                {"lowest_ratio", lowest},
                                                {"ratio_together", bf16_bytes / bytes},
                                                {"others_furthest_from_formats_percent", furthest},
                                                {"others_furthest_from_wishes_percent", furthest_wish}};
    if (flags.json) continue;
    PrintCodec(geometry, records, capacities, goal);
    PrintBudgets(records, capacities);
    std::printf(
        "\n%d of %d records with screenshots (▣) reach %.1fx BF16, the lowest is %.2fx, all together %.2fx; "
        "complete blocks of "
        "all "
        "other records\ntake what their formats predict within %.2f%%, and what their tokens' own wishes "
        "predict within %.2f%%\n",
        reach, screenshots, goal, lowest, bf16_bytes / bytes, furthest, furthest_wish);
  }
  const std::string text = json.dump(1) + "\n";
  if (flags.json) std::fputs(text.c_str(), stdout);
  return flags.out.empty() ? OkStatus() : WriteFile(flags.out, text);
}

}  // namespace
}  // namespace triaxial

int main(int argc, char** argv) {
  CLI::App app("KV bytes of recorded agent conversations against BF16; run it in the repository's root");
  triaxial::Flags flags;
  app.add_option("--kv-policy", flags.policy, "Built-in name or JSON file")->capture_default_str();
  app.add_option("--template", flags.template_name, "Which Qwen3-VL template renders the conversations")
      ->check(CLI::IsMember({"instruct", "thinking"}))
      ->capture_default_str();
  app.add_option("--out", flags.out, "JSON file to write, such as bench/results/capacity.json");
  app.add_flag("--json", flags.json, "Print JSON instead of tables");
  CLI11_PARSE(app, argc, argv);
  const triaxial::Status status = triaxial::Run(flags);
  if (status.ok()) return 0;
  std::fprintf(stderr, "capacity: %s\n", status.message().c_str());
  return 1;
}
