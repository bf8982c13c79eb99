#include "apps/policy_tables.h"

#include <cstdio>

#include "apps/terminal.h"

namespace triaxial {
namespace {

std::string PaintFormat(Format format) { return Paint(format, Name(format)); }
std::string Text(Format format) { return std::string(Name(format)); }

// Loss of the second over the first, as a factor.
std::string Ratio(double before, double after) {
  if (before > 0) return Fixed(after / before, 2) + "x";
  return after > 0 ? "new" : "";
}

std::vector<Format> MeasuredFormats() {
  std::vector<Format> formats;
  for (int f = 0; f < kFormats; ++f) {
    if (static_cast<Format>(f) != Format::kBf16) formats.push_back(static_cast<Format>(f));
  }
  return formats;
}

// Fields of two provenances that differ; those about the measurement only.
std::vector<std::string> ProvenanceDifferences(const Policy& a, const Policy& b) {
  std::vector<std::string> lines;
  for (const char* field : {"model", "model_hash", "tokenizer_hash", "data_hash", "codec", "metric",
                            "aggregate", "tags_at", "layers", "conversations"}) {
    const auto value = [&](const Policy& policy) {
      return policy.provenance.is_object() ? policy.provenance.value(field, Json()) : Json();
    };
    if (value(a) != value(b))
      lines.push_back(std::string(field) + ": " + value(a).dump() + " and " + value(b).dump());
  }
  return lines;
}

}  // namespace

std::string Scientific(double value) {
  char buffer[32];
  std::snprintf(buffer, sizeof(buffer), "%.2g", value);
  return buffer;
}

std::string PaintTag(int tag) { return Paint(Tag::FromIndex(tag).semantic, Name(Tag::FromIndex(tag))); }

void PrintOverAxes(const std::function<std::string(const Tag&)>& cell) {
  std::vector<std::string> header = {"modal/semantic"};
  for (int t = kTemporals - 1; t >= 0; --t) header.emplace_back(Name(static_cast<Temporal>(t)));
  Table table(std::move(header));
  for (int m = 0; m < kModals; ++m) {
    for (int s = 0; s < kSemantics; ++s) {
      Tag tag{Temporal::kCurrent, static_cast<Modal>(m), static_cast<Semantic>(s)};
      std::vector<std::string> row = {std::string(Name(tag.modal)) + "/" +
                                      Paint(tag.semantic, Name(tag.semantic))};
      for (int t = kTemporals - 1; t >= 0; --t) {
        tag.temporal = static_cast<Temporal>(t);
        row.push_back(cell(tag));
      }
      table.Add(std::move(row));
    }
  }
  table.Print();
}

void ShowPolicy(const Policy& policy, bool distortion) {
  std::printf("%s%s%s\n", Bold(policy.name).c_str(), policy.description.empty() ? "" : ": ",
              policy.description.c_str());
  const KvGeometry geometry = GeometryOf(policy);
  if (policy.priced && policy.budget_bits > 0) {
    std::printf("priced; formats at rest for %.4g effective bits (codec %s, head_dim %d)\n",
                policy.budget_bits, std::string(Name(geometry.codec)).c_str(), geometry.head_dim);
  } else if (policy.priced) {
    std::printf("priced; formats at rest for a loss of %.3g a byte\n", policy.price);
  }
  if (policy.recent_window > 0) std::printf("the newest %d tokens stay bf16\n", policy.recent_window);
  if (policy.sink > Format::kK2V2)
    std::printf("a sequence's first block has at least %s\n", Text(policy.sink).c_str());
  for (const PolicyRule& pin : policy.pins) {
    std::printf("%s never gets less than %s\n", pin.match.c_str(), Text(pin.format).c_str());
  }
  std::puts("");
  const std::array<Format, kTags> formats = FormatsAtRest(policy, geometry);
  PrintOverAxes([&](const Tag& tag) { return PaintFormat(formats[static_cast<size_t>(tag.index())]); });
  if (policy.provenance.is_object() && policy.provenance.contains("data_hash")) {
    const auto get = [&](const char* field) {
      const Json value = policy.provenance.value(field, Json());
      return value.is_string() ? value.get<std::string>() : value.dump();
    };
    std::printf("\nmeasured on %s: %s conversations, metric %s, %s\n", get("model").c_str(),
                get("conversations").c_str(), get("metric").c_str(), get("date").c_str());
  }
  if (!distortion || !policy.priced) return;
  for (const Format format : MeasuredFormats()) {
    std::printf("\n%s: loss of one token\n", PaintFormat(format).c_str());
    PrintOverAxes([&](const Tag& tag) {
      const auto t = static_cast<size_t>(tag.index());
      const std::string loss = Scientific(policy.distortion[t][static_cast<size_t>(format)]);
      return policy.counts[t] > 0 ? loss : "(" + loss + ")";
    });
  }
  std::puts("\n(in parentheses: the tag did not occur)");
}

void ShowDifference(const Policy& a, const Policy& b) {
  const std::array<Format, kTags> in_a = FormatsAtRest(a, GeometryOf(a));
  const std::array<Format, kTags> in_b = FormatsAtRest(b, GeometryOf(b));
  for (const std::string& line : ProvenanceDifferences(a, b)) std::printf("%s\n", line.c_str());
  const bool losses = a.priced && b.priced;
  std::vector<std::string> header = {"tag", a.name, b.name};
  if (losses) {
    for (const Format format : MeasuredFormats()) header.push_back(Text(format) + " loss");
  }
  Table table(std::move(header));
  int changed = 0;
  for (int tag = 0; tag < kTags; ++tag) {
    const auto t = static_cast<size_t>(tag);
    if (in_a[t] == in_b[t]) continue;
    ++changed;
    std::vector<std::string> row = {PaintTag(tag), PaintFormat(in_a[t]), PaintFormat(in_b[t])};
    if (losses) {
      for (const Format format : MeasuredFormats()) {
        row.push_back(Ratio(a.distortion[t][static_cast<size_t>(format)],
                            b.distortion[t][static_cast<size_t>(format)]));
      }
    }
    table.Add(std::move(row));
  }
  if (changed > 0) table.Print();
  std::printf("%d of %d tags have another format at rest\n", changed, kTags);
}

Json DifferenceToJson(const Policy& a, const Policy& b) {
  const std::array<Format, kTags> in_a = FormatsAtRest(a, GeometryOf(a));
  const std::array<Format, kTags> in_b = FormatsAtRest(b, GeometryOf(b));
  Json tags = Json::array();
  for (int tag = 0; tag < kTags; ++tag) {
    const auto t = static_cast<size_t>(tag);
    if (in_a[t] == in_b[t]) continue;
    tags.push_back({{"tag", Name(Tag::FromIndex(tag))}, {"a", Text(in_a[t])}, {"b", Text(in_b[t])}});
  }
  return {
      {"a", a.name}, {"b", b.name}, {"provenance", ProvenanceDifferences(a, b)}, {"tags", std::move(tags)}};
}

void ShowDrift(const Policy& policy, const Drift& drift) {
  std::vector<std::string> header = {"tag", "tokens"};
  std::vector<bool> right = {false, true};
  for (const Format format : MeasuredFormats()) {
    header.push_back(Text(format) + " loss");
    right.push_back(true);
  }
  header.insert(header.end(), {"at rest", "best now"});
  Table table(std::move(header), right);
  int changed = 0;
  for (const Drift::Entry& entry : drift.entries) {
    std::vector<std::string> row = {PaintTag(entry.tag), Fixed(entry.tokens, 1)};
    for (const Format format : MeasuredFormats()) {
      const auto f = static_cast<size_t>(format);
      row.push_back(Ratio(entry.before[f], entry.after[f]));
    }
    row.push_back(PaintFormat(entry.format_before));
    row.push_back(entry.format_after == entry.format_before ? "" : PaintFormat(entry.format_after));
    changed += entry.format_after != entry.format_before;
    table.Add(std::move(row));
  }
  table.Print();
  std::printf(
      "\nlosses as factors of those in %s: median %.2fx, rank correlation %.3f over tags and formats\n"
      "%d of %zu tags would now take another format; at %.2f bits the policy loses %.3g, the best formats "
      "%.3g (%+.1f%%)\n",
      policy.name.c_str(), drift.median_ratio, drift.rank_correlation, changed, drift.entries.size(),
      drift.bits, drift.loss, drift.best_loss,
      drift.best_loss > 0 ? 100 * (drift.loss / drift.best_loss - 1) : 0.0);
}

Json DriftToJson(const Policy& policy, const Drift& drift) {
  Json tags = Json::array();
  for (const Drift::Entry& entry : drift.entries) {
    Json before, after;
    for (const Format format : MeasuredFormats()) {
      before[Text(format)] = entry.before[static_cast<size_t>(format)];
      after[Text(format)] = entry.after[static_cast<size_t>(format)];
    }
    tags.push_back({{"tag", Name(Tag::FromIndex(entry.tag))},
                    {"tokens", entry.tokens},
                    {"before", std::move(before)},
                    {"after", std::move(after)},
                    {"format", Text(entry.format_before)},
                    {"best_format", Text(entry.format_after)}});
  }
  return {{"policy", policy.name},
          {"median_ratio", drift.median_ratio},
          {"rank_correlation", drift.rank_correlation},
          {"bits", drift.bits},
          {"loss", drift.loss},
          {"best_loss", drift.best_loss},
          {"tags", std::move(tags)}};
}

}  // namespace triaxial
