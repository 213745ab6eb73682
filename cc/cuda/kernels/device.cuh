// Small device functions that all kernels use: addresses, memory order, faults.

#ifndef JAX_SM_FREE_CC_CUDA_KERNELS_DEVICE_CUH_
#define JAX_SM_FREE_CC_CUDA_KERNELS_DEVICE_CUH_

#include <cstddef>
#include <cstdint>

#include "cc/cuda/device_state.h"
#include "cc/cuda/kernels/memory_order.cuh"
#include "cc/cuda/kernels/warp.cuh"
#include "cc/cuda/rank_view.h"

namespace jax_sm_free::cuda {

// The values of Current::failed.
enum Failure : int32_t {
  kOk,
  kEmpty,    // peers get a poisoned message, so that they do not wait
  kNothing,  // the slot is in use by others: nothing may be written
};
inline constexpr int32_t kPoisonedKind = -1;

// The rank that a message goes to or comes from, and the number of the message there.
__device__ inline const OtherEnd& EndOf(const RankView& view, int32_t message) {
  return view.messages.end[message];
}

// The rank whose messages a lane handles.
__device__ inline int32_t PeerOfLane(const RankView& view, int32_t lane) {
  return EndOf(view, view.messages.of_lane[lane]).rank;
}

// A message that this rank gets.
__device__ inline std::byte* InMessage(const RankView& view, int32_t slot, int32_t message) {
  if ((view.state->current.in_place >> message & 1U) != 0) {
    const OtherEnd& end = EndOf(view, message);
    return view.base[end.rank] + StageOffset(view, slot, end.stage_there);
  }
  return view.base[view.rank] + view.regions.recv +
         MessageIndex(view, slot, message) * view.regions.message_bytes;
}

// Where a message is packed. Rows for this rank itself go directly to where they are received.
__device__ inline std::byte* OutMessage(const RankView& view, int32_t slot, int32_t message) {
  const OtherEnd& end = EndOf(view, message);
  if (end.rank == view.rank) return InMessage(view, slot, message);
  return view.base[view.rank] + StageOffset(view, slot, end.stage);
}

// The message of `source` that holds the rows which all of its messages have in common.
__device__ inline std::byte* CommonMessage(const RankView& view, int32_t slot, int32_t source) {
  return view.base[source] + StageOffset(view, slot, 0);
}

__device__ inline uint64_t* Signal(const RankView& view, int32_t slot, int32_t message) {
  return reinterpret_cast<uint64_t*>(view.base[view.rank] + view.regions.signals) +
         MessageIndex(view, slot, message);
}

// The acknowledgement of `dst`, in the region of `holder`.
__device__ inline uint64_t* Ack(const RankView& view, int32_t holder, int32_t slot, int32_t dst) {
  return reinterpret_cast<uint64_t*>(view.base[holder] + view.regions.acks) +
         MessageIndex(view, slot, dst);
}

// The notice of a message, and the sequence number of the notice, in the region of `holder`, which
// gets the message as `message`.
__device__ inline std::byte* Notice(const RankView& view, int32_t holder, int32_t slot,
                                    int32_t message) {
  return view.base[holder] + view.regions.notices +
         MessageIndex(view, slot, message) * view.regions.notice_bytes;
}
__device__ inline uint64_t* Noticed(const RankView& view, int32_t holder, int32_t slot,
                                    int32_t message) {
  return reinterpret_cast<uint64_t*>(view.base[holder] + view.regions.noticed) +
         MessageIndex(view, slot, message);
}
// The signal that the message is packed, likewise.
__device__ inline uint64_t* Posted(const RankView& view, int32_t holder, int32_t slot,
                                   int32_t message) {
  return reinterpret_cast<uint64_t*>(view.base[holder] + view.regions.posted) +
         MessageIndex(view, slot, message);
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

// Whether the host has told this rank to stop waiting.
__device__ inline bool IsStopped(const RankView& view) {
  return *const_cast<const volatile int32_t*>(&view.status->stopped) != 0;
}

// 0 if the clock was set back between the two times.
__device__ inline uint64_t Elapsed(uint64_t start, uint64_t now) {
  return now > start ? now - start : 0;
}

// The result of a wait of one thread.
struct Waited {
  bool has_come;  // whether the condition became true
  // The duration up to the last check that failed. It is 0 if the first check succeeded.
  uint64_t nanoseconds;
};

// Waits until is_true() holds. Gives up after the timeout, or soon after the host has said stop;
// data that is in flight then still arrives. Gives up at once if an earlier wait took as long as
// the timeout. Calls tell() once if the wait takes long. Any number of threads of one block may
// call it. It blocks only this block.
template <typename Condition, typename Tell>
__device__ Waited WaitUntil(const RankView& view, const Condition& is_true, const Tell& tell) {
  constexpr uint64_t kStopNanoseconds = 500'000'000;
  constexpr uint32_t kLooksPerStop = 1024;  // reading the memory of the host takes long
  if (view.state->faulted == kTimedOut) return {is_true(), 0};
  const uint64_t start = Nanoseconds();
  uint64_t now = start;
  uint64_t slow = start + static_cast<uint64_t>(kSlowWaitSeconds * 1e9);
  uint64_t end = start + static_cast<uint64_t>(view.config.timeout_s * 1e9);
  bool stopped = false;
  for (uint32_t looks = 1; !is_true(); ++looks) {
    // Here, because the threads of a warp may continue together when all are done.
    now = Nanoseconds();
    if (now > end) return {false, Elapsed(start, now)};
    if (now > slow) {
      tell();
      slow = end;
    }
    if (!stopped && looks % kLooksPerStop == 0 && IsStopped(view)) {
      stopped = true;
      end = end < now + kStopNanoseconds ? end : now + kStopNanoseconds;
    }
    __nanosleep(100);
  }
  return {true, Elapsed(start, now)};
}

struct FaultNumbers {
  FaultCode code;
  int32_t peer = -1;
  int64_t expected = 0;
  int64_t seen = 0;
  int64_t detail = 0;
};

// Writes a fault into pinned memory, where the host reads it. A fault that is already there stays.
__device__ inline void Write(FaultRecord& record, const Current& current, Op op,
                             const FaultNumbers& fault) {
  if (atomicCAS_system(&record.claimed, 0, 1) != 0) return;
  record.op = static_cast<int32_t>(op);
  record.peer = fault.peer;
  record.slot = current.slot;
  record.sequence = static_cast<int64_t>(current.sequence);
  record.expected = fault.expected;
  record.seen = fault.seen;
  record.detail = fault.detail;
  __threadfence_system();
  *const_cast<volatile int32_t*>(&record.code) = static_cast<int32_t>(fault.code);
  __threadfence_system();
}

__device__ inline void Raise(const RankView& view, Op op, const FaultNumbers& fault) {
  const bool waited = fault.code == FaultCode::kTimeout || fault.code == FaultCode::kAckTimeout;
  atomicMax(&view.state->faulted, static_cast<int32_t>(waited ? kTimedOut : kPoisoned));
  Write(view.status->fault, view.state->current, op, fault);
}

// Waits as WaitUntil does. A wait in vain is a fault with the numbers of numbers(); or kStopped, if
// the host has ended the wait. If the wait takes long, the host writes the same numbers to stderr.
template <typename Condition, typename Numbers>
__device__ Waited WaitOrRaise(const RankView& view, Op op, const Condition& is_true,
                              const Numbers& numbers) {
  const auto tell = [&] { Write(view.status->slow_wait, view.state->current, op, numbers()); };
  const Waited waited = WaitUntil(view, is_true, tell);
  if (waited.has_come) return waited;
  FaultNumbers fault = numbers();
  if (IsStopped(view)) fault.code = FaultCode::kStopped;
  Raise(view, op, fault);
  return waited;
}

// True in all threads of the block that finishes last. That block sees everything that the other
// blocks wrote.
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

// The first block of a grid may be its watch. It waits until the other blocks, the workers, have
// ended a step of the kernel, and then does what follows the step. A kernel has at most kMaxSteps
// steps. The workers count the end of a step and continue. If a worker had to find out whether it
// is the last one, it would wait for the memory that all workers keep busy.
__device__ inline bool IsWatch() { return blockIdx.x == 0; }
__device__ inline Warps Workers() {
  const int64_t per_block = blockDim.x / kWarpSize;
  return {(int64_t{blockIdx.x} - 1) * per_block + threadIdx.x / kWarpSize,
          (int64_t{gridDim.x} - 1) * per_block};
}

// All threads of a kernel make one object of this class.
class Steps {
 public:
  __device__ explicit Steps(DeviceState* state) : state_(state) {
    __shared__ uint32_t warps_done[kMaxSteps];
    warps_done_ = warps_done;
    for (int step = threadIdx.x; step < kMaxSteps; step += blockDim.x) warps_done[step] = 0;
    __syncthreads();
  }

  // All lanes of a worker's warp call this.
  __device__ void End(int step) const {
    __syncwarp();
    if (threadIdx.x % kWarpSize != 0) return;
    __threadfence_block();
    const uint32_t before = atomicAdd_block(warps_done_ + step, 1U);
    if (before != blockDim.x / kWarpSize - 1) return;
    __threadfence_block();
    CountRelease(state_->steps_done + step);
  }

  // All lanes of a warp of the watch call this once for each step. Afterwards they see everything
  // that was written in the step.
  __device__ void Await(int step) const {
    uint32_t* done = state_->steps_done + step;
    if (threadIdx.x % kWarpSize == 0) {
      while (LoadAcquire(done) != gridDim.x - 1) __nanosleep(100);
      *done = 0;
    }
    __syncwarp();
  }

 private:
  DeviceState* state_;
  uint32_t* warps_done_;
};

// Counts the bytes of the rows of a message.
__device__ inline void CountRows(Counters::Counter& counter, const MessageHeader& header) {
  atomicAdd(&counter, static_cast<Counters::Counter>(header.num_rows * header.row_bytes));
}

// Tells all ranks that have sent messages to this one that their messages in this slot were read,
// and frees the slot. One block calls this.
__device__ inline void Acknowledge(const RankView& view) {
  const Current current = view.state->current;
  for (int32_t lane = threadIdx.x; lane < view.messages.num_lanes; lane += blockDim.x) {
    StoreRelease(Ack(view, PeerOfLane(view, lane), current.slot, view.rank), current.sequence);
  }
  if (threadIdx.x == 0) view.state->slot_phase[current.slot] = kFree;
}

}  // namespace jax_sm_free::cuda

#endif  // JAX_SM_FREE_CC_CUDA_KERNELS_DEVICE_CUH_
