// How many bytes recorded agent conversations take in the KV arena under a policy, against BF16.
//
// Block tables are those of the real Qwen3-VL: its tokenizer, its chat template, the image tokens of the real
// screenshot sizes, the geometry of Qwen3-VL-32B. No weights are needed, because sizes do not depend on them;
// the cache does its whole bookkeeping, and what is counted are the unit rows that the arena hands out: for
// each record alone in an arena, and for all that have screenshots held at once in one.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <cstdio>
#include <map>
#include <utility>

#include "apps/terminal.h"
#include "base/file.h"
#include "base/json.h"
#include "bench/capacity_arena.h"
#include "bench/capacity_records.h"
#include "kv/cache.h"
#include "kv/policy.h"
#include "tests/golden/text_qwen_tokenizer.h"
#include "text/chat_template.h"

namespace triaxial {
namespace {

constexpr int kLayers = 64, kKvHeads = 8, kHeadDim = 128;  // Qwen3-VL-32B

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

// BF16 bits over those of a mix of formats.
double MixRatio(const KvGeometry& geometry, const std::array<int64_t, kFormats>& tokens) {
  double bits = 0, total = 0;
  for (size_t f = 0; f < kFormats; ++f) {
    bits += static_cast<double>(tokens[f]) * EffectiveBits(geometry, static_cast<Format>(f));
    total += static_cast<double>(tokens[f]);
  }
  return bits > 0 ? 16 * total / bits : 0;
}

BitBudget Budget(const std::vector<KvToken>& tokens, const Policy& policy, const Capacity& capacity,
                 const KvGeometry& geometry) {
  const auto total = static_cast<double>(tokens.size());
  const auto complete = tokens.size() - static_cast<size_t>(capacity.usage.tail_tokens);
  BitBudget budget;
  budget.base = EffectiveBits(geometry, Format::kK2V2);
  double complete_wishes = 0, all_wishes = 0;
  for (size_t i = 0; i < tokens.size(); ++i) {
    const double bits = EffectiveBits(geometry, policy.table[tokens[i].tag]);
    budget.more[ReasonOf(Tag::FromIndex(tokens[i].tag))] += (bits - budget.base) / total;
    all_wishes += bits / total;
    if (i < complete) complete_wishes += bits / total;
  }
  const double complete_bits = 16 / capacity.block_ratio * static_cast<double>(complete) / total;
  budget.blocks = complete_bits - complete_wishes;
  budget.tail = 16 / capacity.ratio - complete_bits - (all_wishes - complete_wishes);
  return budget;
}

// The record alone in an arena.
Result<Capacity> Measure(const Record& record, const Policy& policy, const KvGeometry& geometry) {
  ASSIGN_OR_RETURN(const Arena arena, HoldAll({&record}, policy, geometry));
  Capacity capacity;
  capacity.usage = arena.usage;
  capacity.bytes = arena.bytes;
  const auto bf16 = [&](int64_t count) {
    return static_cast<double>(count) * static_cast<double>(BlockBytes(geometry, Format::kBf16)) /
           kBlockTokens;
  };
  capacity.bf16_bytes = bf16(arena.tokens);
  capacity.ratio = capacity.bf16_bytes / static_cast<double>(capacity.bytes);
  std::array<int64_t, kFormats> mix = capacity.usage.tokens;
  mix[static_cast<size_t>(Format::kBf16)] -= capacity.usage.tail_tokens;
  const int64_t complete = arena.tokens - capacity.usage.tail_tokens;
  if (complete == 0) return capacity;
  capacity.block_ratio = bf16(complete) / static_cast<double>(capacity.bytes - capacity.usage.tail_bytes);
  capacity.mix_ratio = MixRatio(geometry, mix);
  for (int64_t i = 0; i < complete; ++i)
    ++capacity.wishes[static_cast<size_t>(policy.table[record.tokens[static_cast<size_t>(i)].tag])];
  capacity.wish_ratio = MixRatio(geometry, capacity.wishes);
  capacity.bits = Budget(record.tokens, policy, capacity, geometry);
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
  for (const KvToken& token : record.tokens) {
    const Tag tag = Tag::FromIndex(token.tag);
    ++counts[std::string(Name(tag.modal)) + "/" + std::string(Name(tag.semantic))];
    if (tag.temporal == Temporal::kCurrent && tag.modal == Modal::kText) ++counts["current/text"];
  }
  return counts;
}

// Each record alone in an arena.
void PrintCodec(const KvGeometry& geometry, const std::vector<Record>& records,
                const std::vector<Capacity>& capacities, double goal) {
  std::printf("\ncodec %s: each record alone in an arena\n", Bold(Name(geometry.codec)).c_str());
  Table table({"record", "tokens", "k2v2", "k4v4", "tail", "bytes", "ratio", "without tail", "by formats",
               "off", "by wishes", "off"},
              std::vector<bool>{false, true, true, true, true, true, true, true, true, true, true, true});
  for (size_t i = 0; i < records.size(); ++i) {
    const Capacity& c = capacities[i];
    const auto total = static_cast<double>(records[i].tokens.size());
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

// Conversations with screenshots held at once in one arena, under the policy and under `bf16`.
struct Together {
  std::string name;
  Arena policy;
  Arena bf16;
  double ratio() const { return static_cast<double>(bf16.bytes) / static_cast<double>(policy.bytes); }
  // Complete blocks alone.
  double block_ratio() const {
    return static_cast<double>(bf16.bytes - bf16.usage.tail_bytes) /
           static_cast<double>(policy.bytes - policy.usage.tail_bytes);
  }
};

// All of them, then each source's.
Result<std::vector<Together>> MeasureTogether(const std::vector<Record>& records, const Policy& policy,
                                              const KvGeometry& geometry) {
  ASSIGN_OR_RETURN(const Policy bf16, LoadPolicy("bf16"));
  std::vector<std::pair<std::string, std::vector<const Record*>>> groups = {{"all", {}}};
  for (const Record& record : records) {
    if (!record.screenshots) continue;
    groups.front().second.push_back(&record);
    const auto group = std::find_if(groups.begin(), groups.end(),
                                    [&](const auto& known) { return known.first == record.source; });
    if (group == groups.end()) {
      groups.push_back({record.source, {&record}});
    } else {
      group->second.push_back(&record);
    }
  }
  std::vector<Together> measured;
  for (const auto& [name, members] : groups) {
    Together together{.name = name, .policy = {}, .bf16 = {}};
    ASSIGN_OR_RETURN(together.policy, HoldAll(members, policy, geometry));
    ASSIGN_OR_RETURN(together.bf16, HoldAll(members, bf16, geometry));
    if (together.policy.usage.total_tokens() != together.bf16.usage.total_tokens()) {
      return Internal(name + ": the arena under bf16 holds other tokens than that under " + policy.name);
    }
    measured.push_back(std::move(together));
  }
  return measured;
}

Json TogetherJson(const Together& t) {
  return {{"requests", t.policy.requests},
          {"tokens", t.policy.tokens},
          {"tokens_found", t.policy.found_tokens},
          {"tokens_stored", t.policy.usage.total_tokens()},
          {"bytes", t.policy.bytes},
          {"bf16_bytes", t.bf16.bytes},
          {"ratio", t.ratio()},
          {"ratio_of_complete_blocks", t.block_ratio()},
          {"tokens_by_format", ByFormat(t.policy.usage.tokens)},
          {"bytes_by_format", ByFormat(t.policy.usage.bytes)},
          {"tail_tokens", t.policy.usage.tail_tokens},
          {"tail_bytes", t.policy.usage.tail_bytes},
          {"bf16_tail_bytes", t.bf16.usage.tail_bytes}};
}

void PrintTogether(const std::vector<Together>& measured, const Policy& policy, double goal) {
  std::printf("\nheld at once in one arena, equal prefixes stored once: policies %s and bf16\n",
              policy.name.c_str());
  Table table({"conversations", "requests", "tokens", "found", "stored", "k2v2", "k4v4", "tails", "bf16",
               policy.name, "ratio", "without tails"},
              std::vector<bool>{false, true, true, true, true, true, true, true, true, true, true, true});
  for (const Together& t : measured) {
    const auto stored = static_cast<double>(t.policy.usage.total_tokens());
    const auto share = [&](int64_t tokens) {
      return Fixed(Percent(static_cast<double>(tokens), stored), 1) + "%";
    };
    std::string ratio = Fixed(t.ratio(), 2);
    if (t.ratio() < goal) ratio = "< " + Fixed(goal, 1) + "  " + ratio;
    const std::array<int64_t, kFormats>& tokens = t.policy.usage.tokens;
    table.Add({t.name, Count(t.policy.requests), Count(t.policy.tokens), Count(t.policy.found_tokens),
               Count(t.policy.usage.total_tokens()), share(tokens[static_cast<size_t>(Format::kK2V2)]),
               share(tokens[static_cast<size_t>(Format::kK4V4)]), share(t.policy.usage.tail_tokens),
               Bytes(static_cast<double>(t.bf16.bytes)), Bytes(static_cast<double>(t.policy.bytes)), ratio,
               Fixed(t.block_ratio(), 2)});
  }
  table.Print();
}

struct Flags {
  std::string policy = "paper";
  std::string template_name = "instruct";
  std::string out;
  bool json = false;
  std::string command;  // that made the results
};

Status Run(const Flags& flags) {
  ASSIGN_OR_RETURN(const Policy policy, LoadPolicy(flags.policy));
  const TemplateKind kind =
      flags.template_name == "thinking" ? TemplateKind::kQwen3VlThinking : TemplateKind::kQwen3VlInstruct;
  ASSIGN_OR_RETURN(const ChatTemplate chat_template, ChatTemplate::Create(kind, QwenTokenizer()));
  ASSIGN_OR_RETURN(std::vector<Record> records, LoadRecords(chat_template));
  std::stable_sort(records.begin(), records.end(),
                   [](const Record& a, const Record& b) { return a.screenshots > b.screenshots; });

  Json json = {{"command", flags.command},
               {"policy", policy.name},
               {"template", std::string(Name(kind))},
               {"geometry", {{"layers", kLayers}, {"kv_heads", kKvHeads}, {"head_dim", kHeadDim}}},
               {"block_tokens", kBlockTokens},
               {"codecs", Json::object()},
               {"held_at_once", Json::object()},
               {"records", Json::array()}};
  for (const Record& record : records) {
    json["records"].push_back({{"id", record.id},
                               {"source", record.source},
                               {"screenshots", record.screenshots},
                               {"tokens", record.tokens.size()},
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
                                                {"ratio_of_all_alone", bf16_bytes / bytes},
                                                {"others_furthest_from_formats_percent", furthest},
                                                {"others_furthest_from_wishes_percent", furthest_wish}};
    ASSIGN_OR_RETURN(const std::vector<Together> together, MeasureTogether(records, policy, geometry));
    for (const Together& t : together) {
      json["held_at_once"][std::string(Name(codec))][t.name] = TogetherJson(t);
    }
    if (flags.json) continue;
    PrintCodec(geometry, records, capacities, goal);
    PrintBudgets(records, capacities);
    std::printf(
        "\nalone in an arena, %d of %d records with screenshots (▣) reach %.1fx BF16; the lowest is %.2fx, "
        "their sum %.2fx.\nComplete blocks of all other records take what their formats predict within "
        "%.2f%%, and what their tokens' own wishes predict within %.2f%%.\n",
        reach, screenshots, goal, lowest, bf16_bytes / bytes, furthest, furthest_wish);
    PrintTogether(together, policy, goal);
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
  for (int i = 0; i < argc; ++i) flags.command += (i > 0 ? " " : "") + std::string(argv[i]);
  const triaxial::Status status = triaxial::Run(flags);
  if (status.ok()) return 0;
  std::fprintf(stderr, "capacity: %s\n", status.message().c_str());
  return 1;
}
