#include "calib/recorded_steps.h"

#include <fmt/format.h>

#include <algorithm>
#include <utility>

#include "engine/prepare.h"

namespace triaxial {
namespace {

Result<std::vector<std::shared_ptr<const ImagePatches>>> LoadImages(const ServedModel& model,
                                                                    const Conversation& conversation,
                                                                    const ImageSource& source) {
  std::vector<std::shared_ptr<const ImagePatches>> images;
  for (size_t m = 0; m < conversation.messages.size(); ++m) {
    for (const ContentPart& part : conversation.messages[m].content) {
      if (part.kind != ContentPart::Kind::kImage) continue;
      const auto fail = [&](const std::string& why) {
        return InvalidArgument(fmt::format("messages[{}], image {}: {}", m, images.size(), why));
      };
      if (!model.config.vision) return fail("model " + model.name + " reads text only");
      const Result<std::string> bytes = source(part.text);
      if (!bytes.ok()) return fail(bytes.status().message());
      Result<ImagePatches> patches = PreprocessImage(*bytes, model.image_limits, model.preprocessor);
      if (!patches.ok()) return fail(patches.status().message());
      images.push_back(std::make_shared<const ImagePatches>(std::move(*patches)));
    }
  }
  return images;
}

struct Renderer {
  const ServedModel& model;
  const std::vector<std::shared_ptr<const ImagePatches>>& images;
  const Conversation& whole;

  Conversation Head(size_t messages) const {
    Conversation head;
    head.tools = whole.tools;
    head.messages.assign(whole.messages.begin(),
                         whole.messages.begin() + static_cast<std::ptrdiff_t>(messages));
    return head;
  }
  Result<Prompt> Render(size_t messages, bool generation_prompt) const {
    const Conversation head = Head(messages);
    const std::vector<std::shared_ptr<const ImagePatches>> shown(images.begin(),
                                                                 images.begin() + head.images());
    TemplateOptions options;
    options.add_generation_prompt = generation_prompt;
    return model.chat_template->Render(head, shown, model.preprocessor.merge_size, options);
  }
  // What the template puts behind the prompt for the answer messages[m], as text. Only where the tokens of
  // the prompt are not the first ones of the answered conversation: where text joins them differently.
  Result<std::vector<int32_t>> OutputFromText(size_t m) const {
    TemplateOptions options;
    options.add_generation_prompt = false;
    ASSIGN_OR_RETURN(const std::string answered, model.chat_template->RenderText(Head(m + 1), options));
    options.add_generation_prompt = true;
    ASSIGN_OR_RETURN(const std::string prompt, model.chat_template->RenderText(Head(m), options));
    if (!answered.starts_with(prompt)) {
      return InvalidArgument(
          "the chat template does not render the answer behind its prompt, so that the model "
          "could not have written it");
    }
    std::string text = answered.substr(prompt.size());
    const std::string end = "<|im_end|>";
    const size_t at = text.rfind(end);
    if (at != std::string::npos) text.resize(at);
    std::vector<int32_t> output = model.tokenizer->Encode(text, ParseSpecial::kMarkup);
    output.push_back(model.markup.im_end);
    return output;
  }
};

Result<RecordedStep> MakeStep(const Renderer& renderer, size_t m) {
  const ServedModel& model = renderer.model;
  RecordedStep step;
  step.message = static_cast<int32_t>(m);
  step.calls_tools = !renderer.whole.messages[m].tool_calls.empty();
  ASSIGN_OR_RETURN(step.prompt, renderer.Render(m, /*generation_prompt=*/true));
  ASSIGN_OR_RETURN(const Prompt answered, renderer.Render(m + 1, /*generation_prompt=*/false));
  const std::vector<int32_t>& before = step.prompt.tokens;
  const std::vector<int32_t>& after = answered.tokens;
  if (after.size() > before.size() && std::equal(before.begin(), before.end(), after.begin())) {
    step.output.assign(after.begin() + static_cast<std::ptrdiff_t>(before.size()), after.end());
    while (!step.output.empty() && step.output.back() != model.markup.im_end) step.output.pop_back();
  } else {
    ASSIGN_OR_RETURN(step.output, renderer.OutputFromText(m));
  }
  if (step.output.empty()) return InvalidArgument("the answer is empty");

  GenerationTagger tagger(model.markup, model.chat_template->GenerationStartsInThought({}));
  for (size_t i = 0; i < step.output.size(); ++i) {
    const Tag tag{Temporal::kCurrent, Modal::kText, tagger.Next(step.output[i])};
    step.tags.push_back(static_cast<uint8_t>(tag.index()));
    if (step.output[i] == model.markup.think_end && model.markup.think_end >= 0) {
      step.action = static_cast<int32_t>(i) + 1;
    }
  }
  step.positions = PositionsOf(step.prompt, model.preprocessor);
  return step;
}

}  // namespace

Result<RecordedFile> LoadRecorded(const std::string& path, const std::string& images, size_t limit) {
  ASSIGN_OR_RETURN(const ConversationFile recorded, ConversationFile::Open(path, images));
  RecordedFile file{path, {}, {}};
  ASSIGN_OR_RETURN(file.lines, recorded.ReadAll(limit));
  return file;
}

Status PutBehind(size_t count, RecordedFile* file) {
  const std::vector<ConversationLine> own = file->lines;
  if (count >= own.size()) {
    return InvalidArgument(fmt::format("{} holds {} conversations, so that none has {} others before it",
                                       file->path, own.size(), count));
  }
  const auto is_system = [](const Json& message) {
    return message.is_object() && message.value("role", Json()) == "system";
  };
  file->history.assign(own.size(), 0);
  for (size_t i = 0; i < own.size(); ++i) {
    Json messages = Json::array();
    for (const Json& message : own[i].messages) {
      if (is_system(message)) messages.push_back(message);
    }
    for (size_t before = count; before > 0; --before) {
      for (const Json& message : own[(i + own.size() - before) % own.size()].messages) {
        if (!is_system(message)) messages.push_back(message);
      }
    }
    file->history[i] = messages.size();
    for (const Json& message : own[i].messages) {
      if (!is_system(message)) messages.push_back(message);
    }
    file->lines[i].messages = std::move(messages);
  }
  return OkStatus();
}

Result<RecordedConversation> PrepareRecorded(const ServedModel& model, const RecordedFile& file,
                                             size_t line) {
  const ConversationLine& own = file.lines[line];
  RecordedConversation recorded;
  recorded.id = own.id != own.where ? own.id : fmt::format("#{}", line + 1);
  const auto fail = [&](const Status& status, const std::string& where = "") {
    return Status(status.code(), fmt::format("{}, conversation {} ({}){}: {}", file.path, line + 1,
                                             recorded.id, where, status.message()));
  };
  if (!model.chat_template) {
    return fail(InvalidArgument("model " + model.name + " has no chat template to render it with"));
  }
  const Result<Conversation> conversation = ParseConversation(own.messages, own.tools);
  if (!conversation.ok()) return fail(conversation.status());
  const auto images = LoadImages(model, *conversation, ImageFromFiles(own.images));
  if (!images.ok()) return fail(images.status());
  const Renderer renderer{model, *images, *conversation};
  const size_t first = file.history.empty() ? 1 : std::max<size_t>(1, file.history[line]);
  for (size_t m = first; m < conversation->messages.size(); ++m) {
    if (conversation->messages[m].role != Role::kAssistant) continue;
    Result<RecordedStep> step = MakeStep(renderer, m);
    const std::string where = fmt::format(", messages[{}]", m);
    if (!step.ok()) return fail(step.status(), where);
    recorded.longest = std::max(recorded.longest, step->length());
    if (recorded.longest > model.config.text.max_position_embeddings) {
      return fail(
          InvalidArgument(fmt::format("the conversation has {} tokens there, the model takes {}; cut it",
                                      recorded.longest, model.config.text.max_position_embeddings)),
          where);
    }
    recorded.steps.push_back(std::move(*step));
  }
  if (recorded.steps.empty()) return fail(InvalidArgument("the assistant says nothing in it"));
  return recorded;
}

}  // namespace triaxial
