#include "text_qwen_tokenizer.h"

#include <nlohmann/json.hpp>
#include <sstream>

#include "base/file.h"

namespace triaxial {
namespace {

std::string Compose() {
  const std::string folder = "tests/data/text/";
  const auto spec = nlohmann::json::parse(ReadFile(folder + "qwen2_tokenizer_spec.json", 1 << 20).value());
  nlohmann::json vocab = nlohmann::json::object(), merges = nlohmann::json::array();
  const auto add = [&](const std::string& token) { vocab[token] = vocab.size(); };
  const auto add_range = [&](int first, int last) {
    for (int c = first; c <= last; ++c) {
      add(c < 0x80 ? std::string{static_cast<char>(c)}
                   : std::string{static_cast<char>(0xC0 | c >> 6), static_cast<char>(0x80 | (c & 0x3F))});
    }
  };
  // The byte tokens: printable Latin-1, then stand-ins for the other bytes.
  add_range(0x21, 0x7E);
  add_range(0xA1, 0xAC);
  add_range(0xAE, 0xFF);
  add_range(0x100, 0x143);
  std::istringstream lines(ReadFile(folder + "qwen2_merges.txt", 8 << 20).value());
  for (std::string line; std::getline(lines, line);) {
    merges.push_back(line);
    line.erase(line.find(' '), 1);
    add(line);
  }
  const nlohmann::json split = {{"type", "Split"},
                                {"pattern", {{"Regex", spec["pre_tokenizer_regex"]}}},
                                {"behavior", "Isolated"},
                                {"invert", false}};
  const nlohmann::json bytes = {{"type", "ByteLevel"}, {"add_prefix_space", false}, {"use_regex", false}};
  return nlohmann::json({{"added_tokens", spec["added_tokens"]},
                         {"normalizer", {{"type", spec["normalizer"]}}},
                         {"pre_tokenizer",
                          {{"type", "Sequence"}, {"pretokenizers", nlohmann::json::array({split, bytes})}}},
                         {"model", {{"type", "BPE"}, {"vocab", vocab}, {"merges", merges}}}})
      .dump();
}

}  // namespace

const Tokenizer& QwenTokenizer() {
  static const Tokenizer tokenizer = std::move(Tokenizer::FromJson(Compose(), "tests/data/text")).value();
  return tokenizer;
}

}  // namespace triaxial
