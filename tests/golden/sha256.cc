#include "sha256.h"

#include <fmt/format.h>

#include <array>
#include <bit>
#include <cmath>
#include <vector>

namespace triaxial {
namespace {

// The constants are defined as the first 32 bits of the fractional parts of roots of the first primes.
uint32_t FractionBits(long double root) {
  return static_cast<uint32_t>(std::floor((root - std::floor(root)) * 0x1p32L));
}

struct Constants {
  std::array<uint32_t, 64> k;
  std::array<uint32_t, 8> start;

  Constants() {
    int found = 0;
    for (int candidate = 2; found < 64; ++candidate) {
      bool prime = true;
      for (int d = 2; d * d <= candidate; ++d) prime = prime && candidate % d != 0;
      if (!prime) continue;
      k[found] = FractionBits(std::cbrt(static_cast<long double>(candidate)));
      if (found < 8) start[found] = FractionBits(std::sqrt(static_cast<long double>(candidate)));
      ++found;
    }
  }
};

void AddBlock(const Constants& constants, const uint8_t* block, std::array<uint32_t, 8>* state) {
  std::array<uint32_t, 64> w;
  for (int i = 0; i < 16; ++i) {
    const uint8_t* b = block + i * 4;
    w[i] = uint32_t{b[0]} << 24 | uint32_t{b[1]} << 16 | uint32_t{b[2]} << 8 | b[3];
  }
  for (int i = 16; i < 64; ++i) {
    const uint32_t s0 = std::rotr(w[i - 15], 7) ^ std::rotr(w[i - 15], 18) ^ w[i - 15] >> 3;
    const uint32_t s1 = std::rotr(w[i - 2], 17) ^ std::rotr(w[i - 2], 19) ^ w[i - 2] >> 10;
    w[i] = w[i - 16] + s0 + w[i - 7] + s1;
  }
  auto [a, b, c, d, e, f, g, h] = *state;
  for (int i = 0; i < 64; ++i) {
    const uint32_t s1 = std::rotr(e, 6) ^ std::rotr(e, 11) ^ std::rotr(e, 25);
    const uint32_t t1 = h + s1 + ((e & f) ^ (~e & g)) + constants.k[i] + w[i];
    const uint32_t s0 = std::rotr(a, 2) ^ std::rotr(a, 13) ^ std::rotr(a, 22);
    const uint32_t t2 = s0 + ((a & b) ^ (a & c) ^ (b & c));
    h = g, g = f, f = e, e = d + t1;
    d = c, c = b, b = a, a = t1 + t2;
  }
  const uint32_t mixed[8] = {a, b, c, d, e, f, g, h};
  for (int i = 0; i < 8; ++i) (*state)[i] += mixed[i];
}

}  // namespace

std::string Sha256(const uint8_t* data, size_t size) {
  static const Constants constants;
  std::array<uint32_t, 8> state = constants.start;
  const size_t whole = size / 64 * 64;
  for (size_t at = 0; at < whole; at += 64) AddBlock(constants, data + at, &state);
  std::vector<uint8_t> tail(data + whole, data + size);
  tail.push_back(0x80);
  while (tail.size() % 64 != 56) tail.push_back(0);
  for (int shift = 56; shift >= 0; shift -= 8)
    tail.push_back(static_cast<uint8_t>(uint64_t{size} * 8 >> shift));
  for (size_t at = 0; at < tail.size(); at += 64) AddBlock(constants, &tail[at], &state);
  std::string hex;
  for (uint32_t word : state) hex += fmt::format("{:08x}", word);
  return hex;
}

}  // namespace triaxial
