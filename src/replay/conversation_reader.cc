#include <xxhash.h>

#include <algorithm>
#include <filesystem>
#include <map>

#include "base/file.h"
#include "replay/recording_readers.h"
#include "text/chat_template.h"
#include "text/conversation.h"

namespace triaxial {
namespace {

// Pictures by their files; only their headers are read and their bytes hashed.
class Pictures {
 public:
  Pictures(std::filesystem::path directory, const RecordingOptions& options)
      : directory_(std::move(directory)), options_(options) {}

  Result<std::shared_ptr<const ImagePatches>> Find(const std::string& url) {
    if (const auto known = known_.find(url); known != known_.end()) return known->second;
    if (url.starts_with("data:")) {
      return InvalidArgument("a picture is a data: URL; replay reads pictures from files");
    }
    const std::filesystem::path path = directory_ / (url.starts_with("file://") ? url.substr(7) : url);
    ASSIGN_OR_RETURN(const std::string bytes,
                     ReadFile(path.string(), static_cast<size_t>(ImageLimits{}.max_bytes)));
    ASSIGN_OR_RETURN(const ImageSize size, ReadImageSize(bytes, ImageLimits{}));
    ASSIGN_OR_RETURN(const ImageSize grid, GridOf(size, options_.preprocessor));
    auto patches = std::make_shared<ImagePatches>();
    patches->grid_h = grid.height;
    patches->grid_w = grid.width;
    const XXH128_hash_t hash = XXH3_128bits(bytes.data(), bytes.size());
    patches->hash_lo = hash.low64;
    patches->hash_hi = hash.high64;
    return known_.emplace(url, std::move(patches)).first->second;
  }

 private:
  std::filesystem::path directory_;
  const RecordingOptions& options_;
  std::map<std::string, std::shared_ptr<const ImagePatches>> known_;
};

// Renders the steps of one conversation after the other.
class StepRenderer {
 public:
  StepRenderer(const Tokenizer& tokenizer, const ChatTemplate& chat_template, const RecordingOptions& options,
               Pictures* pictures)
      : template_(chat_template),
        im_end_(FindMarkup(tokenizer).im_end),
        options_(options),
        pictures_(pictures) {}

  Result<RecordedRequest> Render(const Conversation& conversation, size_t answer) {
    Conversation head{.messages = {}, .tools = conversation.tools};
    const auto begin = conversation.messages.begin();
    head.messages.assign(begin, begin + static_cast<std::ptrdiff_t>(answer));
    ASSIGN_OR_RETURN(const Prompt prompt, RenderPrompt(head, /*add_generation_prompt=*/true));
    head.messages.push_back(conversation.messages[answer]);
    ASSIGN_OR_RETURN(const Prompt whole, RenderPrompt(head, /*add_generation_prompt=*/false));

    // What the model would have generated: all behind the prompt, up to the end of its message.
    const size_t shared = static_cast<size_t>(
        std::mismatch(prompt.tokens.begin(), prompt.tokens.end(), whole.tokens.begin(), whole.tokens.end())
            .first -
        prompt.tokens.begin());
    size_t end = whole.tokens.size();
    while (end > shared + 1 && whole.tokens[end - 1] != im_end_) --end;

    auto step = std::make_shared<RenderedStep>();
    step->tokens = prompt.tokens;
    step->tokens.insert(step->tokens.end(), whole.tokens.begin() + static_cast<std::ptrdiff_t>(shared),
                        whole.tokens.begin() + static_cast<std::ptrdiff_t>(end));
    const auto prompt_tokens = static_cast<int32_t>(prompt.tokens.size());
    for (const Tag& tag : TagTokens(prompt.spans, prompt_tokens)) {
      step->tags.push_back(static_cast<uint8_t>(tag.index()));
    }
    const std::vector<Tag> tags = TagTokens(whole.spans, static_cast<int32_t>(whole.tokens.size()));
    for (size_t i = shared; i < end; ++i) step->tags.push_back(static_cast<uint8_t>(tags[i].index()));
    for (const PromptImage& image : prompt.images) {
      step->pictures.push_back({image.begin, image.tokens, image.patches->hash_lo, image.patches->hash_hi});
    }
    step->system_tokens = SystemTokens(prompt, head);

    RecordedRequest request;
    request.prompt_tokens = prompt_tokens;
    request.output_tokens = static_cast<int32_t>(step->tokens.size()) - prompt_tokens;
    if (request.output_tokens == 0)
      return InvalidArgument("the chat template renders nothing of this message");
    request.rendered = std::move(step);
    return request;
  }

 private:
  Result<Prompt> RenderPrompt(const Conversation& conversation, bool add_generation_prompt) {
    std::vector<std::shared_ptr<const ImagePatches>> images;
    for (const Message& message : conversation.messages) {
      for (const ContentPart& part : message.content) {
        if (part.kind != ContentPart::Kind::kImage) continue;
        if (!options_.config.vision) {
          return InvalidArgument("it has pictures, but the model reads text only; give a Qwen3-VL model");
        }
        ASSIGN_OR_RETURN(std::shared_ptr<const ImagePatches> patches, pictures_->Find(part.text));
        images.push_back(std::move(patches));
      }
    }
    return template_.Render(conversation, images, options_.preprocessor.merge_size,
                            {.add_generation_prompt = add_generation_prompt});
  }

  // Tokens before the first message that is no system message.
  static int32_t SystemTokens(const Prompt& prompt, const Conversation& conversation) {
    for (const TagSpan& span : prompt.spans) {
      if (span.message < 0) continue;
      if (conversation.messages[static_cast<size_t>(span.message)].role != Role::kSystem) return span.begin;
    }
    return 0;
  }

  const ChatTemplate& template_;
  int32_t im_end_;
  const RecordingOptions& options_;
  Pictures* pictures_;
};

Result<RecordedSession> ReadSession(std::string_view line, const std::string& what, StepRenderer* renderer) {
  ASSIGN_OR_RETURN(const Json json, ParseJson(line, what));
  const auto messages = json.is_object() ? json.find("messages") : json.end();
  if (!json.is_object() || messages == json.end()) {
    return InvalidArgument(what + " has no messages; each line must be one OpenAI conversation");
  }
  const auto in_line = [&](const Status& status) {
    return Status(status.code(), what + ": " + status.message());
  };
  const auto tools = json.find("tools");
  const Result<Conversation> conversation =
      ParseConversation(*messages, tools == json.end() ? Json(nullptr) : *tools);
  if (!conversation.ok()) return in_line(conversation.status());
  RecordedSession session;
  const auto id = json.find("id");
  session.id = id != json.end() && id->is_string() ? id->get<std::string>() : what;
  for (size_t i = 1; i < conversation->messages.size(); ++i) {
    if (conversation->messages[i].role != Role::kAssistant) continue;
    Result<RecordedRequest> step = renderer->Render(*conversation, i);
    if (!step.ok()) return in_line(step.status());
    session.steps.push_back(std::move(*step));
  }
  return session;
}

}  // namespace

Result<std::vector<RecordedSession>> ReadConversations(std::string_view text, const std::string& path,
                                                       const RecordingOptions& options) {
  if (options.tokenizer_directory.empty()) {
    return InvalidArgument(path +
                           " holds conversations, which take a tokenizer to count; name the directory of "
                           "a checkpoint's tokenizer.json and chat template by --tokenizer");
  }
  ASSIGN_OR_RETURN(const Tokenizer tokenizer, Tokenizer::Load(options.tokenizer_directory));
  ASSIGN_OR_RETURN(const ChatTemplate chat_template,
                   ChatTemplate::Load(options.tokenizer_directory, tokenizer));
  const std::filesystem::path file(path);
  Pictures pictures(options.images.empty() ? file.parent_path() : std::filesystem::path(options.images),
                    options);
  StepRenderer renderer(tokenizer, chat_template, options, &pictures);
  std::vector<RecordedSession> sessions;
  RETURN_IF_ERROR(ForEachLine(text, path, [&](std::string_view line, const std::string& what) -> Status {
    ASSIGN_OR_RETURN(RecordedSession session, ReadSession(line, what, &renderer));
    if (!session.steps.empty()) sessions.push_back(std::move(session));
    return OkStatus();
  }));
  if (sessions.empty()) return InvalidArgument(path + " holds no conversation with an assistant's answer");
  return sessions;
}

}  // namespace triaxial
