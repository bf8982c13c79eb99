#include "apps/bench_workload.h"

#include <array>
#include <cstdlib>
#include <filesystem>
#include <random>
#include <set>
#include <sstream>

#include "apps/bench_screenshot.h"
#include "apps/demo_trajectory.h"
#include "base/file.h"
#include "base/json.h"
#include "serve/base64.h"

namespace triaxial {
namespace {

constexpr int kAnswerTokens = 300;

std::shared_ptr<const std::string> Text(const Json& json) {
  return std::make_shared<const std::string>(json.dump(-1, ' ', false, Json::error_handler_t::replace));
}

// Prompts of random tokens. Their ids exist in every vocabulary and are plain text in it.
class SyntheticWorkload final : public BenchWorkload {
 public:
  SyntheticWorkload(std::string name, int prompt, int answer)
      : name_(std::move(name)), prompt_(prompt), answer_(answer) {}
  std::string_view name() const override { return name_; }
  int64_t sessions() const override { return 0; }
  bool fixed_length() const override { return true; }
  BenchSession Make(int64_t index) override {
    constexpr uint32_t kFirst = 300, kCount = 1000;
    std::mt19937 random(static_cast<uint32_t>(index) + 1);
    BenchStep step;
    step.max_tokens = answer_;
    step.prompt = "[";
    for (int i = 0; i < prompt_; ++i)
      step.prompt += (i > 0 ? "," : "") + std::to_string(kFirst + random() % kCount);
    step.prompt += "]";
    return {"", {std::move(step)}};
  }

 private:
  const std::string name_;
  const int prompt_, answer_;
};

// Conversations of the shape that the OSWorld agent for Qwen3-VL has: its system text, one screenshot a step,
// each step the whole conversation so far. Only the texts and pictures are made up.
class OsworldWorkload final : public BenchWorkload {
 public:
  static constexpr int kSteps = 8, kWidth = 1920, kHeight = 1080;
  static constexpr int64_t kScreenshots = 64;  // different ones; conversations differ by their task

  static Result<std::unique_ptr<BenchWorkload>> Create(int max_tokens) {
    const std::string path = "tests/data/text/osworld_shape_requests.jsonl";
    ASSIGN_OR_RETURN(const std::string text, ReadFile(path, size_t{16} << 20));
    ASSIGN_OR_RETURN(const Json first, ParseJson(text.substr(0, text.find('\n')), path + " line 1"));
    auto workload = std::make_unique<OsworldWorkload>();
    workload->system_ = Text(first["request"]["messages"][0]);
    workload->max_tokens_ = max_tokens;
    return std::unique_ptr<BenchWorkload>(std::move(workload));
  }

  std::string_view name() const override { return "osworld"; }
  int64_t sessions() const override { return 0; }
  bool fixed_length() const override { return true; }
  BenchSession Make(int64_t index) override {
    BenchSession session;
    std::mt19937 random(static_cast<uint32_t>(index) + 1);
    std::vector<std::shared_ptr<const std::string>> messages = {system_};
    for (int s = 0; s < kSteps; ++s) {
      Json content = Json::array();
      content.push_back({{"type", "image_url"}, {"image_url", {{"url", Screenshot(index * kSteps + s)}}}});
      if (s == 0) {
        content.push_back(
            {{"type", "text"},
             {"text",
              "\nPlease generate the next move according to the UI screenshot, instruction and previous "
              "actions.\n\nInstruction: Task " +
                  std::to_string(index) + ": " + Words(random, 24) + "\n\nPrevious actions:\nNone"}});
      }
      messages.push_back(Text({{"role", "user"}, {"content", std::move(content)}}));
      session.steps.push_back({messages, "", max_tokens_});
      messages.push_back(Text({{"role", "assistant"}, {"content", Answer(random)}}));
    }
    return session;
  }

 private:
  static std::string Words(std::mt19937& random, int count) {
    static constexpr std::array<const char*, 24> kWords = {
        "the",    "window", "open",   "file",   "cell",  "menu",  "value",  "select",
        "report", "page",   "to",     "of",     "save",  "table", "column", "in",
        "dialog", "button", "folder", "number", "click", "chart", "error",  "and"};
    std::string text;
    for (int i = 0; i < count; ++i) text += std::string(i > 0 ? " " : "") + kWords[random() % kWords.size()];
    return text;
  }
  // About 300 tokens: a thought, an action and its call.
  static std::string Answer(std::mt19937& random) {
    return "Thought: " + Words(random, 220) + ".\nAction: " + Words(random, 10) +
           ".\n<tool_call>\n{\"name\": \"computer_use\", \"arguments\": {\"action\": \"left_click\", "
           "\"coordinate\": [" +
           std::to_string(random() % 1000) + ", " + std::to_string(random() % 1000) + "]}}\n</tool_call>";
  }
  const std::string& Screenshot(int64_t number) {
    std::string& url = screenshots_[static_cast<size_t>(number % kScreenshots)];
    if (url.empty()) {
      url = "data:image/jpeg;base64," +
            EncodeBase64(DrawScreenshot(kWidth, kHeight, static_cast<uint32_t>(number % kScreenshots)));
    }
    return url;
  }

  std::shared_ptr<const std::string> system_;
  int max_tokens_ = 0;
  std::array<std::string, kScreenshots> screenshots_;
};

class RecordedWorkload final : public BenchWorkload {
 public:
  static Result<std::unique_ptr<BenchWorkload>> Create(const std::string& path, int max_tokens,
                                                       const BenchWorkloadOptions& options) {
    auto workload = std::make_unique<RecordedWorkload>();
    workload->name_ = std::filesystem::path(path).stem().string();
    workload->fixed_length_ = options.fixed_length;
    ASSIGN_OR_RETURN(const std::vector<Trajectory> trajectories, LoadTrajectories(path, 0, options.images));
    bool continues = false;  // the next request belongs to the last session
    for (const Trajectory& trajectory : trajectories) {
      BenchSession session;
      if (!trajectory.tools.is_null() && !trajectory.tools.empty()) session.tools = trajectory.tools.dump();
      std::vector<std::shared_ptr<const std::string>> messages;
      const std::set<size_t> answers(trajectory.steps.begin(), trajectory.steps.end());
      for (size_t i = 0; i < trajectory.messages.size(); ++i) {
        if (!trajectory.request && answers.contains(i)) session.steps.push_back({messages, "", max_tokens});
        messages.push_back(Text(trajectory.messages[i]));
      }
      if (trajectory.request) session.steps.push_back({std::move(messages), "", max_tokens});
      if (trajectory.request && continues) {
        workload->sessions_.back().steps.push_back(std::move(session.steps.front()));
      } else if (!session.steps.empty()) {
        workload->sessions_.push_back(std::move(session));
      }
      continues = trajectory.request;
    }
    if (workload->sessions_.empty()) return InvalidArgument(path + " holds no assistant message to ask for");
    return std::unique_ptr<BenchWorkload>(std::move(workload));
  }

  std::string_view name() const override { return name_; }
  int64_t sessions() const override { return static_cast<int64_t>(sessions_.size()); }
  bool fixed_length() const override { return fixed_length_; }
  BenchSession Make(int64_t index) override {
    return sessions_[static_cast<size_t>(index) % sessions_.size()];
  }

 private:
  std::string name_;
  bool fixed_length_ = false;
  std::vector<BenchSession> sessions_;
};

// "4096/1024": both numbers, or false.
bool ParseLengths(const std::string& name, int* prompt, int* answer) {
  constexpr long kMost = 1 << 20;
  char* end = nullptr;
  const long first = std::strtol(name.c_str(), &end, 10);
  if (end == name.c_str() || *end != '/' || first < 1 || first > kMost) return false;
  const char* rest = end + 1;
  const long second = std::strtol(rest, &end, 10);
  if (end == rest || *end != '\0' || second < 1 || second > kMost) return false;
  *prompt = static_cast<int>(first);
  *answer = static_cast<int>(second);
  return true;
}

}  // namespace

Result<std::unique_ptr<BenchWorkload>> MakeWorkload(const std::string& name,
                                                    const BenchWorkloadOptions& options) {
  const int max_tokens = options.max_tokens > 0 ? options.max_tokens : kAnswerTokens;
  int prompt = 0, answer = 0;
  if (ParseLengths(name, &prompt, &answer)) {
    if (options.max_tokens > 0) answer = options.max_tokens;
    return std::unique_ptr<BenchWorkload>(std::make_unique<SyntheticWorkload>(name, prompt, answer));
  }
  if (name == "osworld") return OsworldWorkload::Create(max_tokens);
  return RecordedWorkload::Create(name, max_tokens, options);
}

std::string StepTarget(const BenchStep& step) {
  return step.prompt.empty() ? "/v1/chat/completions" : "/v1/completions";
}

std::string StepBody(const BenchSession& session, const BenchStep& step, const std::string& model,
                     bool fixed_length) {
  std::string body =
      "{\"model\":" + Json(model).dump() +
      ",\"stream\":true,\"stream_options\":{\"include_usage\":true},\"temperature\":0,\"max_tokens\":" +
      std::to_string(step.max_tokens) + (fixed_length ? ",\"ignore_eos\":true" : "");
  if (!step.prompt.empty()) return body + ",\"prompt\":" + step.prompt + "}";
  if (!session.tools.empty()) body += ",\"tools\":" + session.tools;
  size_t bytes = body.size() + 64;
  for (const auto& message : step.messages) bytes += message->size() + 1;
  body.reserve(bytes);
  body += ",\"messages\":[";
  for (size_t i = 0; i < step.messages.size(); ++i) {
    if (i > 0) body += ',';
    body += *step.messages[i];
  }
  return body + "]}";
}

}  // namespace triaxial
