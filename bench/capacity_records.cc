#include "bench/capacity_records.h"

#include <filesystem>
#include <map>
#include <memory>
#include <sstream>

#include "base/file.h"
#include "base/json.h"
#include "io/image_processor.h"

namespace triaxial {
namespace {

// Pictures by their paths: many records show the same ones.
class Pictures {
 public:
  Result<std::shared_ptr<const ImagePatches>> Find(const std::string& path) {
    if (const auto known = known_.find(path); known != known_.end()) return known->second;
    const std::filesystem::path file = std::filesystem::path("tests/data/trajectories") / path;
    ASSIGN_OR_RETURN(const std::string bytes, ReadFile(file.string(), size_t{64} << 20));
    ASSIGN_OR_RETURN(ImagePatches patches, PreprocessImage(bytes, {}, {}));
    patches.samples = {};  // grid and identity are all that is needed
    return known_.emplace(path, std::make_shared<ImagePatches>(std::move(patches))).first->second;
  }

 private:
  std::map<std::string, std::shared_ptr<const ImagePatches>> known_;
};

Result<Record> ReadRecord(Json json, const std::string& file, size_t line, const ChatTemplate& chat_template,
                          Pictures* pictures) {
  Record record;
  record.source = json.value("source", file);
  record.id = json.contains("id") && json["id"].is_string() ? json["id"].get<std::string>()
                                                            : record.source + "/" + std::to_string(line);
  if (json.contains("request")) json = Json(json["request"]);
  ASSIGN_OR_RETURN(
      const Conversation conversation,
      ParseConversation(json["messages"], json.contains("tools") ? json["tools"] : Json(nullptr)));
  std::vector<std::shared_ptr<const ImagePatches>> images;
  for (const Message& message : conversation.messages) {
    for (const ContentPart& part : message.content) {
      if (part.kind != ContentPart::Kind::kImage) continue;
      ASSIGN_OR_RETURN(std::shared_ptr<const ImagePatches> patches, pictures->Find(part.text));
      images.push_back(std::move(patches));
    }
  }
  TemplateOptions options;
  options.add_generation_prompt = conversation.messages.back().role != Role::kAssistant;
  ASSIGN_OR_RETURN(const Prompt prompt,
                   chat_template.Render(conversation, images, PreprocessorConfig{}.merge_size, options));
  record.screenshots = !images.empty();
  AppendKvTokens(prompt, &record.tokens);
  return record;
}

}  // namespace

Result<std::vector<Record>> LoadRecords(const ChatTemplate& chat_template) {
  Pictures pictures;
  std::vector<Record> records;
  for (const std::string file : {"osworld_shape_requests", "trajectories"}) {
    const std::string path = "tests/data/text/" + file + ".jsonl";
    ASSIGN_OR_RETURN(const std::string text, ReadFile(path, size_t{256} << 20));
    std::istringstream lines(text);
    size_t number = 0;
    for (std::string line; std::getline(lines, line);) {
      const std::string what = path + " line " + std::to_string(++number);
      ASSIGN_OR_RETURN(Json json, ParseJson(line, what));
      Result<Record> record = ReadRecord(std::move(json), file, number, chat_template, &pictures);
      if (!record.ok()) return Internal(what + ": " + record.status().message());
      records.push_back(std::move(*record));
    }
  }
  return records;
}

}  // namespace triaxial
