#include "apps/demo_trajectory.h"

#include <filesystem>
#include <sstream>

#include "base/file.h"
#include "serve/base64.h"

namespace triaxial {
namespace {

constexpr size_t kMaxFile = size_t{256} << 20;
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

Result<Trajectory> ParseTrajectory(const std::string& line, const std::filesystem::path& directory,
                                   const std::string& what) {
  ASSIGN_OR_RETURN(Json json, ParseJson(line, what));
  Trajectory trajectory;
  if (json.is_object() && json.contains("id") && json["id"].is_string())
    trajectory.id = json["id"].get<std::string>();
  if (json.is_object() && json.contains("request")) {
    json = Json(json["request"]);
    trajectory.request = true;
  }
  if (!json.is_object() || !json.contains("messages") || !json["messages"].is_array())
    return InvalidArgument(what + " has no list of messages; each line must be one OpenAI conversation");
  if (trajectory.id.empty()) trajectory.id = what;
  if (json.contains("tools")) trajectory.tools = std::move(json["tools"]);
  trajectory.messages = std::move(json["messages"]);
  for (size_t i = 0; i < trajectory.messages.size(); ++i) {
    Json& message = trajectory.messages[i];
    if (!message.is_object() || !message.contains("role"))
      return InvalidArgument(what + ": messages[" + std::to_string(i) + "] has no role");
    if (message["role"] == "assistant" && i > 0) trajectory.steps.push_back(i);
    const Status status = InlineImages(directory, &message);
    if (!status.ok())
      return Status(status.code(), what + ": messages[" + std::to_string(i) + "]: " + status.message());
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
  ASSIGN_OR_RETURN(const std::string text, ReadFile(path, kMaxFile));
  const std::filesystem::path directory =
      images.empty() ? std::filesystem::path(path).parent_path() : std::filesystem::path(images);
  std::vector<Trajectory> trajectories;
  std::istringstream lines(text);
  size_t number = 0;
  for (std::string line; std::getline(lines, line);) {
    ++number;
    if (line.empty()) continue;
    if (limit > 0 && trajectories.size() == limit) break;
    ASSIGN_OR_RETURN(Trajectory trajectory,
                     ParseTrajectory(line, directory, path + " line " + std::to_string(number)));
    trajectories.push_back(std::move(trajectory));
  }
  if (trajectories.empty()) return InvalidArgument(path + " holds no conversation");
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
