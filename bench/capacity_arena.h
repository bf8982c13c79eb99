// An arena that holds conversations, all at once; equal prefixes are stored once.
#ifndef TRIAXIAL_BENCH_CAPACITY_ARENA_H_
#define TRIAXIAL_BENCH_CAPACITY_ARENA_H_

#include <cstdint>
#include <vector>

#include "base/status.h"
#include "bench/capacity_records.h"
#include "kv/cache.h"
#include "kv/policy.h"

namespace triaxial {

// What an arena holds when all requests are in it.
struct Arena {
  int64_t requests = 0;
  int64_t tokens = 0;        // of all requests
  int64_t found_tokens = 0;  // of those, that a request found when it entered
  KvUsage usage;             // tokens and bytes as stored, each shared block once
  int64_t bytes = 0;         // unit rows in use, in bytes
};

// Enters the requests one after the other, each with prefix lookup and all under one salt, and keeps them.
Result<Arena> HoldAll(const std::vector<const Record*>& records, const Policy& policy,
                      const KvGeometry& geometry);

}  // namespace triaxial

#endif  // TRIAXIAL_BENCH_CAPACITY_ARENA_H_
