// Every byte offset of every region, in one place.
//
// A message carries one rank's rows for one other rank. Its parts, each starting on a boundary of
// kPartAlignment bytes and each left out when the exchange has no use for it:
//
//   part             type                        dispatch  combine  dispatch   combine
//                                                                   backward   backward
//   header           MessageHeader               x         x        x          x
//   rows_per_expert  i32 [num_local_experts]     x
//   local_expert     i32 [num_rows, top_k]       x
//   position         i32 [num_rows, top_k]       x
//   weight           f32 [num_rows, top_k]       x                  x (its gradient)
//   rows             byte [num_rows, row_bytes]  x         x        x          x
//
// `local_expert` is the expert's number on the destination, -1 for an expert that lives elsewhere.
// `position` counts the rows of this (source, expert) pair in order of (token, k): the sender knows
// it, so that the receiver needs no atomics and the order is fixed.

#ifndef JAX_SM_FREE_CC_LAYOUT_H_
#define JAX_SM_FREE_CC_LAYOUT_H_

#include <cstddef>
#include <cstdint>

#include "cc/config.h"

namespace jax_sm_free {

inline constexpr int64_t kPartAlignment = 64;

// What a round carries. A forward kind and its mirrored backward kind travel in opposite
// directions.
enum class Kind : int32_t { kDispatch, kCombine, kDispatchBackward, kCombineBackward };

const char* KindName(Kind kind);

struct MessageHeader {
  int32_t kind = 0;       // Kind
  int32_t num_rows = 0;   // token rows
  int64_t row_bytes = 0;  // bytes of each
  int64_t unused[6] = {};
};
static_assert(sizeof(MessageHeader) == kPartAlignment);

// Byte offsets from the start of a message.
struct MessageLayout {
  int64_t rows_per_expert = 0;
  int64_t local_expert = 0;
  int64_t position = 0;
  int64_t weight = 0;
  int64_t rows = 0;
  int64_t total = 0;
};

MessageLayout LayoutOf(const Config& config, const MessageHeader& header);

// Bytes of the largest message of this configuration, whatever its kind.
int64_t MaxMessageBytes(const Config& config);

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_CC_LAYOUT_H_
