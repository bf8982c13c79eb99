#include <xxhash.h>

#include <algorithm>
#include <map>
#include <optional>
#include <utility>

#include "replay/recording_readers.h"
#include "serve/served_model.h"
#include "text/chat_template.h"
#include "text/conversation.h"
#include "text/conversation_file.h"

namespace triaxial {
namespace {

// Pictures by their urls; only their headers are read and their bytes hashed.
class Pictures {
 public:
  Pictures(const std::string& directory, const RecordingOptions& options)
      : source_(ImageFromFiles(directory)), options_(options) {}

  Result<std::shared_ptr<const ImagePatches>> Find(const std::string& url) {
    if (const auto known = known_.find(url); known != known_.end()) return known->second;
    Result<std::string> found = source_(url);
    if (!found.ok() && found.status().code() == Code::kNotFound) {
      return NotFound(found.status().message() + "; say where the pictures are by --images");
    }
    ASSIGN_OR_RETURN(const std::string bytes, std::move(found));
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
  const ImageSource source_;
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

// An assistant's message for an answer that the file does not hold.
Message NoAnswer() {
  Message message;
  message.role = Role::kAssistant;
  return message;
}

Result<RecordedSession> ReadSession(const ConversationLine& line, const Conversation& conversation,
                                    StepRenderer* renderer) {
  RecordedSession session;
  session.id = line.id;
  for (size_t i = 1; i < conversation.messages.size(); ++i) {
    if (conversation.messages[i].role != Role::kAssistant) continue;
    Result<RecordedRequest> step = renderer->Render(conversation, i);
    if (!step.ok()) return line.Error(step.status());
    session.steps.push_back(std::move(*step));
  }
  return session;
}

// Requests that follow each other are the steps of one session; the next one says what was answered.
class RequestRun {
 public:
  explicit RequestRun(StepRenderer* renderer) : renderer_(renderer) {}

  Status Add(ConversationLine line, Conversation conversation) {
    if (last_) {
      const auto& messages = conversation.messages;
      const auto answer = std::find_if(messages.rbegin(), messages.rend(),
                                       [](const Message& m) { return m.role == Role::kAssistant; });
      RETURN_IF_ERROR(RenderLast(answer == messages.rend() ? NoAnswer() : *answer));
    } else {
      session_.id = line.id;
    }
    last_.emplace(std::move(line), std::move(conversation));
    return OkStatus();
  }

  // Ends the session and puts it behind the others, if there is one.
  Status End(std::vector<RecordedSession>* sessions) {
    if (!last_) return OkStatus();
    RETURN_IF_ERROR(RenderLast(NoAnswer()));
    last_.reset();
    sessions->push_back(std::exchange(session_, {}));
    return OkStatus();
  }

 private:
  Status RenderLast(Message answer) {
    auto& [line, conversation] = *last_;
    conversation.messages.push_back(std::move(answer));
    Result<RecordedRequest> step = renderer_->Render(conversation, conversation.messages.size() - 1);
    if (!step.ok()) return line.Error(step.status());
    session_.steps.push_back(std::move(*step));
    return OkStatus();
  }

  StepRenderer* renderer_;
  RecordedSession session_;
  std::optional<std::pair<ConversationLine, Conversation>> last_;
};

}  // namespace

Result<std::vector<RecordedSession>> ReadConversations(const std::string& path,
                                                       const RecordingOptions& options) {
  if (options.tokenizer_directory.empty()) {
    return InvalidArgument(path +
                           " holds conversations, which take a tokenizer to count; name the directory of "
                           "a checkpoint's tokenizer.json and chat template by --tokenizer");
  }
  ASSIGN_OR_RETURN(const Tokenizer tokenizer, Tokenizer::Load(options.tokenizer_directory));
  ASSIGN_OR_RETURN(const ChatTemplate chat_template,
                   ChatTemplate::Load(options.tokenizer_directory, tokenizer));
  ASSIGN_OR_RETURN(const ConversationFile file, ConversationFile::Open(path, options.images));
  Pictures pictures(file.images(), options);
  StepRenderer renderer(tokenizer, chat_template, options, &pictures);
  RequestRun requests(&renderer);
  std::vector<RecordedSession> sessions;
  for (size_t i = 0; i < file.size(); ++i) {
    ASSIGN_OR_RETURN(ConversationLine line, file.Read(i));
    ASSIGN_OR_RETURN(Conversation conversation, line.Parse());
    if (line.is_request) {
      RETURN_IF_ERROR(requests.Add(std::move(line), std::move(conversation)));
      continue;
    }
    RETURN_IF_ERROR(requests.End(&sessions));
    ASSIGN_OR_RETURN(RecordedSession session, ReadSession(line, conversation, &renderer));
    if (!session.steps.empty()) sessions.push_back(std::move(session));
  }
  RETURN_IF_ERROR(requests.End(&sessions));
  if (sessions.empty()) return InvalidArgument(path + " holds no conversation with an assistant's answer");
  return sessions;
}

}  // namespace triaxial
