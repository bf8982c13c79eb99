#include <pthread.h>
#include <signal.h>

#include "apps/commands.h"
#include "apps/terminal.h"
#include "base/log.h"
#include "serve/api.h"

namespace triaxial {

Command AddServe(CLI::App* app) {
  struct Flags {
    ModelFlags model;
    HttpOptions http;
    std::string api_key_file;
    double drain_seconds = 30;
  };
  auto flags = std::make_shared<Flags>();
  CLI::App* command = app->add_subcommand("serve", "OpenAI-compatible server");
  AddCheckpointFlags(command, &flags->model);
  AddPolicyFlags(command, &flags->model);
  AddEngineFlags(command, &flags->model);
  command->add_option("--host", flags->http.host, "Address to listen on; 0.0.0.0 for all")
      ->capture_default_str();
  command->add_option("--port", flags->http.port, "Port to listen on; 0 for any free one")
      ->capture_default_str();
  command->add_option("--api-key-file", flags->api_key_file,
                      "File with one accepted API key a line (default: no authorization)");
  command->add_option("--drain-seconds", flags->drain_seconds, "How long SIGTERM waits for running requests")
      ->check(CLI::Range(0.0, 86400.0))
      ->capture_default_str();
  return [flags]() -> Status {
    // Blocked before any thread starts, so that only sigwait below sees them.
    sigset_t signals;
    sigemptyset(&signals);
    sigaddset(&signals, SIGINT);
    sigaddset(&signals, SIGTERM);
    pthread_sigmask(SIG_BLOCK, &signals, nullptr);
    signal(SIGPIPE, SIG_IGN);

    std::vector<std::string> keys;
    if (!flags->api_key_file.empty()) {
      ASSIGN_OR_RETURN(keys, LoadApiKeys(flags->api_key_file));
    }
    ASSIGN_OR_RETURN(ServedModel model, LoadServedModel(flags->model.model, flags->model.tokenizer));
    ASSIGN_OR_RETURN(std::unique_ptr<Engine> engine, StartEngine(flags->model, model));
    const KvGeometry geometry = engine->geometry();
    const std::string name = model.name;
    const int length = engine->max_model_len();
    ASSIGN_OR_RETURN(const std::unique_ptr<ApiServer> server,
                     ApiServer::Start(std::move(model), std::move(engine), flags->http, std::move(keys)));
    spdlog::info("model {}: policy {}, codec {}, up to {} tokens a sequence", name, flags->model.kv_policy,
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
