// Rows handed out to the warps of a grid so that all end together.

#ifndef JAX_SM_FREE_CC_CUDA_KERNELS_CLAIMS_CUH_
#define JAX_SM_FREE_CC_CUDA_KERNELS_CLAIMS_CUH_

#include <cstdint>

#include "cc/cuda/device_state.h"
#include "cc/cuda/kernels/warp.cuh"

namespace jax_sm_free::cuda {

// A segment of a row that a warp has to itself.
struct Claim {
  int32_t row;
  int32_t segment;
};

// Segments of all rows in order. Of the first three quarters each warp has its fixed share; the
// rest goes to whichever warp is through, for some have more to do than others. A counter for each
// group of warps: one for all would be asked too often. For one kernel of an op.
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

  // This warp's next one; of no row where there is none. By all lanes.
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
  uint32_t index_;  // of the next one, in the first lane; on its way
  uint32_t fixed_end_;
  uint32_t group_;
};

// Before the kernel. By a block.
__device__ inline void ResetClaims(DeviceState* state) {
  for (int group = threadIdx.x; group < kClaimGroups; group += blockDim.x) {
    state->claimed[group].claimed = 0;
  }
}

}  // namespace jax_sm_free::cuda

#endif  // JAX_SM_FREE_CC_CUDA_KERNELS_CLAIMS_CUH_
