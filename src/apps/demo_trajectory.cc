#include "apps/demo_trajectory.h"

#include <algorithm>
#include <filesystem>

#include "base/file.h"
#include "serve/base64.h"
#include "text/conversation_file.h"

namespace triaxial {
namespace {

constexpr size_t kMaxImage = size_t{32} << 20;

// Replaces the path of every picture by a data: URL.
Status InlineImages(const std::filesystem::path& directory, Json* message) {
  const auto content = message->find("content");
  if (content == message->end() || !content->is_array()) return OkStatus();
  for (Json& part : *content) {
    if (!part.is_object() || !part.contains("image_url")) continue;
    Json& holder = part["image_url"];
    Json& url = holder.is_object() ? holder["url"] : holder;
    if (!url.is_string()) return InvalidArgument("an image_url has no url");
    const std::string& path = url.get_ref<const std::string&>();
    if (path.starts_with("data:")) continue;
    ASSIGN_OR_RETURN(const std::string bytes, ReadFile((directory / path).string(), kMaxImage));
    const std::string extension = std::filesystem::path(path).extension().string();
    const std::string type = extension.empty() ? "png" : extension.substr(1);
    url = "data:image/" + type + ";base64," + EncodeBase64(bytes);
  }
  return OkStatus();
}

Result<Trajectory> MakeTrajectory(ConversationLine line) {
  Trajectory trajectory;
  trajectory.id = std::move(line.id);
  trajectory.tools = std::move(line.tools);
  trajectory.messages = std::move(line.messages);
  trajectory.request = line.is_request;
  for (size_t i = 0; i < trajectory.messages.size(); ++i) {
    Json& message = trajectory.messages[i];
    const std::string what = "messages[" + std::to_string(i) + "]";
    if (!message.is_object() || !message.contains("role"))
      return line.Error(InvalidArgument(what + " has no role"));
    if (message["role"] == "assistant" && i > 0) trajectory.steps.push_back(i);
    const Status status = InlineImages(line.images, &message);
    if (!status.ok()) return line.Error(Status(status.code(), what + ": " + status.message()));
  }
  return trajectory;
}

// A tool call's function with arguments as a value; a discarded value if it is not a call with JSON
// arguments.
nlohmann::json CallValue(const Json& call) {
  const auto function = call.is_object() ? call.find("function") : call.end();
  if (function == call.end() || !function->is_object())
    return nlohmann::json(nlohmann::json::value_t::discarded);
  // Through text, because objects of Json keep the order of their keys and compare by it.
  nlohmann::json value = nlohmann::json::parse(function->dump(), nullptr, false);
  nlohmann::json arguments = value["arguments"];
  if (arguments.is_string())
    arguments = nlohmann::json::parse(arguments.get_ref<const std::string&>(), nullptr, false);
  if (arguments.is_discarded()) return arguments;
  return {{"name", value["name"]}, {"arguments", std::move(arguments)}};
}

Json ListOf(const Json& message, const char* field) {
  const auto it = message.find(field);
  return it != message.end() && it->is_array() ? *it : Json::array();
}

std::string ContentOf(const Json& message) {
  const auto it = message.find("content");
  return it != message.end() && it->is_string() ? it->get<std::string>() : "";
}

}  // namespace

Result<std::vector<Trajectory>> LoadTrajectories(const std::string& path, size_t limit,
                                                 const std::string& images) {
  ASSIGN_OR_RETURN(const ConversationFile file, ConversationFile::Open(path, images));
  const size_t count = limit == 0 ? file.size() : std::min(limit, file.size());
  std::vector<Trajectory> trajectories;
  for (size_t i = 0; i < count; ++i) {
    ASSIGN_OR_RETURN(ConversationLine line, file.Read(i));
    ASSIGN_OR_RETURN(Trajectory trajectory, MakeTrajectory(std::move(line)));
    trajectories.push_back(std::move(trajectory));
  }
  return trajectories;
}

Json StepRequest(const Trajectory& trajectory, size_t step, const std::string& model, int max_tokens) {
  Json messages = Json::array();
  for (size_t i = 0; i < trajectory.steps[step]; ++i) messages.push_back(trajectory.messages[i]);
  Json request = {{"model", model}, {"messages", std::move(messages)}};
  if (!trajectory.tools.is_null()) request["tools"] = trajectory.tools;
  request["temperature"] = 0;
  request["max_tokens"] = max_tokens;
  return request;
}

bool SameAnswer(const Json& answer, const Json& recorded) {
  const Json ours = ListOf(answer, "tool_calls");
  const Json theirs = ListOf(recorded, "tool_calls");
  if (ours.size() != theirs.size()) return false;
  if (ours.empty()) return ContentOf(answer) == ContentOf(recorded);
  for (size_t i = 0; i < ours.size(); ++i) {
    const nlohmann::json a = CallValue(ours[i]), b = CallValue(theirs[i]);
    if (a.is_discarded() || b.is_discarded() || a != b) return false;
  }
  return true;
}

}  // namespace triaxial
