// How a sender hands its messages over: headers and notices, and orders to the mover.

#ifndef JAX_SM_FREE_CC_CUDA_POST_CUH_
#define JAX_SM_FREE_CC_CUDA_POST_CUH_

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "cc/cuda/device.cuh"

namespace jax_sm_free::cuda {

// Writes the header of the message for `dst`. By one thread.
__device__ inline void WriteHeader(const RankView& view, int32_t dst, const MessageHeader& header) {
  *reinterpret_cast<MessageHeader*>(OutMessage(view, view.state->current.slot, dst)) = header;
}

// Sends the notice of a message: its header, behind what else was written into it, by this block
// before a barrier. By one thread. What it releases is also what the others wrote.
__device__ inline void SendNotice(const RankView& view, int32_t dst) {
  const Current current = view.state->current;
  *reinterpret_cast<MessageHeader*>(Notice(view, dst, current.slot, view.rank)) =
      HeaderOf(OutMessage(view, current.slot, dst));
  StoreRelease(Noticed(view, dst, current.slot, view.rank), current.sequence);
}

// Hands a part of a packed message over: to the mover for another rank, by a signal for our own. By
// one thread, of the warp that Steps has chosen: the rows are then in L2, through which copy
// engines and peers read. Bytes [begin, end) of the message. Warps that end different steps may
// post at the same time, but the parts of a message one after the other.
__device__ inline void PostBytes(const RankView& view, int32_t dst, int part, int64_t begin,
                                 int64_t end) {
  DeviceState* state = view.state;
  const Current current = state->current;
  const uint64_t signal = SignalOf(current.sequence, part);
  if (dst == view.rank) {
    *Signal(view, current.slot, view.rank) = signal;  // read by later kernels of this stream
    return;
  }
  const CopyOrder order{dst, current.slot, begin, end, signal};
  uint32_t words[MailboxEntry::kWords];
  memcpy(words, &order, sizeof(order));
  const auto before = atomicAdd(&state->mailbox_head, 1ULL);
  MailboxEntry* entry = view.mailbox + before % kMailboxEntries;
  const uint64_t number = (before + 1) << 32;
  for (int i = 0; i < MailboxEntry::kWords; ++i) StoreRelaxed(entry->words + i, number | words[i]);
  StoreRelaxed(Posted(view, dst, current.slot, view.rank), signal);
}

// Hands over a message that is one part.
__device__ inline void Post(const RankView& view, int32_t dst) {
  const MessageHeader& header = HeaderOf(OutMessage(view, view.state->current.slot, dst));
  const int64_t end = header.kind == kPoisonedKind ? int64_t{sizeof(MessageHeader)}
                                                   : LayoutOf(view.config, header).total;
  PostBytes(view, dst, kLastPart, 0, end);
}

// Hands over a part of a message; what lies before the rows goes with the first. One that leaves
// whole goes with the last. By one thread.
__device__ inline void PostPart(const RankView& view, int32_t dst, int part) {
  const MessageHeader& header = HeaderOf(OutMessage(view, view.state->current.slot, dst));
  if (header.first_part == 0) {
    if (part == kLastPart) Post(view, dst);
    return;
  }
  const MessageLayout layout = LayoutOf(view.config, header);
  const int64_t middle = layout.rows + header.first_part * layout.row_stride;
  PostBytes(view, dst, part, part == 0 ? 0 : middle, part == 0 ? middle : layout.total);
}

}  // namespace jax_sm_free::cuda

#endif  // JAX_SM_FREE_CC_CUDA_POST_CUH_
