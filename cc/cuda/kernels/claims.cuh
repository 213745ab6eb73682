// Distributes rows to the warps of a grid, so that all warps end at about the same time.

#ifndef JAX_SM_FREE_CC_CUDA_KERNELS_CLAIMS_CUH_
#define JAX_SM_FREE_CC_CUDA_KERNELS_CLAIMS_CUH_

#include <cstdint>

#include "cc/cuda/device_state.h"
#include "cc/cuda/kernels/warp.cuh"

namespace jax_sm_free::cuda {

// A segment of a row. One warp works on it.
struct Claim {
  int32_t row;
  int32_t segment;
};

// The segments of all rows, in order. The first three quarters are divided evenly among the warps.
// Warps that are done with their share take segments from the rest, because some segments are more
// work than others. Each group of warps has its own counter, because a single counter would be used
// too often. The claims of an op are for one of its kernels.
class Claims {
 public:
  __device__ Claims(DeviceState* state, const Segments& segments, int64_t num_rows,
                    const Warps& warps)
      : per_row_(static_cast<uint32_t>(segments.per_row)),
        num_warps_(static_cast<uint32_t>(warps.count)),
        index_(static_cast<uint32_t>(warps.index)) {
    const auto num_segments = static_cast<uint32_t>(num_rows > 0 ? num_rows * segments.per_row : 0);
    fixed_end_ = num_segments / 4 * 3 / num_warps_ * num_warps_;
    if (fixed_end_ == 0) fixed_end_ = num_warps_;
    const uint32_t num_groups = num_warps_ < kClaimGroups ? num_warps_ : kClaimGroups;
    group_ = index_ % num_groups;
    counter_ = &state->claimed[group_].claimed;
  }

  // The next segment of this warp; a row behind the last one if there is none. All lanes call this.
  __device__ Claim Next() {
    const uint32_t index = __shfl_sync(kFullWarp, index_, 0);
    index_ = index + num_warps_;
    if (index_ >= fixed_end_ && threadIdx.x % kWarpSize == 0) {
      const uint32_t num_groups = num_warps_ < kClaimGroups ? num_warps_ : kClaimGroups;
      index_ = fixed_end_ + atomicAdd(counter_, 1U) * num_groups + group_;
    }
    return {static_cast<int32_t>(index / per_row_), static_cast<int32_t>(index % per_row_)};
  }

 private:
  uint32_t* counter_;
  uint32_t per_row_;
  uint32_t num_warps_;
  uint32_t index_;  // of the next segment, in the first lane; its load may be in flight
  uint32_t fixed_end_;
  uint32_t group_;
};

// Call this before the kernel that makes claims. A block calls it.
__device__ inline void ResetClaims(DeviceState* state) {
  for (int group = threadIdx.x; group < kClaimGroups; group += blockDim.x) {
    state->claimed[group].claimed = 0;
  }
}

}  // namespace jax_sm_free::cuda

#endif  // JAX_SM_FREE_CC_CUDA_KERNELS_CLAIMS_CUH_
