#include "serve/served_model.h"

#include <algorithm>
#include <filesystem>

#include "base/file.h"
#include "serve/base64.h"

namespace triaxial {

Result<ServedModel> LoadServedModel(const std::string& directory, const std::string& tokenizer_directory) {
  std::error_code ignored;
  if (!std::filesystem::is_directory(directory, ignored)) {
    return NotFound(directory +
                    " is no directory; give a checkpoint as Hugging Face has it, with config.json, "
                    "tokenizer.json and weights");
  }
  ServedModel model;
  model.directory = directory;
  model.name = std::filesystem::path(directory).lexically_normal().filename().string();
  if (model.name.empty())
    model.name = std::filesystem::path(directory).lexically_normal().parent_path().filename().string();
  ASSIGN_OR_RETURN(model.config, LoadModelConfig(directory));
  ASSIGN_OR_RETURN(model.generation, LoadGenerationConfig(directory));
  ASSIGN_OR_RETURN(model.preprocessor, LoadPreprocessorConfig(directory));
  const std::string& text_directory = tokenizer_directory.empty() ? directory : tokenizer_directory;
  ASSIGN_OR_RETURN(Tokenizer tokenizer, Tokenizer::Load(text_directory));
  if (tokenizer.vocab_size() > model.config.text.vocab_size) {
    return InvalidArgument(text_directory + "/tokenizer.json has ids up to " +
                           std::to_string(tokenizer.vocab_size() - 1) + ", but the model of " + directory +
                           " has only " + std::to_string(model.config.text.vocab_size) +
                           " embedding rows; use the tokenizer that belongs to the checkpoint");
  }
  model.tokenizer = std::make_unique<Tokenizer>(std::move(tokenizer));
  model.markup = FindMarkup(*model.tokenizer);
  size_t longest = 1;
  for (int32_t id = 0; id < model.tokenizer->vocab_size(); ++id) {
    longest = std::max(longest, model.tokenizer->TokenBytes(id).size());
  }
  model.max_prompt_bytes = longest * static_cast<size_t>(model.config.text.max_position_embeddings);
  Result<ChatTemplate> chat_template = ChatTemplate::Load(text_directory, *model.tokenizer);
  if (chat_template.ok()) {
    model.chat_template = std::move(*chat_template);
  } else if (chat_template.status().code() != Code::kNotFound) {
    return chat_template.status();
  }
  return model;
}

Result<std::string> ImageFromDataUrl(const std::string& url) {
  if (!url.starts_with("data:")) {
    return InvalidArgument(
        "image urls must be data: URLs (data:image/png;base64,...); remote images are not fetched, found '" +
        url.substr(0, 40) + (url.size() > 40 ? "...'" : "'"));
  }
  const size_t comma = url.find(',');
  if (comma == std::string::npos || !std::string_view(url).substr(0, comma).ends_with(";base64")) {
    return InvalidArgument("an image data: URL must have the form data:image/png;base64,...");
  }
  std::optional<std::string> bytes = DecodeBase64(std::string_view(url).substr(comma + 1));
  if (!bytes) return InvalidArgument("the base64 part of an image data: URL is malformed");
  return std::move(*bytes);
}

ImageSource ImageFromFiles(std::string directory) {
  return [directory = std::move(directory)](const std::string& url) -> Result<std::string> {
    if (url.starts_with("data:")) return ImageFromDataUrl(url);
    const std::string path = url.starts_with("file://") ? url.substr(7) : url;
    const std::filesystem::path full = std::filesystem::path(directory) / path;
    return ReadFile(full.string(), static_cast<size_t>(ImageLimits{}.max_bytes));
  };
}

Result<Prompt> BuildChatPrompt(const ServedModel& model, const Conversation& conversation,
                               const TemplateOptions& options, const ImageSource& source) {
  if (!model.chat_template) {
    return InvalidArgument("model " + model.name +
                           " has no chat template; use /v1/completions with a raw prompt");
  }
  size_t text_bytes = 0;
  for (const std::string& tool : conversation.tools) text_bytes += tool.size();
  for (const Message& message : conversation.messages) {
    text_bytes += message.reasoning_content.value_or("").size();
    for (const ToolCall& call : message.tool_calls) text_bytes += call.arguments.size();
    for (const ContentPart& part : message.content) {
      if (part.kind == ContentPart::Kind::kText) text_bytes += part.text.size();
    }
  }
  RETURN_IF_ERROR(CheckPromptBytes(model, text_bytes));
  std::vector<std::shared_ptr<const ImagePatches>> images;
  for (size_t m = 0; m < conversation.messages.size(); ++m) {
    for (const ContentPart& part : conversation.messages[m].content) {
      if (part.kind != ContentPart::Kind::kImage) continue;
      const auto fail = [&](const Status& status) {
        return Status(status.code(), "messages[" + std::to_string(m) + "], image " +
                                         std::to_string(images.size()) + ": " + status.message());
      };
      if (!model.config.vision) return fail(InvalidArgument("model " + model.name + " reads text only"));
      const Result<std::string> bytes = source(part.text);
      if (!bytes.ok()) return fail(bytes.status());
      Result<ImagePatches> patches = PreprocessImage(*bytes, model.image_limits, model.preprocessor);
      if (!patches.ok()) return fail(patches.status());
      images.push_back(std::make_shared<const ImagePatches>(std::move(*patches)));
    }
  }
  return model.chat_template->Render(conversation, images, model.preprocessor.merge_size, options);
}

Status CheckPromptBytes(const ServedModel& model, size_t bytes) {
  if (bytes <= model.max_prompt_bytes) return OkStatus();
  return InvalidArgument("the prompt has " + std::to_string(bytes) +
                         " bytes of text, which cannot fit the model's " +
                         std::to_string(model.config.text.max_position_embeddings) + " tokens; shorten it");
}

Prompt BuildRawPrompt(const ServedModel& model, std::vector<int32_t> tokens) {
  Prompt prompt;
  prompt.spans = ScanSpans(tokens, model.markup);
  prompt.tokens = std::move(tokens);
  return prompt;
}

}  // namespace triaxial
