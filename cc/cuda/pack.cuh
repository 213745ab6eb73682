// Messages of token rows, part by part.

#ifndef JAX_SM_FREE_CC_CUDA_PACK_CUH_
#define JAX_SM_FREE_CC_CUDA_PACK_CUH_

#include <cstddef>
#include <cstdint>

#include "cc/cuda/device.cuh"
#include "cc/cuda/launch.h"
#include "cc/cuda/post.cuh"

namespace jax_sm_free::cuda {

// Where the rows of the messages being packed lie; null for a message without.
struct OutRows {
  std::byte* rows;
  int64_t row_stride;
};

// The row of a token in the message to a rank: a lane for each rank; null where it does not go.
__device__ inline std::byte* PackTarget(const RankView& view, const OutRows* outs, int64_t token) {
  const int dst = threadIdx.x % kWarpSize;
  const int32_t ep_size = view.config.ep_size;
  const int32_t row = dst < ep_size ? view.row_of[token * ep_size + dst] : -1;
  if (row < 0 || outs[dst].rows == nullptr) return nullptr;
  return outs[dst].rows + row * outs[dst].row_stride;
}

// Calls pack(outs, first, end) for the tokens of one part after the other, in all threads of the
// grid, and posts each when all warps have packed it, while some go on with the next. With
// `leaves_own`, our own rows have no place. Behind the route.
template <typename Pack>
__device__ void PackParts(const RankView& view, int64_t num_tokens, bool leaves_own,
                          const Pack& pack) {
  __shared__ OutRows outs[kMaxRanks];
  AwaitPrevious();
  const Current current = view.state->current;
  if (current.failed == kNothing) return;
  const bool ok = current.failed == kOk;
  const Steps steps(view.state);
  for (int32_t dst = threadIdx.x; ok && dst < view.config.ep_size; dst += blockDim.x) {
    std::byte* message = OutMessage(view, current.slot, dst);
    const MessageLayout layout = LayoutOf(view.config, HeaderOf(message));
    const bool packs = dst != view.rank || !leaves_own;
    outs[dst] = {packs ? message + layout.rows : nullptr, layout.row_stride};
  }
  __syncthreads();
  const int64_t row_bytes = HeaderOf(OutMessage(view, current.slot, view.rank)).row_bytes;
  const int64_t first_part = FirstPartTokens(view.config, num_tokens, row_bytes);
  int64_t first = 0;
  for (int part = first_part == 0 ? kLastPart : 0; part < kNumParts; ++part) {
    const int64_t end = part == kLastPart ? num_tokens : first_part;
    if (ok) pack(outs, first, end);
    if (steps.IsLastWarp(part)) {
      for (int32_t i = 1; i <= view.config.ep_size; ++i) {  // ranks start at different peers
        PostPart(view, (view.rank + i) % view.config.ep_size, part);
      }
    }
    first = end;
  }
}

}  // namespace jax_sm_free::cuda

#endif  // JAX_SM_FREE_CC_CUDA_PACK_CUH_
