// Waiting for what peers send, by one block.

#ifndef JAX_SM_FREE_CC_CUDA_AWAIT_CUH_
#define JAX_SM_FREE_CC_CUDA_AWAIT_CUH_

#include <cstdint>

#include "cc/cuda/device.cuh"

namespace jax_sm_free::cuda {

// Waits until *signal is at least `value`; `source` is to blame if it never is.
__device__ inline bool Await(const RankView& view, Op op, const uint64_t* signal, uint64_t value,
                             int32_t source) {
  if (WaitFor(view, signal, value)) return true;
  Raise(view, op,
        {FaultCode::kTimeout, source, static_cast<int64_t>(value),
         static_cast<int64_t>(LoadAcquire(signal))});
  view.state->current.failed = kEmpty;
  return false;
}

// Messages of some sources, up to a part of them.
struct Messages {
  int32_t first;  // the first source, as a distance down the ring from this rank, and how many
  int32_t count;
  int part;

  // Rank r sends to r + 1 first, so that messages come in from r - 1 downwards.
  __device__ int32_t source(const RankView& view, int32_t i) const {
    const int32_t ep_size = view.config.ep_size;
    return (view.rank - first - i + 2 * ep_size) % ep_size;
  }
};

__device__ inline void AwaitMessages(const RankView& view, Op op, const Messages& messages) {
  const Current current = view.state->current;
  for (int32_t i = threadIdx.x; i < messages.count; i += blockDim.x) {
    const int32_t source = messages.source(view, i);
    (void)Await(view, op, Signal(view, current.slot, source),
                SignalOf(current.sequence, messages.part), source);
  }
}

}  // namespace jax_sm_free::cuda

#endif  // JAX_SM_FREE_CC_CUDA_AWAIT_CUH_
