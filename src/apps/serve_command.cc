#include <pthread.h>
#include <signal.h>

#include "apps/commands.h"
#include "apps/terminal.h"
#include "base/log.h"
#include "serve/api.h"
#include "serve/api_keys.h"

namespace triaxial {

Command AddServe(CLI::App* app) {
  struct Flags {
    ModelFlags model;
    HttpOptions http;
    std::string api_key_file;
    double request_timeout = 0;
    double drain_seconds = 30;
    std::string record;
    std::string record_bytes = "256M";
  };
  auto flags = std::make_shared<Flags>();
  CLI::App* command = app->add_subcommand("serve", "OpenAI-compatible server");
  AddCheckpointFlags(command, &flags->model);
  AddPolicyFlags(command, &flags->model);
  AddEngineFlags(command, &flags->model);
  AddServerFlags(command, &flags->model);
  command->add_option("--host", flags->http.host, "Address to listen on; 0.0.0.0 for all")
      ->capture_default_str();
  command->add_option("--port", flags->http.port, "Port to listen on; 0 for any free one")
      ->capture_default_str();
  command->add_option("--api-key-file", flags->api_key_file,
                      "File with one accepted API key a line; no two keys share cached blocks (default: no "
                      "authorization)");
  command
      ->add_option("--request-timeout", flags->request_timeout,
                   "Seconds that a request may take which states no timeout of its own; 0 for any time")
      ->check(CLI::Range(0.0, 86400.0))
      ->capture_default_str();
  command->add_option("--drain-seconds", flags->drain_seconds, "How long SIGTERM waits for running requests")
      ->check(CLI::Range(0.0, 86400.0))
      ->capture_default_str();
  CLI::Option* record = command->add_option(
      "--record", flags->record,
      "File to which finished chats are appended, with all that users wrote and all pictures, one JSON line "
      "for each conversation, for 'tag', 'calibrate', 'eval' and 'replay' (default: none)");
  command->add_option("--record-bytes", flags->record_bytes, "Size of that file at which recording ends")
      ->needs(record)
      ->capture_default_str();
  return [flags]() -> Status {
    // Blocked before any thread starts, so that only sigwait below sees them.
    sigset_t signals;
    sigemptyset(&signals);
    sigaddset(&signals, SIGINT);
    sigaddset(&signals, SIGTERM);
    pthread_sigmask(SIG_BLOCK, &signals, nullptr);
    signal(SIGPIPE, SIG_IGN);

    ApiOptions options;
    options.http = flags->http;
    options.request_timeout = flags->request_timeout;
    options.log_requests = true;
    if (!flags->api_key_file.empty()) {
      ASSIGN_OR_RETURN(options.api_keys, LoadApiKeys(flags->api_key_file));
    }
    if (!flags->record.empty()) {
      const int64_t bytes = ParseBytes(flags->record_bytes);
      if (bytes <= 0) {
        return InvalidArgument("--record-bytes " + flags->record_bytes +
                               " is not a size; give bytes, or a number with K, M, G or T");
      }
      ASSIGN_OR_RETURN(options.recorder, ConversationRecorder::Open(flags->record, bytes));
      spdlog::warn(
          "privacy: every finished chat is recorded in {}, with all texts, pictures and tool results in "
          "full; "
          "tell your users, keep the file safe, and delete it when it has served",
          flags->record);
    }
    ASSIGN_OR_RETURN(ServedModel model, LoadServedModel(flags->model.model, flags->model.tokenizer));
    ASSIGN_OR_RETURN(std::unique_ptr<Engine> engine, StartEngine(flags->model, model));
    const KvGeometry geometry = engine->geometry();
    const std::string name = model.name;
    const int length = engine->max_model_len();
    ASSIGN_OR_RETURN(const std::unique_ptr<ApiServer> server,
                     ApiServer::Start(std::move(model), std::move(engine), std::move(options)));
    spdlog::info("model {}: policy {}, codec {}, up to {} tokens a sequence", name, PolicyOf(flags->model),
                 Name(geometry.codec), Count(length));
    spdlog::info("listening on http://{}:{}/v1 (press Ctrl-C to stop)", flags->http.host, server->port());
    int received = 0;
    sigwait(&signals, &received);
    spdlog::info("stopping: running requests have {} s to finish", flags->drain_seconds);
    server->Shutdown(flags->drain_seconds);
    spdlog::info("stopped");
    return OkStatus();
  };
}

}  // namespace triaxial
