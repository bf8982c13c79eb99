// What attention read in one conversation and what `calibrate` made of it, for other implementations to
// check.
#ifndef TRIAXIAL_APPS_CALIBRATE_DUMP_H_
#define TRIAXIAL_APPS_CALIBRATE_DUMP_H_

#include <string>

#include "apps/calibrate_flags.h"

namespace triaxial {

// Measures the first chosen conversation and writes into `directory`: dump.json (geometry, clips, tags, D)
// and for each layer q.LAYER.f32, k.LAYER.f32, v.LAYER.f32, little-endian [tokens][heads][head_dim].
Status DumpConversation(const std::string& directory, Measurement* measurement);

}  // namespace triaxial

#endif  // TRIAXIAL_APPS_CALIBRATE_DUMP_H_
