// Small device functions that every kernel uses: addresses, memory order, faults.

#ifndef JAX_SM_FREE_CC_CUDA_DEVICE_CUH_
#define JAX_SM_FREE_CC_CUDA_DEVICE_CUH_

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "cc/cuda/device_state.h"

namespace jax_sm_free::cuda {

inline constexpr int kWarpSize = 32;
inline constexpr unsigned kFullWarp = 0xFFFFFFFFU;

// Current::failed.
enum Failure : int32_t {
  kOk,
  kEmpty,    // peers get a poisoned message, so that they need not wait
  kNothing,  // the slot is not ours: nothing may be written
};
inline constexpr int32_t kPoisonedKind = -1;

__device__ inline int64_t MessageIndex(const RankView& view, int32_t slot, int32_t peer) {
  return int64_t{slot} * view.config.ep_size + peer;
}

// The message of `source` on this rank.
__device__ inline std::byte* InMessage(const RankView& view, int32_t slot, int32_t source) {
  return view.base[view.rank] + view.regions.recv +
         MessageIndex(view, slot, source) * view.regions.message_bytes;
}

// Where the message for `dst` is packed: our own rows go straight to where they are received.
__device__ inline std::byte* OutMessage(const RankView& view, int32_t slot, int32_t dst) {
  if (dst == view.rank) return InMessage(view, slot, dst);
  return view.base[view.rank] + StageOffset(view, slot, dst);
}

__device__ inline uint64_t* Signal(const RankView& view, int32_t slot, int32_t source) {
  return reinterpret_cast<uint64_t*>(view.base[view.rank] + view.regions.signals) +
         MessageIndex(view, slot, source);
}

// The acknowledgement by `dst`, in the region of `holder`.
__device__ inline uint64_t* Ack(const RankView& view, int32_t holder, int32_t slot, int32_t dst) {
  return reinterpret_cast<uint64_t*>(view.base[holder] + view.regions.acks) +
         MessageIndex(view, slot, dst);
}

// The notice of `source`, and its sequence number, in the region of `holder`.
__device__ inline std::byte* Notice(const RankView& view, int32_t holder, int32_t slot,
                                    int32_t source) {
  return view.base[holder] + view.regions.notices +
         MessageIndex(view, slot, source) * view.regions.notice_bytes;
}
__device__ inline uint64_t* Noticed(const RankView& view, int32_t holder, int32_t slot,
                                    int32_t source) {
  return reinterpret_cast<uint64_t*>(view.base[holder] + view.regions.noticed) +
         MessageIndex(view, slot, source);
}
__device__ inline int32_t* RowsPerExpert(std::byte* notice) {
  return reinterpret_cast<int32_t*>(notice + sizeof(MessageHeader));
}

__device__ inline const MessageHeader& HeaderOf(const std::byte* message) {
  return *reinterpret_cast<const MessageHeader*>(message);
}

template <typename T>
__device__ inline T* PartOf(std::byte* message, int64_t offset) {
  return reinterpret_cast<T*>(message + offset);
}

__device__ inline uint64_t LoadAcquire(const uint64_t* address) {
  uint64_t value;
  asm volatile("ld.acquire.sys.global.u64 %0, [%1];" : "=l"(value) : "l"(address) : "memory");
  return value;
}

__device__ inline void StoreRelease(uint64_t* address, uint64_t value) {
  asm volatile("st.release.sys.global.u64 [%0], %1;" ::"l"(address), "l"(value) : "memory");
}

__device__ inline void StoreRelaxed(uint64_t* address, uint64_t value) {
  asm volatile("st.relaxed.sys.global.u64 [%0], %1;" ::"l"(address), "l"(value) : "memory");
}

__device__ inline uint64_t Nanoseconds() {
  uint64_t now;
  asm volatile("mov.u64 %0, %globaltimer;" : "=l"(now));
  return now;
}

// Whether the host has told this rank to wait no longer.
__device__ inline bool IsStopped(const RankView& view) {
  return *const_cast<const volatile int32_t*>(&view.status->stopped) != 0;
}

// Waits until *address >= value. False after the timeout, or soon after the host said stop: what is
// on its way still arrives. Called by any number of threads of one block; blocks nothing but this
// block.
__device__ inline bool WaitFor(const RankView& view, const uint64_t* address, uint64_t value) {
  constexpr uint64_t kStopNanoseconds = 500'000'000;
  constexpr uint32_t kLooksPerStop = 1024;  // the host's memory is far
  uint64_t end = Nanoseconds() + static_cast<uint64_t>(view.config.timeout_s * 1e9);
  bool stopped = false;
  for (uint32_t looks = 1; LoadAcquire(address) < value; ++looks) {
    const uint64_t now = Nanoseconds();
    if (now > end) return false;
    if (!stopped && looks % kLooksPerStop == 0 && IsStopped(view)) {
      stopped = true;
      end = end < now + kStopNanoseconds ? end : now + kStopNanoseconds;
    }
    __nanosleep(100);
  }
  return true;
}

struct FaultNumbers {
  FaultCode code;
  int32_t peer = -1;
  int64_t expected = 0;
  int64_t seen = 0;
  int64_t detail = 0;
};

// Writes the first fault into pinned memory, where the host finds it.
__device__ inline void Raise(const RankView& view, Op op, const FaultNumbers& fault) {
  Status* status = view.status;
  view.state->faulted = 1;
  if (atomicCAS_system(&status->claimed, 0, 1) != 0) return;
  status->op = static_cast<int32_t>(op);
  status->peer = fault.peer;
  status->slot = view.state->current.slot;
  status->sequence = static_cast<int64_t>(view.state->current.sequence);
  status->expected = fault.expected;
  status->seen = fault.seen;
  status->detail = fault.detail;
  __threadfence_system();
  *const_cast<volatile int32_t*>(&status->code) = static_cast<int32_t>(fault.code);
  __threadfence_system();
}

// True in all threads of the block that finishes last. Everything the other blocks wrote is
// visible to it.
__device__ inline bool IsLastBlock(DeviceState* state) {
  __shared__ bool last;
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    last = atomicAdd(&state->blocks_done, 1U) == gridDim.x - 1;
    if (last) state->blocks_done = 0;
  }
  __syncthreads();
  if (last) __threadfence();
  return last;
}

// True in all lanes of the warp of the grid that is the last to finish a step of the kernel, of
// which there are at most kMaxRanks. Everything the other warps wrote before is visible to it.
// Nobody waits: other warps go on with the next step.
__device__ inline bool IsLastWarp(DeviceState* state, int step) {
  __threadfence();
  __syncwarp();
  uint32_t before = 0;
  if (threadIdx.x % kWarpSize == 0) before = atomicAdd(&state->warps_done[step], 1U);
  before = __shfl_sync(kFullWarp, before, 0);
  if (before != gridDim.x * (blockDim.x / kWarpSize) - 1) return false;
  state->warps_done[step] = 0;
  __threadfence();
  return true;
}

// Tells every source that its message in this slot has been read, and frees the slot. By one block.
__device__ inline void Acknowledge(const RankView& view) {
  const Current current = view.state->current;
  for (int32_t peer = threadIdx.x; peer < view.config.ep_size; peer += blockDim.x) {
    __threadfence_system();
    StoreRelease(Ack(view, peer, current.slot, view.rank), current.sequence);
  }
  if (threadIdx.x == 0) view.state->slot_phase[current.slot] = kFree;
}

// Writes the header of the message for `dst`, and the notice of it. By one thread; the notice
// counts once SendNotice says so.
__device__ inline void WriteHeader(const RankView& view, int32_t dst, const MessageHeader& header) {
  const int32_t slot = view.state->current.slot;
  *reinterpret_cast<MessageHeader*>(OutMessage(view, slot, dst)) = header;
  *reinterpret_cast<MessageHeader*>(Notice(view, dst, slot, view.rank)) = header;
}
__device__ inline void SendNotice(const RankView& view, int32_t dst) {
  const Current current = view.state->current;
  __threadfence_system();
  StoreRelease(Noticed(view, dst, current.slot, view.rank), current.sequence);
}

// Hands a part of a packed message over: to the mover for another rank, by a signal for our own. By
// one thread, of the warp or block that IsLastWarp or IsLastBlock has chosen: the rows are then in
// L2, through which copy engines read. Bytes [begin, end) of the message. Warps that end different
// steps may post at the same time.
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
}

// Hands over a message that is one part.
__device__ inline void Post(const RankView& view, int32_t dst) {
  const MessageHeader& header = HeaderOf(OutMessage(view, view.state->current.slot, dst));
  const int64_t end = header.kind == kPoisonedKind ? int64_t{sizeof(MessageHeader)}
                                                   : LayoutOf(view.config, header).total;
  PostBytes(view, dst, kLastPart, 0, end);
}

// A row cut into segments of whole 16-byte words, at most `max_words` each, one for a warp at a
// time, so that many warps share few rows evenly. Rows of other sizes are one segment.
struct Segments {
  int32_t num_words;
  int32_t per_row;
  int32_t words;  // of each but the last

  __device__ Segments(int64_t row_bytes, int32_t max_words) {
    const bool wide = row_bytes % 16 == 0;
    num_words = static_cast<int32_t>(row_bytes / 16);
    per_row = wide && num_words > 0 ? (num_words + max_words - 1) / max_words : 1;
    words = (num_words + per_row - 1) / per_row;
  }
  // Items number the segments of all rows.
  __device__ int64_t row_of(int64_t item) const { return static_cast<uint32_t>(item) / divisor(); }
  __device__ int32_t segment_of(int64_t item) const {
    return static_cast<int32_t>(static_cast<uint32_t>(item) % divisor());
  }
  __device__ uint32_t divisor() const { return static_cast<uint32_t>(per_row); }

  __device__ int32_t begin(int32_t segment) const { return segment * words; }
  __device__ int32_t end(int32_t segment) const {
    return segment + 1 == per_row ? num_words : (segment + 1) * words;
  }
};

// The pointer that another lane of the warp holds.
template <typename T>
__device__ inline T* ShufflePointer(T* pointer, int lane) {
  return reinterpret_cast<T*>(
      __shfl_sync(kFullWarp, reinterpret_cast<unsigned long long>(pointer), lane));
}

// Copies words [first, end) of a row, 16 bytes each, to every target: a row for each lane that has
// one. All lanes of the warp call it; each keeps several loads in flight, and reads a word once.
inline constexpr int kCopyUnroll = 8;
inline constexpr int32_t kCopyWords = kCopyUnroll * kWarpSize;  // of a segment
__device__ inline void WarpCopyToAll(std::byte* target, const std::byte* row, int32_t first,
                                     int32_t end) {
  constexpr int kUnroll = kCopyUnroll;
  const int lane = threadIdx.x % kWarpSize;
  const unsigned present = __ballot_sync(kFullWarp, target != nullptr);
  const auto* source = reinterpret_cast<const uint4*>(row) + lane;
  for (; first < end; first += kUnroll * kWarpSize) {
    uint4 words[kUnroll];
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int32_t i = first + u * kWarpSize;
      if (i + lane < end) words[u] = __ldcs(source + i);
    }
    for (unsigned left = present; left != 0; left &= left - 1) {
      const int from = __ffs(static_cast<int>(left)) - 1;
      auto* out = reinterpret_cast<uint4*>(ShufflePointer(target, from)) + lane;
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int32_t i = first + u * kWarpSize;
        if (i + lane < end) __stcs(out + i, words[u]);
      }
    }
  }
}

// Copies `bytes` with all lanes of a warp, as wide as the addresses allow.
__device__ inline void WarpCopy(std::byte* out, const std::byte* in, int64_t bytes) {
  const int lane = threadIdx.x % kWarpSize;
  const auto all = reinterpret_cast<uintptr_t>(out) | reinterpret_cast<uintptr_t>(in) |
                   static_cast<uintptr_t>(bytes);
  if (all % sizeof(uint4) == 0) {
    for (int64_t i = lane; i < bytes / 16; i += kWarpSize) {
      reinterpret_cast<uint4*>(out)[i] = reinterpret_cast<const uint4*>(in)[i];
    }
  } else if (all % sizeof(uint32_t) == 0) {
    for (int64_t i = lane; i < bytes / 4; i += kWarpSize) {
      reinterpret_cast<uint32_t*>(out)[i] = reinterpret_cast<const uint32_t*>(in)[i];
    }
  } else {
    for (int64_t i = lane; i < bytes; i += kWarpSize) out[i] = in[i];
  }
}

// Sets `bytes` to one value with all lanes of a warp.
__device__ inline void WarpFill(std::byte* out, uint8_t value, int64_t bytes) {
  const int lane = threadIdx.x % kWarpSize;
  const uint32_t word = value * 0x01010101U;
  if ((reinterpret_cast<uintptr_t>(out) | static_cast<uintptr_t>(bytes)) % sizeof(uint4) == 0) {
    const uint4 wide = make_uint4(word, word, word, word);
    for (int64_t i = lane; i < bytes / 16; i += kWarpSize) reinterpret_cast<uint4*>(out)[i] = wide;
  } else {
    for (int64_t i = lane; i < bytes; i += kWarpSize) out[i] = static_cast<std::byte>(value);
  }
}

// This warp's number among all of the grid, and their count.
struct Warps {
  int64_t index;
  int64_t count;
};
__device__ inline Warps WarpsOfGrid() {
  const int64_t per_block = blockDim.x / kWarpSize;
  return {blockIdx.x * per_block + threadIdx.x / kWarpSize, gridDim.x * per_block};
}

}  // namespace jax_sm_free::cuda

#endif  // JAX_SM_FREE_CC_CUDA_DEVICE_CUH_
