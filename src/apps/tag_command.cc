#include <cstdio>

#include "apps/commands.h"
#include "apps/terminal.h"
#include "base/checked_math.h"
#include "base/json.h"
#include "kv/policy.h"
#include "text/conversation_file.h"

namespace triaxial {
namespace {

// Text of tokens [begin, end) on one line, cut to `width` characters.
std::string Preview(const Tokenizer& tokenizer, const std::vector<int32_t>& tokens, int32_t begin,
                    int32_t end, size_t width) {
  const int32_t last = std::min(end, begin + static_cast<int32_t>(width));
  const std::string text = tokenizer.Decode({tokens.begin() + begin, tokens.begin() + last}, false);
  std::string out;
  size_t characters = 0;
  for (size_t i = 0; i < text.size(); ++i) {
    const auto byte = static_cast<uint8_t>(text[i]);
    if ((byte & 0xc0) != 0x80 && ++characters > width) return out + "…";
    if (text[i] == '\n')
      out += "⏎";
    else if (byte < 0x20 || byte == 0x7f)
      out += ' ';
    else
      out += text[i];
  }
  return out;
}

// "k2v2 k4v4": formats of the blocks that [begin, end) touches, each once, in order of appearance.
std::vector<Format> FormatsOf(const std::vector<Format>& blocks, int32_t begin, int32_t end) {
  std::vector<Format> formats;
  for (int32_t b = begin / kBlockTokens; b <= (end - 1) / kBlockTokens; ++b) {
    const Format format = blocks[static_cast<size_t>(b)];
    if (std::find(formats.begin(), formats.end(), format) == formats.end()) formats.push_back(format);
  }
  return formats;
}

}  // namespace

Command AddTag(CLI::App* app) {
  struct Flags {
    ModelFlags model;
    std::string file, prompt;
    int line = 0;
    bool json = false;
  };
  auto flags = std::make_shared<Flags>();
  CLI::App* command = app->add_subcommand(
      "tag", "Show what each span of a request is, and how its KV blocks would be stored");
  AddCheckpointFlags(command, &flags->model);
  AddPolicyFlags(command, &flags->model);
  CLI::Option* file =
      command->add_option("messages", flags->file, "JSON file with messages and tools ('-': standard input)");
  command->add_option("--prompt", flags->prompt, "A raw prompt instead")->excludes(file);
  command->add_option("--line", flags->line, "Line of a file with one conversation a line, from 1")
      ->needs(file)
      ->check(CLI::Range(1, 1 << 30));
  command->add_flag("--json", flags->json, "Print JSON");
  return [flags]() -> Status {
    if (flags->file.empty() && flags->prompt.empty())
      return InvalidArgument("nothing to tag: give a JSON file or --prompt TEXT");
    ASSIGN_OR_RETURN(const ServedModel model, LoadServedModel(flags->model.model, flags->model.tokenizer));
    ASSIGN_OR_RETURN(const Policy policy, LoadPolicy(PolicyOf(flags->model)));
    Prompt prompt;
    if (!flags->prompt.empty()) {
      prompt = BuildRawPrompt(model, model.tokenizer->Encode(flags->prompt, ParseSpecial::kAll));
    } else {
      ASSIGN_OR_RETURN(const ConversationLine line, LoadConversation(flags->file, flags->line));
      ASSIGN_OR_RETURN(const Conversation conversation, line.Parse());
      Result<Prompt> rendered = BuildChatPrompt(model, conversation, {}, ImageFromFiles(line.images));
      if (!rendered.ok()) return line.Error(rendered.status());
      prompt = std::move(*rendered);
    }
    const auto tokens = static_cast<int32_t>(prompt.tokens.size());
    const KvGeometry geometry = {model.config.text.num_layers, model.config.text.num_kv_heads,
                                 model.config.text.head_dim,
                                 flags->model.kv_codec == "paper" ? Codec::kPaper : Codec::kRotated};
    const std::vector<Tag> tags = TagTokens(prompt.spans, tokens);
    const TagNeeds needs = ResolveNeeds(policy, geometry, /*two_bit_keys=*/true, /*budget_bits=*/0);
    std::vector<uint8_t> indices;
    for (const Tag& tag : tags) indices.push_back(static_cast<uint8_t>(tag.index()));
    const auto wish_of = [&](const Tag& tag) {
      return FormatOfTag(needs, geometry, static_cast<uint8_t>(tag.index()));
    };
    std::vector<Format> blocks;
    int64_t bytes = 0;
    for (int32_t begin = 0; begin < tokens; begin += kBlockTokens) {
      const bool tail = begin + kBlockTokens > tokens || begin + kBlockTokens > tokens - policy.recent_window;
      const auto of_block = std::span(indices).subspan(
          static_cast<size_t>(begin), static_cast<size_t>(std::min(kBlockTokens, tokens - begin)));
      blocks.push_back(tail ? Format::kBf16
                            : Choose(needs, NeedOf(needs, of_block, begin == 0), geometry, needs.rest_price));
      const auto room = CeilDiv(static_cast<int64_t>(of_block.size()), kTailStep) * kTailStep;
      bytes += BlockBytes(geometry, blocks.back(), static_cast<int>(room));
    }
    const double bits = 8.0 * static_cast<double>(bytes) /
                        std::max<double>(1.0, static_cast<double>(tokens) * 2.0 * geometry.num_layers *
                                                  geometry.num_kv_heads * geometry.head_dim);
    if (flags->json) {
      Json json = {
          {"tokens", tokens},       {"policy", policy.name},  {"codec", std::string(Name(geometry.codec))},
          {"kv_bytes", bytes},      {"effective_bits", bits}, {"spans", Json::array()},
          {"blocks", Json::array()}};
      for (const TagSpan& span : prompt.spans) {
        const Tag& tag = tags[static_cast<size_t>(span.begin)];
        json["spans"].push_back({{"begin", span.begin},
                                 {"end", span.end},
                                 {"message", span.message},
                                 {"turn", span.turn},
                                 {"tag", Name(tag)},
                                 {"wish", std::string(Name(wish_of(tag)))}});
      }
      for (size_t b = 0; b < blocks.size(); ++b) {
        const auto begin = static_cast<int32_t>(b) * kBlockTokens;
        json["blocks"].push_back({{"begin", begin},
                                  {"end", std::min(tokens, begin + kBlockTokens)},
                                  {"format", std::string(Name(blocks[b]))}});
      }
      std::puts(json.dump(2, ' ', false, Json::error_handler_t::replace).c_str());
      return OkStatus();
    }
    Table table({"tokens", "message", "tag", "wish", "blocks", "text"},
                {true, true, false, false, false, false});
    for (const TagSpan& span : prompt.spans) {
      const Tag& tag = tags[static_cast<size_t>(span.begin)];
      const Format wish = wish_of(tag);
      std::string stored;
      for (const Format format : FormatsOf(blocks, span.begin, span.end))
        stored += (stored.empty() ? "" : " ") + Paint(format, Name(format));
      table.Add({std::to_string(span.begin) + "–" + std::to_string(span.end),
                 span.message < 0 ? "" : std::to_string(span.message), Paint(tag.semantic, Name(tag)),
                 Paint(wish, Name(wish)), stored,
                 span.modal == Modal::kImage
                     ? std::to_string(span.end - span.begin) + " image tokens"
                     : Preview(*model.tokenizer, prompt.tokens, span.begin, span.end, 48)});
    }
    table.Print();
    std::printf(
        "\n%s tokens in %zu blocks of %d, %s at %.2f effective bits (BF16: %s); the last block is the BF16 "
        "tail\n",
        Count(tokens).c_str(), blocks.size(), kBlockTokens, Bytes(static_cast<double>(bytes)).c_str(), bits,
        Bytes(static_cast<double>(Bf16KvBytesPerToken(model.config.text)) * tokens).c_str());
    return OkStatus();
  };
}

}  // namespace triaxial
