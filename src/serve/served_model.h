// Everything about a checkpoint except its weights: what turns requests into prompts and tokens into answers.
#ifndef TRIAXIAL_SERVE_SERVED_MODEL_H_
#define TRIAXIAL_SERVE_SERVED_MODEL_H_

#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "base/status.h"
#include "io/image_processor.h"
#include "io/model_config.h"
#include "text/chat_template.h"
#include "text/conversation.h"
#include "text/prompt.h"
#include "text/token_tagger.h"
#include "text/tokenizer.h"

namespace triaxial {

struct ServedModel {
  std::string name;  // the directory's last component
  std::string directory;
  ModelConfig config;
  GenerationConfig generation;
  PreprocessorConfig preprocessor;
  ImageLimits image_limits;
  std::unique_ptr<Tokenizer> tokenizer;
  std::optional<ChatTemplate>
      chat_template;  // absent if the checkpoint carries none: chat requests then answer 400
  MarkupIds markup;
  // No text longer than this fits the model, whatever its tokens: it is refused before it is tokenized.
  size_t max_prompt_bytes = 0;
};

// Reads the JSON files of `directory`; tokenizer and template from `tokenizer_directory` ("" for the same).
// Thread-safe to use once loaded.
Result<ServedModel> LoadServedModel(const std::string& directory, const std::string& tokenizer_directory);

// Yields the bytes behind an image url of a conversation.
using ImageSource = std::function<Result<std::string>(const std::string& url)>;
// Accepts data: URLs only; the error for others says so.
Result<std::string> ImageFromDataUrl(const std::string& url);
// Accepts data: URLs and paths relative to `directory`; for local tools, never for the server.
ImageSource ImageFromFiles(std::string directory);

// Fetches and preprocesses the images, renders the template. Errors name the message or image that is at
// fault.
Result<Prompt> BuildChatPrompt(const ServedModel& model, const Conversation& conversation,
                               const TemplateOptions& options, const ImageSource& source);
// InvalidArgument if a text of `bytes` cannot fit the model.
Status CheckPromptBytes(const ServedModel& model, size_t bytes);

// A raw prompt: special tokens recognized, spans by scanning.
Prompt BuildRawPrompt(const ServedModel& model, std::vector<int32_t> tokens);

}  // namespace triaxial

#endif  // TRIAXIAL_SERVE_SERVED_MODEL_H_
