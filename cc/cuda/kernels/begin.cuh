// Opens an exchange: takes the next sequence number and its slot, and writes the token.

#ifndef JAX_SM_FREE_CC_CUDA_KERNELS_BEGIN_CUH_
#define JAX_SM_FREE_CC_CUDA_KERNELS_BEGIN_CUH_

#include "cc/cuda/kernels/claims.cuh"
#include "cc/cuda/kernels/device.cuh"
#include "cc/cuda/kernels/kernels.h"

namespace jax_sm_free::cuda {

__device__ inline void WriteTokenOf(const RankView& view, Op op, float* token) {
  const Current& current = view.state->current;
  if (current.failed == kNothing) {  // no token: the recv notices that
    for (int i = 0; i < kTokenSize; ++i) token[i] = 0;
    return;
  }
  WriteToken({.sequence = static_cast<int64_t>(current.sequence),
              .slot = current.slot,
              .kind = static_cast<int64_t>(KindOf(op)),
              .rank = view.rank,
              .buffer = TokenBuffer(view.buffer_id)},
             token);
}

// One block calls this. It waits until all peers have read the exchange that used the slot before.
__device__ inline void Begin(const RankView& view, Op op, const BeginArgs& args) {
  DeviceState* state = view.state;
  ResetClaims(state);
  __shared__ uint64_t before;  // the last exchange that used the slot; 0 for none
  if (threadIdx.x == 0) {
    const int32_t num_slots = view.config.num_slots;
    const uint64_t sequence = ++state->sequence;
    auto slot = static_cast<int32_t>(sequence % num_slots);
    int32_t tried = 0;
    while (tried < num_slots && state->slot_phase[slot] != kFree) {
      slot = (slot + 1) % num_slots;
      ++tried;
    }
    state->current = {sequence, slot, kOk, 0};
    if (tried == num_slots) {
      Raise(view, op, {FaultCode::kSlots});
      state->current.failed = kNothing;
    } else {
      before = state->slot_sequence[slot];
      state->slot_phase[slot] = kSent;
      state->slot_sequence[slot] = sequence;
      if (args.position != nullptr && *args.position != view.position) {
        Raise(view, op, {FaultCode::kPosition, -1, view.position, *args.position});
      }
      if (state->faulted != kSound) state->current.failed = kEmpty;
    }
    WriteTokenOf(view, op, args.token);
  }
  __syncthreads();
  const Current current = state->current;
  if (current.failed == kNothing) return;
  for (int32_t lane = threadIdx.x; lane < view.messages.num_lanes; lane += blockDim.x) {
    const int32_t peer = PeerOfLane(view, lane);
    const uint64_t* ack = Ack(view, view.rank, current.slot, peer);
    const auto has_read = [&] { return LoadAcquire(ack) >= before; };
    const auto numbers = [&]() -> FaultNumbers {
      return {FaultCode::kAckTimeout, peer, static_cast<int64_t>(before),
              static_cast<int64_t>(LoadAcquire(ack))};
    };
    if (!WaitOrRaise(view, op, has_read, numbers).has_come) state->current.failed = kNothing;
  }
  __syncthreads();
}

}  // namespace jax_sm_free::cuda

#endif  // JAX_SM_FREE_CC_CUDA_KERNELS_BEGIN_CUH_
