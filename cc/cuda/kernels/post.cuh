// How a send hands over its messages: headers and notices, and orders for the mover.

#ifndef JAX_SM_FREE_CC_CUDA_KERNELS_POST_CUH_
#define JAX_SM_FREE_CC_CUDA_KERNELS_POST_CUH_

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "cc/cuda/kernels/device.cuh"

namespace jax_sm_free::cuda {

// Writes the header of a message, and counts its rows as sent. One thread calls this.
__device__ inline void WriteHeader(const RankView& view, int32_t message,
                                   const MessageHeader& header) {
  *reinterpret_cast<MessageHeader*>(OutMessage(view, view.state->current.slot, message)) = header;
  CountRows(view.state->counters.bytes_sent[EndOf(view, message).rank], header);
}

// Sends the notice of a message, which is its header. This makes everything visible that this block
// wrote into the notice before a barrier: one thread calls it, and its release also covers what the
// other threads wrote.
__device__ inline void SendNotice(const RankView& view, int32_t message) {
  const Current current = view.state->current;
  const OtherEnd& end = EndOf(view, message);
  *reinterpret_cast<MessageHeader*>(Notice(view, end.rank, current.slot, end.message)) =
      HeaderOf(OutMessage(view, current.slot, message));
  StoreRelease(Noticed(view, end.rank, current.slot, end.message), current.sequence);
}

// The order to copy a part of a packed message. The first part includes everything that precedes
// the rows. A message without parts is sent as a last part.
__device__ inline CopyOrder OrderOf(const RankView& view, int32_t number, int part) {
  const Current current = view.state->current;
  const std::byte* message = OutMessage(view, current.slot, number);
  const MessageHeader& header = HeaderOf(message);
  CopyOrder order{};
  order.message = number;
  order.slot = current.slot;
  order.signal = SignalOf(current.sequence, part);
  if (header.kind == kPoisonedKind) {
    order.end = int64_t{sizeof(MessageHeader)};
    order.common = order.end;
    return order;
  }
  const Placing placing = PlacingOf(header);
  const MessageLayout layout = LayoutOf(view.config, header);
  const auto at = [&](int64_t row) { return layout.rows + row * layout.row_stride; };
  order.begin = part == kLastPart && placing.first_part > 0 ? at(placing.first_part) : 0;
  order.end = at(placing.common_end(part));
  order.common = order.end;
  order.common_at = message - view.base[view.rank] + order.end;
  if (placing.num_common > 0) {
    order.common = at(placing.common_begin(part));
    const std::byte* other = CommonMessage(view, current.slot, view.rank);
    const MessageLayout there = LayoutOf(view.config, HeaderOf(other));
    const int64_t row = PlacingOf(HeaderOf(other)).common_begin(part);
    order.common_at = other - view.base[view.rank] + there.rows + row * there.row_stride;
  }
  return order;
}

// Posts parts of packed messages: each lane whose `message` is not -1 posts one. For another rank,
// the mover gets an order, in the order of lanes. For this rank, a signal suffices. All lanes of a
// warp of the watch call this; then the rows are in L2, through which copy engines and peers read.
// The parts of a message must be posted in order.
__device__ inline void PostParts(const RankView& view, int32_t message, int part) {
  const Current current = view.state->current;
  const int lane = threadIdx.x % kWarpSize;
  const bool is_part =
      message >= 0 &&
      (part == kLastPart || HeaderOf(OutMessage(view, current.slot, message)).first_part > 0);
  const OtherEnd end = message >= 0 ? EndOf(view, message) : OtherEnd{};
  // Later kernels of this stream read this.
  if (is_part && end.rank == view.rank) {
    *Signal(view, current.slot, message) = SignalOf(current.sequence, part);
  }
  const bool leaves = is_part && end.rank != view.rank;
  const unsigned leaving = __ballot_sync(kFullWarp, leaves);
  unsigned long long head = 0;
  if (lane == 0) head = atomicAdd(&view.state->mailbox_head, __popc(leaving) + 0ULL);
  head = __shfl_sync(kFullWarp, head, 0);
  if (!leaves) return;
  const CopyOrder order = OrderOf(view, message, part);
  uint32_t words[MailboxEntry::kWords];
  memcpy(words, &order, sizeof(order));
  const uint64_t before = head + __popc(leaving & ((1U << lane) - 1));
  MailboxEntry* entry = view.mailbox + before % kMailboxEntries;
  const uint64_t number = (before + 1) << 32;
  for (int i = 0; i < MailboxEntry::kWords; ++i) StoreRelaxed(entry->words + i, number | words[i]);
  StoreRelaxed(Posted(view, end.rank, current.slot, end.message), order.signal);
}

}  // namespace jax_sm_free::cuda

#endif  // JAX_SM_FREE_CC_CUDA_KERNELS_POST_CUH_
