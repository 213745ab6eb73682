// What the kernels of a forward share: the messages that they make.

#ifndef JAX_SM_FREE_CC_CUDA_KERNELS_FORWARD_CUH_
#define JAX_SM_FREE_CC_CUDA_KERNELS_FORWARD_CUH_

#include <cstdint>

#include "cc/cuda/kernels/await.cuh"
#include "cc/cuda/kernels/device.cuh"
#include "cc/cuda/rank_view.h"
#include "cc/op.h"

namespace jax_sm_free::cuda {

// The first entry of a node in arrays [num_nodes * max_tokens, ...] of rows of rail messages.
__device__ inline int64_t FirstRailRow(const RankView& view, int32_t node) {
  return int64_t{node} * view.config.max_tokens;
}

// The header of a message that a forward makes. Its rows are as long as those that this rank has
// sent in the exchange. All threads may call this: they need not wait until it is written.
__device__ inline MessageHeader ForwardHeader(const RankView& view, Op op, int32_t num_rows) {
  const Current current = view.state->current;
  const bool ok = current.failed == kOk;
  MessageHeader header;
  header.kind = ok ? static_cast<int32_t>(KindOf(op)) : kPoisonedKind;
  header.num_rows = ok ? num_rows : 0;
  header.row_bytes = HeaderOf(InMessage(view, current.slot, view.rank)).row_bytes;
  return header;
}

// The header of the message from the rail peer on the i-th other node to a place of this node.
__device__ inline MessageHeader SpreadHeader(const RankView& view, Op op, int32_t i,
                                             int32_t place) {
  const int32_t node_size = view.messages.num_lanes - (view.config.num_nodes - 1);
  return ForwardHeader(view, op, view.state->routed_rows[i * node_size + place]);
}

}  // namespace jax_sm_free::cuda

#endif  // JAX_SM_FREE_CC_CUDA_KERNELS_FORWARD_CUH_
