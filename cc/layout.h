// Every byte offset of every region, in one place.
//
// A message carries the rows of one rank for another rank. Each part of a message starts at a
// multiple of kPartAlignment bytes. An exchange that does not need a part leaves it out:
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
// Rows are in the order of their tokens. So are the entries that belong to rows. There is one
// exception: on GPUs, the messages of a dispatch may have common rows, which are those of tokens
// that go to all other ranks. Common rows lie behind the other rows of each part of a message, and
// `number` says where a row is in the order of tokens.
//
// `local_expert` is the number of the expert on the destination rank; -1 for an expert of another
// rank. `position` counts the rows from this source to this expert, in the order of (token, k). The
// sender computes it, so that the receiver needs no atomics and the order of rows is fixed.

#ifndef JAX_SM_FREE_CC_LAYOUT_H_
#define JAX_SM_FREE_CC_LAYOUT_H_

#include <cstddef>
#include <cstdint>

#include "cc/config.h"
#include "cc/routing.h"

namespace jax_sm_free {

inline constexpr int64_t kPartAlignment = 64;
inline constexpr int64_t kRowAlignment = 16;  // bytes of the widest load and store of a GPU thread

// What an exchange carries. A backward kind goes in the opposite direction of its forward kind.
enum class Kind : int32_t { kDispatch, kCombine, kDispatchBackward, kCombineBackward };
inline constexpr int kNumKinds = 4;

const char* KindName(Kind kind);

struct MessageHeader {
  int32_t kind = 0;          // Kind
  int32_t num_rows = 0;      // token rows
  int64_t row_bytes = 0;     // bytes of each row
  int64_t first_part = 0;    // rows in the first part, where messages are sent in parts
  int64_t num_tokens = 0;    // tokens of the sender, where its own rows are not packed
  int32_t num_common = 0;    // rows that are the same in the messages to all other ranks
  int32_t first_common = 0;  // common rows in the first part
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
  int64_t row_stride = 0;  // bytes from one row to the next
  int64_t total = 0;
};

// Kernels call this function, too: constexpr makes it a function of the device.
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

// Bytes of the largest message of a configuration. The largest kind is a dispatch, because it has
// all parts.
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
