// The cache, explained: JSON of GET /v1/kv and GET /v1/kv/{id}. No word of what tokens say.
#ifndef TRIAXIAL_SERVE_KV_PAGE_H_
#define TRIAXIAL_SERVE_KV_PAGE_H_

#include <string>
#include <vector>

#include "base/json.h"
#include "engine/engine.h"

namespace triaxial {

// The whole cache: bytes and tokens by format, price, demotions, evictions, blocks that sleep.
Json KvSnapshotJson(const EngineSnapshot& snapshot);
// The blocks of one answer, in order of position, and their totals by format.
Json KvBlocksJson(const std::string& id, const std::vector<KvBlock>& blocks, const KvGeometry& geometry);

}  // namespace triaxial

#endif  // TRIAXIAL_SERVE_KV_PAGE_H_
