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
//   number           i32 [num_rows]              x (if common)
//   rows             byte [num_rows, row_bytes]  x         x        x          x
//                    each padded to kRowAlignment bytes
//
// Rows lie in order of tokens, and what belongs to them in the same order. On GPUs the messages of
// a dispatch may have rows in common, of tokens that go to all other ranks; then these lie behind
// the others, in each part of a message, and `number` says where a row is in order of tokens.
//
// `local_expert` is the expert's number on the destination, -1 for an expert that lives elsewhere.
// `position` counts the rows of this (source, expert) pair in order of (token, k): the sender knows
// it, so that the receiver needs no atomics and the order is fixed.

#ifndef JAX_SM_FREE_CC_LAYOUT_H_
#define JAX_SM_FREE_CC_LAYOUT_H_

#include <cstddef>
#include <cstdint>

#include "cc/config.h"
#include "cc/routing.h"

namespace jax_sm_free {

inline constexpr int64_t kPartAlignment = 64;
inline constexpr int64_t kRowAlignment = 16;  // the widest load and store of a GPU thread

// What a round carries. A forward kind and its mirrored backward kind travel in opposite
// directions.
enum class Kind : int32_t { kDispatch, kCombine, kDispatchBackward, kCombineBackward };
inline constexpr int kNumKinds = 4;

const char* KindName(Kind kind);

struct MessageHeader {
  int32_t kind = 0;          // Kind
  int32_t num_rows = 0;      // token rows
  int64_t row_bytes = 0;     // bytes of each
  int64_t first_part = 0;    // rows that come ahead of the others, where messages come in parts
  int64_t num_tokens = 0;    // of which the sender chose these rows, where it keeps its own
  int32_t num_common = 0;    // rows that are the same in all messages to other ranks
  int32_t first_common = 0;  // of these, the ones in the first part
  int64_t unused[3] = {};
};
static_assert(sizeof(MessageHeader) == kPartAlignment);

// Byte offsets from the start of a message.
struct MessageLayout {
  int64_t rows_per_expert = 0;
  int64_t local_expert = 0;
  int64_t position = 0;
  int64_t weight = 0;
  int64_t number = 0;
  int64_t rows = 0;
  int64_t row_stride = 0;  // from one row to the next
  int64_t total = 0;
};

// Host and device code: constexpr, so that kernels call the same function.
constexpr MessageLayout LayoutOf(const Config& config, const MessageHeader& header) {
  const Kind kind = static_cast<Kind>(header.kind);
  const bool routed = kind == Kind::kDispatch;
  const bool weighted = routed || kind == Kind::kDispatchBackward;
  const int64_t entry_bytes = int64_t{header.num_rows} * config.top_k * int64_t{sizeof(int32_t)};
  const int64_t expert_bytes = config.num_local_experts() * int64_t{sizeof(int32_t)};

  MessageLayout layout;
  layout.row_stride = RoundUp(header.row_bytes, kRowAlignment);
  layout.rows_per_expert = sizeof(MessageHeader);
  layout.local_expert =
      layout.rows_per_expert + (routed ? RoundUp(expert_bytes, kPartAlignment) : 0);
  layout.position = layout.local_expert + (routed ? RoundUp(entry_bytes, kPartAlignment) : 0);
  layout.weight = layout.position + (routed ? RoundUp(entry_bytes, kPartAlignment) : 0);
  layout.number = layout.weight + (weighted ? RoundUp(entry_bytes, kPartAlignment) : 0);
  const int64_t number_bytes = int64_t{header.num_rows} * int64_t{sizeof(int32_t)};
  layout.rows = layout.number + (header.num_common > 0 ? RoundUp(number_bytes, kPartAlignment) : 0);
  layout.total = layout.rows + RoundUp(header.num_rows * layout.row_stride, kPartAlignment);
  return layout;
}

// Bytes of the largest message of this configuration, whatever its kind: a dispatch has every part
// that any kind has.
constexpr int64_t MaxMessageBytes(const Config& config) {
  MessageHeader header;
  header.kind = static_cast<int32_t>(Kind::kDispatch);
  header.num_rows = config.max_tokens;
  header.row_bytes = config.row_bytes;
  header.num_common = config.max_tokens;
  return LayoutOf(config, header).total;
}

}  // namespace jax_sm_free

#endif  // JAX_SM_FREE_CC_LAYOUT_H_
