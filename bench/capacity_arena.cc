#include "bench/capacity_arena.h"

#include <algorithm>
#include <span>

namespace triaxial {
namespace {

constexpr size_t kStepTokens = 512;  // a prefill chunk

}  // namespace

Result<Arena> HoldAll(const std::vector<const Record*>& records, const Policy& policy,
                      const KvGeometry& geometry) {
  int64_t blocks = 0;
  for (const Record* record : records) {
    blocks += static_cast<int64_t>(record->tokens.size()) / kBlockTokens + 2;
  }
  KvCache cache(geometry, blocks * UnitsOf(geometry, Format::kBf16),
                ResolveNeeds(policy, geometry, /*two_bit_keys=*/true, /*budget_bits=*/0));
  Arena arena;
  KvAppend append;
  for (const Record* record : records) {
    const std::span<const KvToken> tokens = record->tokens;
    const SequenceId id = cache.CreateSequence({.salt = {}, .tokens = tokens});
    ++arena.requests;
    arena.tokens += static_cast<int64_t>(tokens.size());
    arena.found_tokens += cache.MatchedTokens(id);
    while (static_cast<size_t>(cache.Length(id)) < tokens.size()) {
      const auto begin = static_cast<size_t>(cache.Length(id));
      const size_t count =
          std::min({kStepTokens, tokens.size() - begin, static_cast<size_t>(cache.NextStop(id))});
      RETURN_IF_ERROR(cache.Append(id, tokens.subspan(begin, count), &append));
      cache.FinishStep();
    }
  }
  RETURN_IF_ERROR(cache.CheckIntegrity());
  arena.usage = cache.Usage();
  arena.bytes = (cache.total_rows() - cache.free_rows()) * UnitRowBytes(geometry) * geometry.num_layers;
  if (arena.bytes != arena.usage.total_bytes()) {
    return Internal("the arena that holds all requests and its usage report disagree");
  }
  return arena;
}

}  // namespace triaxial
