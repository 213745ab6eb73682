// Waits for what peers send. One block waits.

#ifndef JAX_SM_FREE_CC_CUDA_KERNELS_AWAIT_CUH_
#define JAX_SM_FREE_CC_CUDA_KERNELS_AWAIT_CUH_

#include <cstdint>

#include "cc/cuda/kernels/device.cuh"

namespace jax_sm_free::cuda {

// How long the copy of a posted message may take before the message is read where it was packed.
constexpr uint64_t kPatienceNanoseconds = 20'000'000;

// Counts how long a recv has waited for a source.
__device__ inline void CountWait(const RankView& view, int32_t source, uint64_t nanoseconds) {
  if (nanoseconds > 0) atomicAdd(&view.state->counters.waited_ns[source], nanoseconds);
}

// Waits until has_come(source) is true for all sources. If the wait is in vain, the fault names all
// sources for which it is false.
template <typename HasCome>
__device__ bool Await(const RankView& view, Op op, int32_t source, const HasCome& has_come) {
  const Current& current = view.state->current;
  const auto missing = [&]() -> FaultNumbers {
    int64_t sources = int64_t{1} << source;
    for (int32_t other = 0; other < view.config.ep_size; ++other) {
      if (!has_come(other)) sources |= int64_t{1} << other;
    }
    const int32_t first = __ffsll(sources) - 1;
    const uint64_t last = LoadAcquire(Noticed(view, view.rank, current.slot, first));
    return {FaultCode::kTimeout, first, static_cast<int64_t>(current.sequence),
            static_cast<int64_t>(last), sources};
  };
  const auto is_here = [&] { return has_come(source); };
  const Waited waited = WaitOrRaise(view, op, is_here, missing);
  CountWait(view, source, waited.nanoseconds);
  if (waited.has_come) return true;
  view.state->current.failed = kEmpty;
  return false;
}

// Messages of some sources, up to one of their parts.
struct Messages {
  int32_t first;  // the first source, as a distance down the ring from this rank
  int32_t count;  // the number of sources
  int part;

  // Rank r sends to r + 1 first, so the message of r - 1 comes first, then that of r - 2, and so
  // on.
  __device__ int32_t source(const RankView& view, int32_t i) const {
    const int32_t ep_size = view.config.ep_size;
    return (view.rank - first - i + 2 * ep_size) % ep_size;
  }
};

// Waits until the copy of a posted message is complete. If the copy takes too long, the message is
// read where it was packed.
__device__ inline void AwaitCopy(const RankView& view, const uint64_t* signal, uint64_t value,
                                 int32_t source) {
  const uint64_t start = Nanoseconds();
  uint64_t now = start;
  while (LoadAcquire(signal) < value) {
    now = Nanoseconds();
    if (Elapsed(start, now) > kPatienceNanoseconds) {
      atomicOr(&view.state->current.in_place, 1U << source);
      break;
    }
    __nanosleep(100);
  }
  CountWait(view, source, Elapsed(start, now));
}

__device__ inline void AwaitMessages(const RankView& view, Op op, const Messages& messages) {
  const Current current = view.state->current;
  const uint64_t value = SignalOf(current.sequence, messages.part);
  const auto has_left = [&](int32_t source) {
    return LoadAcquire(Signal(view, current.slot, source)) >= value ||
           LoadAcquire(Posted(view, view.rank, current.slot, source)) >= value;
  };
  for (int32_t i = threadIdx.x; i < messages.count; i += blockDim.x) {
    const int32_t source = messages.source(view, i);
    if (Await(view, op, source, has_left)) {
      AwaitCopy(view, Signal(view, current.slot, source), value, source);
    }
  }
}

}  // namespace jax_sm_free::cuda

#endif  // JAX_SM_FREE_CC_CUDA_KERNELS_AWAIT_CUH_
