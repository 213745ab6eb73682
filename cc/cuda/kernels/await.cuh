// Waits for what peers send. One block waits.

#ifndef JAX_SM_FREE_CC_CUDA_KERNELS_AWAIT_CUH_
#define JAX_SM_FREE_CC_CUDA_KERNELS_AWAIT_CUH_

#include <cstdint>

#include "cc/cuda/kernels/device.cuh"
#include "cc/cuda/kernels/kernels.h"
#include "cc/cuda/rank_view.h"
#include "cc/tiers.h"

namespace jax_sm_free::cuda {

// How long the copy of a posted message may take before the message is read where it was packed.
constexpr uint64_t kPatienceNanoseconds = 20'000'000;

__device__ inline int32_t NumAwaited(const RankView& view, Awaited awaited) {
  const int32_t num_other_nodes = view.config.num_nodes - 1;
  switch (awaited) {
    case Awaited::kSources:
      return view.config.ep_size;
    case Awaited::kLanes:
      return view.messages.num_lanes;
    case Awaited::kRail:
      return num_other_nodes;
    case Awaited::kOthers:
      break;
  }
  return num_other_nodes * (view.messages.num_lanes - num_other_nodes);
}

// What the ranks of the own node have for the i-th other node, by the place of the rank.
__device__ inline int32_t ForOtherNode(const RankView& view, int32_t i, int32_t place) {
  return RankAt(view.config, OtherNode(NodeOf(view.config, view.rank), i), place);
}

// The i-th of the messages that are awaited.
__device__ inline int32_t AwaitedMessage(const RankView& view, Awaited awaited, int32_t i) {
  switch (awaited) {
    case Awaited::kSources:
      return i;
    case Awaited::kLanes:
      return view.messages.of_lane[i];
    case Awaited::kRail:
      return view.config.ep_size + i;
    case Awaited::kOthers:
      break;
  }
  const int32_t node_size = view.config.node_size();
  return ForOtherNode(view, i / node_size, i % node_size);
}

// The rank that a fault names for a message: where its rows come from.
__device__ inline int32_t BlamedRank(const RankView& view, Awaited awaited, int32_t message) {
  return awaited == Awaited::kSources ? message : EndOf(view, message).rank;
}

// Counts how long this rank has waited for a message.
__device__ inline void CountWait(const RankView& view, int32_t message, uint64_t nanoseconds) {
  if (nanoseconds == 0) return;
  atomicAdd(&view.state->counters.waited_ns[EndOf(view, message).rank], nanoseconds);
}

// Waits until has_come(message) is true. If the wait is in vain, the fault names the sources of all
// awaited messages for which it is false.
template <typename HasCome>
__device__ bool Await(const RankView& view, Op op, Awaited awaited, int32_t message,
                      const HasCome& has_come) {
  const Current& current = view.state->current;
  const auto missing = [&]() -> FaultNumbers {
    int32_t first = BlamedRank(view, awaited, message);
    int32_t first_message = message;
    int64_t sources = int64_t{1} << first;
    for (int32_t i = 0; i < NumAwaited(view, awaited); ++i) {
      const int32_t other = AwaitedMessage(view, awaited, i);
      if (has_come(other)) continue;
      const int32_t source = BlamedRank(view, awaited, other);
      sources |= int64_t{1} << source;
      if (source >= first) continue;
      first = source;
      first_message = other;
    }
    const uint64_t last = LoadAcquire(Noticed(view, view.rank, current.slot, first_message));
    return {FaultCode::kTimeout, first, static_cast<int64_t>(current.sequence),
            static_cast<int64_t>(last), sources};
  };
  const auto is_here = [&] { return has_come(message); };
  const Waited waited = WaitOrRaise(view, op, is_here, missing);
  CountWait(view, message, waited.nanoseconds);
  if (waited.has_come) return true;
  view.state->current.failed = kEmpty;
  return false;
}

// Waits until the copy of a posted message is complete. If the copy takes too long, the message is
// read where it was packed.
__device__ inline void AwaitCopy(const RankView& view, int32_t message, uint64_t value) {
  const uint64_t* signal = Signal(view, view.state->current.slot, message);
  const uint64_t start = Nanoseconds();
  uint64_t now = start;
  while (LoadAcquire(signal) < value) {
    now = Nanoseconds();
    if (Elapsed(start, now) > kPatienceNanoseconds) {
      atomicOr(&view.state->current.in_place, 1ULL << message);
      break;
    }
    __nanosleep(100);
  }
  CountWait(view, message, Elapsed(start, now));
}

// Waits for messages, up to one of their parts: message_at(i) for all i below `count`. A block
// calls this.
template <typename MessageAt>
__device__ void AwaitMessages(const RankView& view, Op op, Awaited awaited, int part, int32_t count,
                              const MessageAt& message_at) {
  const Current current = view.state->current;
  const uint64_t value = SignalOf(current.sequence, part);
  const auto has_left = [&](int32_t message) {
    return LoadAcquire(Signal(view, current.slot, message)) >= value ||
           LoadAcquire(Posted(view, view.rank, current.slot, message)) >= value;
  };
  for (int32_t i = threadIdx.x; i < count; i += blockDim.x) {
    const int32_t message = message_at(i);
    if (Await(view, op, awaited, message, has_left)) AwaitCopy(view, message, value);
  }
}

}  // namespace jax_sm_free::cuda

#endif  // JAX_SM_FREE_CC_CUDA_KERNELS_AWAIT_CUH_
