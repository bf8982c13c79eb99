#include <cstdio>

#include "apps/commands.h"
#include "apps/terminal.h"
#include "kv/policy.h"

namespace triaxial {
namespace {

void Show(const Policy& policy) {
  std::printf("%s%s%s\n", Bold(policy.name).c_str(), policy.description.empty() ? "" : ": ",
              policy.description.c_str());
  if (policy.recent_window > 0) std::printf("the newest %d tokens stay bf16\n", policy.recent_window);
  std::puts("");
  std::vector<std::string> header = {"modal/semantic"};
  for (int t = kTemporals - 1; t >= 0; --t) header.emplace_back(Name(static_cast<Temporal>(t)));
  Table table(std::move(header));
  for (int m = 0; m < kModals; ++m) {
    for (int s = 0; s < kSemantics; ++s) {
      Tag tag{Temporal::kCurrent, static_cast<Modal>(m), static_cast<Semantic>(s)};
      std::vector<std::string> row = {std::string(Name(tag.modal)) + "/" +
                                      Paint(tag.semantic, Name(tag.semantic))};
      for (int t = kTemporals - 1; t >= 0; --t) {
        tag.temporal = static_cast<Temporal>(t);
        row.push_back(Paint(policy.FormatOf(tag), Name(policy.FormatOf(tag))));
      }
      table.Add(std::move(row));
    }
  }
  table.Print();
}

}  // namespace

Command AddPolicy(CLI::App* app) {
  struct Flags {
    std::string policy;
    bool json = false;
  };
  auto flags = std::make_shared<Flags>();
  CLI::App* command = app->add_subcommand("policy", "Look at and validate KV policies");
  command->require_subcommand(1);
  CLI::App* show = command->add_subcommand("show", "The format of every tag, as a table over the three axes");
  show->add_option("policy", flags->policy, "Built-in name or JSON file")->required();
  show->add_flag("--json", flags->json, "Print the policy file");
  CLI::App* check = command->add_subcommand("check", "Validate a policy file; exit code 0 if it is good");
  check->add_option("policy", flags->policy, "Built-in name or JSON file")->required();
  return [flags, show]() -> Status {
    ASSIGN_OR_RETURN(const Policy policy, LoadPolicy(flags->policy));
    if (!show->parsed()) {
      std::printf("%s is valid: %zu rules, every tag has a format\n", flags->policy.c_str(),
                  policy.rules.size());
    } else if (flags->json) {
      std::puts(PolicyToJson(policy).dump(2).c_str());
    } else {
      Show(policy);
    }
    return OkStatus();
  };
}

}  // namespace triaxial
