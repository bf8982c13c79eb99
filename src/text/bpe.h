// Byte pair encoding of one piece: neighbours are merged by rank, the leftmost first among equals.
#ifndef TRIAXIAL_TEXT_BPE_H_
#define TRIAXIAL_TEXT_BPE_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>
#include <vector>

namespace triaxial {

struct Merge {
  int32_t left = 0;
  int32_t right = 0;
  int32_t result = 0;
};

class Bpe {
 public:
  Bpe() = default;
  // `bytes`: the token of every byte. `merges` in order of rank; of equal pairs the last one counts.
  Bpe(const std::array<int32_t, 256>& bytes, const std::vector<Merge>& merges);

  // Appends the tokens of `piece`, in time n log n.
  void Append(std::string_view piece, std::vector<int32_t>* ids) const;

 private:
  struct Slot {
    uint64_t pair = 0;
    uint32_t rank = 0;
    int32_t result = 0;
  };
  static uint64_t Pair(int32_t left, int32_t right) {
    return static_cast<uint64_t>(static_cast<uint32_t>(left)) << 32 | static_cast<uint32_t>(right);
  }
  size_t Home(uint64_t pair) const { return (pair * 0x9E3779B97F4A7C15u) >> shift_; }
  // The slot of the pair, or of a hole with rank kNoRank.
  const Slot& Find(int32_t left, int32_t right) const;
  void AppendShort(std::string_view piece, std::vector<int32_t>* ids) const;
  void AppendLong(std::string_view piece, std::vector<int32_t>* ids) const;

  std::array<int32_t, 256> bytes_{};
  std::vector<Slot> slots_;  // open addressing, at most half full
  int shift_ = 63;
};

}  // namespace triaxial

#endif  // TRIAXIAL_TEXT_BPE_H_
