// SHA-256, by libcrypto, which uses the CPU's SHA instructions where it has them. For identities that nobody
// may be able to forge; against accidents (bit rot, torn writes) XXH3 is enough and several times faster.
#ifndef TRIAXIAL_BASE_SHA256_H_
#define TRIAXIAL_BASE_SHA256_H_

#include <array>
#include <cstdint>
#include <memory>
#include <span>

struct evp_md_ctx_st;

namespace triaxial {

using Sha256Digest = std::array<uint8_t, 32>;

Sha256Digest Sha256Of(std::span<const uint8_t> bytes);

// Of bytes that come in parts: Update any number of times, then Finish once.
class Sha256 {
 public:
  Sha256();
  void Update(std::span<const uint8_t> bytes);
  Sha256Digest Finish();

 private:
  struct Free {
    void operator()(evp_md_ctx_st* context) const;
  };
  std::unique_ptr<evp_md_ctx_st, Free> context_;
};

}  // namespace triaxial

#endif  // TRIAXIAL_BASE_SHA256_H_
