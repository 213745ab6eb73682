// What a send hands to its recv through the program: float32 values, all small integers, so that
// they are exact, and so that two tokens added to each other are no token any more.

#ifndef JAX_SM_FREE_CC_TOKEN_H_
#define JAX_SM_FREE_CC_TOKEN_H_

#include <cstdint>

namespace jax_sm_free {

inline constexpr int kTokenSize = 8;

// Every word stays below kTokenWordSize, up to which float32 is exact.
enum TokenWord : int {
  kMagicWord,
  kLowWord,   // sequence number mod kTokenWordSize
  kHighWord,  // and the rest of it
  kSlotWord,
  kKindWord,
  kRankWord,
  kBufferWord,  // buffer id mod kTokenWordSize
};
inline constexpr float kTokenMagic = 5439821.0F;
inline constexpr int64_t kTokenWordSize = int64_t{1} << 24;

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_CC_TOKEN_H_
