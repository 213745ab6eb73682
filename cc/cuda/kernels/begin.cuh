// Opens an exchange: takes the next sequence number and its slot, and writes the token.

#ifndef JAX_SM_FREE_CC_CUDA_KERNELS_BEGIN_CUH_
#define JAX_SM_FREE_CC_CUDA_KERNELS_BEGIN_CUH_

#include "cc/cuda/kernels/claims.cuh"
#include "cc/cuda/kernels/device.cuh"
#include "cc/cuda/kernels/kernels.h"

namespace jax_sm_free::cuda {

__device__ inline void WriteToken(const RankView& view, const BeginArgs& args) {
  const Current& current = view.state->current;
  for (int i = 0; i < kTokenSize; ++i) args.token[i] = 0;
  if (current.failed == kNothing) return;  // no token: its recv finds that out
  args.token[kMagicWord] = kTokenMagic;
  args.token[kLowWord] = static_cast<float>(current.sequence % kTokenWordSize);
  args.token[kHighWord] = static_cast<float>(current.sequence / kTokenWordSize);
  args.token[kSlotWord] = static_cast<float>(current.slot);
  args.token[kKindWord] = static_cast<float>(static_cast<int32_t>(args.kind));
  args.token[kRankWord] = static_cast<float>(view.rank);
  args.token[kBufferWord] = static_cast<float>(view.buffer_id % kTokenWordSize);
}

// By one block. It waits until all peers have read the exchange that had the slot before.
__device__ inline void Begin(const RankView& view, const BeginArgs& args) {
  DeviceState* state = view.state;
  ResetClaims(state);
  __shared__ uint64_t before;  // the exchange that used the slot last; 0 for none
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
      Raise(view, args.op, {FaultCode::kSlots});
      state->current.failed = kNothing;
    } else {
      before = state->slot_sequence[slot];
      state->slot_phase[slot] = kSent;
      state->slot_sequence[slot] = sequence;
      if (args.position_of_program != nullptr && *args.position_of_program != view.position) {
        Raise(view, args.op, {FaultCode::kPosition, -1, view.position, *args.position_of_program});
      }
      if (state->faulted != kSound) state->current.failed = kEmpty;
    }
    WriteToken(view, args);
  }
  __syncthreads();
  const Current current = state->current;
  if (current.failed == kNothing) return;
  for (int32_t peer = threadIdx.x; peer < view.config.ep_size; peer += blockDim.x) {
    const uint64_t* ack = Ack(view, view.rank, current.slot, peer);
    const auto has_read = [&] { return LoadAcquire(ack) >= before; };
    const auto numbers = [&]() -> FaultNumbers {
      return {FaultCode::kAckTimeout, peer, static_cast<int64_t>(before),
              static_cast<int64_t>(LoadAcquire(ack))};
    };
    if (!WaitOrRaise(view, args.op, has_read, numbers).has_come) state->current.failed = kNothing;
  }
  __syncthreads();
}

}  // namespace jax_sm_free::cuda

#endif  // JAX_SM_FREE_CC_CUDA_KERNELS_BEGIN_CUH_
