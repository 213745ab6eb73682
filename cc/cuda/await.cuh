// Waiting for what peers send, by one block.

#ifndef JAX_SM_FREE_CC_CUDA_AWAIT_CUH_
#define JAX_SM_FREE_CC_CUDA_AWAIT_CUH_

#include <cstdint>

#include "cc/cuda/device.cuh"

namespace jax_sm_free::cuda {

// Waits until signals[source] is at least `value`. If it never is, the fault names all sources of
// which that is true.
__device__ inline bool Await(const RankView& view, Op op, const uint64_t* signals, uint64_t value,
                             int32_t source) {
  if (WaitFor(view, signals + source, value)) return true;
  int64_t missing = int64_t{1} << source;
  for (int32_t other = 0; other < view.config.ep_size; ++other) {
    if (LoadAcquire(signals + other) < value) missing |= int64_t{1} << other;
  }
  const int32_t first = __ffsll(missing) - 1;
  const uint64_t last = LoadAcquire(Noticed(view, view.rank, view.state->current.slot, first));
  Raise(view, op,
        {IsStopped(view) ? FaultCode::kStopped : FaultCode::kTimeout, first,
         static_cast<int64_t>(view.state->current.sequence), static_cast<int64_t>(last), missing});
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
    (void)Await(view, op, Signal(view, current.slot, 0), SignalOf(current.sequence, messages.part),
                source);
  }
}

}  // namespace jax_sm_free::cuda

#endif  // JAX_SM_FREE_CC_CUDA_AWAIT_CUH_
