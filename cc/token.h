// What a send passes to its recv through the program: float32 values, all of them small integers,
// so that they are exact. Two tokens that were added to each other are no longer a token.

#ifndef JAX_SM_FREE_CC_TOKEN_H_
#define JAX_SM_FREE_CC_TOKEN_H_

#include <cstdint>

namespace jax_sm_free {

inline constexpr int kTokenSize = 8;

// Every word is smaller than kTokenWordSize. Float32 is exact up to there.
enum TokenWord : int {
  kMagicWord,
  kLowWord,   // sequence number mod kTokenWordSize
  kHighWord,  // sequence number / kTokenWordSize
  kSlotWord,
  kKindWord,
  kRankWord,
  kBufferWord,
};
inline constexpr float kTokenMagic = 5439821.0F;
inline constexpr int64_t kTokenWordSize = int64_t{1} << 24;

// The content of a token.
struct Token {
  int64_t sequence = 0;
  int64_t slot = 0;
  int64_t kind = 0;
  int64_t rank = 0;
  int64_t buffer = 0;  // TokenBuffer of its id
};

// The id of a buffer as its tokens hold it.
constexpr int64_t TokenBuffer(int64_t id) { return id % kTokenWordSize; }

constexpr void WriteToken(const Token& token, float* words) {
  const int64_t high = token.sequence / kTokenWordSize;
  words[kMagicWord] = kTokenMagic;
  words[kLowWord] = static_cast<float>(token.sequence % kTokenWordSize);
  words[kHighWord] = static_cast<float>(high);
  words[kSlotWord] = static_cast<float>(token.slot);
  words[kKindWord] = static_cast<float>(token.kind);
  words[kRankWord] = static_cast<float>(token.rank);
  words[kBufferWord] = static_cast<float>(token.buffer);
  for (int i = kBufferWord + 1; i < kTokenSize; ++i) words[i] = 0;
}

// Whether the words are a token.
constexpr bool IsToken(const float* words) { return words[kMagicWord] == kTokenMagic; }

// `words` must be a token.
constexpr Token ReadToken(const float* words) {
  return {.sequence = static_cast<int64_t>(words[kHighWord]) * kTokenWordSize +
                      static_cast<int64_t>(words[kLowWord]),
          .slot = static_cast<int64_t>(words[kSlotWord]),
          .kind = static_cast<int64_t>(words[kKindWord]),
          .rank = static_cast<int64_t>(words[kRankWord]),
          .buffer = static_cast<int64_t>(words[kBufferWord])};
}

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_CC_TOKEN_H_
