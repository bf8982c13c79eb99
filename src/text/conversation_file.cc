#include "text/conversation_file.h"

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <iterator>

#include "base/file.h"

namespace triaxial {
namespace {

constexpr int64_t kMaxLine = int64_t{256} << 20;

bool IsBlank(std::string_view line) { return line.find_first_not_of(" \t\r\n") == std::string_view::npos; }

std::string LineOf(const std::string& path, int64_t number) {
  return path + ", line " + std::to_string(number);
}

std::string DirectoryOf(const std::string& path) {
  return path == "-" ? "." : std::filesystem::path(path).parent_path().string();
}

}  // namespace

Status ConversationLine::Error(const Status& status) const {
  return Status(status.code(), where + ": " + status.message());
}

Result<Conversation> ConversationLine::Parse() const {
  Result<Conversation> conversation = ParseConversation(messages, tools);
  if (!conversation.ok()) return Error(conversation.status());
  return conversation;
}

Result<ConversationLine> ParseConversationLine(std::string_view text, std::string where) {
  ASSIGN_OR_RETURN(Json json, ParseJson(text, where));
  ConversationLine line;
  if (json.is_object() && json.contains("id") && json["id"].is_string()) line.id = json["id"];
  if (json.is_object() && json.contains("request")) {
    json = Json(std::move(json["request"]));
    line.is_request = true;
  }
  if (json.is_array()) json = Json{{"messages", std::move(json)}};
  if (!json.is_object() || !json.contains("messages") || !json["messages"].is_array()) {
    return InvalidArgument(where +
                           " has no list of messages; expected a conversation such as "
                           R"({"messages": [...], "tools": [...]} or {"request": {"messages": [...]}})");
  }
  if (line.id.empty()) line.id = where;
  line.where = std::move(where);
  line.messages = std::move(json["messages"]);
  if (json.contains("tools")) line.tools = std::move(json["tools"]);
  return line;
}

Result<ConversationFile> ConversationFile::Open(const std::string& path, const std::string& images) {
  ConversationFile file;
  file.path_ = path;
  file.images_ = images.empty() ? DirectoryOf(path) : images;
  std::error_code ignored;
  std::ifstream in(path, std::ios::binary);
  if (!in || std::filesystem::is_directory(path, ignored)) {
    return NotFound("cannot open " + path + "; expected a file with one conversation a line");
  }
  int64_t offset = 0, number = 0;
  for (std::string line; std::getline(in, line);) {
    ++number;
    const auto bytes = static_cast<int64_t>(line.size());
    if (bytes > kMaxLine) {
      return InvalidArgument(LineOf(path, number) + " has " + std::to_string(bytes) +
                             " bytes; a conversation may have " + std::to_string(kMaxLine));
    }
    if (!IsBlank(line)) file.lines_.push_back({number, offset, bytes});
    offset += bytes + 1;
  }
  if (in.bad()) return Internal("reading " + path + " failed");
  if (file.lines_.empty()) {
    return InvalidArgument(
        path + R"( holds no conversation; expected lines such as {"messages": [...], "tools": [...]})");
  }
  return file;
}

std::string ConversationFile::NameOf(size_t index) const { return LineOf(path_, lines_[index].number); }

Result<ConversationLine> ConversationFile::Read(size_t index) const {
  const Line& line = lines_[index];
  std::ifstream in(path_, std::ios::binary);
  std::string text(static_cast<size_t>(line.bytes), '\0');
  in.seekg(line.offset);
  if (!in.read(text.data(), line.bytes))
    return DataLoss(NameOf(index) + " cannot be read any more; the file has changed");
  ASSIGN_OR_RETURN(ConversationLine parsed, ParseConversationLine(text, NameOf(index)));
  parsed.images = images_;
  return parsed;
}

Result<std::vector<ConversationLine>> ConversationFile::ReadAll(size_t limit) const {
  std::vector<ConversationLine> lines;
  const size_t count = limit == 0 ? size() : std::min(limit, size());
  for (size_t i = 0; i < count; ++i) {
    ASSIGN_OR_RETURN(ConversationLine line, Read(i));
    lines.push_back(std::move(line));
  }
  return lines;
}

Result<ConversationLine> LoadConversation(const std::string& path, int line) {
  std::string text;
  if (path == "-") {
    text.assign(std::istreambuf_iterator<char>(std::cin), {});
  } else {
    ASSIGN_OR_RETURN(text, ReadFile(path, static_cast<size_t>(kMaxLine)));
  }
  const std::string name = path == "-" ? "standard input" : path;
  std::string_view chosen = text;
  for (int i = 1; i < line && !chosen.empty(); ++i) {
    chosen.remove_prefix(std::min(chosen.find('\n'), chosen.size() - 1) + 1);
  }
  if (line > 0) chosen = chosen.substr(0, chosen.find('\n'));
  if (IsBlank(chosen)) {
    return InvalidArgument(line > 0 ? LineOf(name, line) + " is empty or does not exist"
                                    : name + " is empty; expected a conversation");
  }
  Result<ConversationLine> parsed = ParseConversationLine(chosen, line > 0 ? LineOf(name, line) : name);
  // Where the first line is a conversation, but the whole is not, one has to be chosen.
  if (!parsed.ok() && line == 0 && ParseConversationLine(chosen.substr(0, chosen.find('\n')), "").ok()) {
    return InvalidArgument(name + " holds more than one conversation; choose one with --line");
  }
  if (parsed.ok()) parsed->images = DirectoryOf(path);
  return parsed;
}

}  // namespace triaxial
