// The expert rows whose sum is a token row.

#ifndef JAX_SM_FREE_CC_CUDA_KERNELS_EXPERT_TERMS_CUH_
#define JAX_SM_FREE_CC_CUDA_KERNELS_EXPERT_TERMS_CUH_

#include <cstdint>

#include "cc/cuda/kernels/device.cuh"
#include "cc/cuda/kernels/kernels.h"
#include "cc/cuda/kernels/sums.cuh"

namespace jax_sm_free::cuda {

// The terms of row i of `rows.layout`. The term of lane k is the k-th expert row.
class ExpertTerms {
 public:
  __device__ ExpertTerms(const RankView& view, Op op, const ExpertRows& rows, int64_t row_bytes)
      : view_(view), op_(op), rows_(rows), row_bytes_(row_bytes) {}

  __device__ Terms operator()(int64_t i) const {
    const int k = threadIdx.x % kWarpSize;
    const LayoutIn& layout = rows_.layout;
    int32_t row = k < layout.fanout ? layout.rows[i * layout.fanout + k] : -1;
    const bool bad = row < -1 || row >= layout.num_rows;
    if (bad) {
      Raise(view_, op_, {FaultCode::kLayout, -1, layout.num_rows, row});
      row = -1;
    }
    Terms terms;
    terms.poisoned = __any_sync(kFullWarp, bad) != 0;
    terms.present = __ballot_sync(kFullWarp, row >= 0);
    if (row < 0) return terms;
    terms.row = rows_.y + row * row_bytes_;
    if (rows_.weights != nullptr) terms.weight = rows_.weights[row];
    return terms;
  }

 private:
  const RankView& view_;
  Op op_;
  const ExpertRows& rows_;
  int64_t row_bytes_;
};

}  // namespace jax_sm_free::cuda

#endif  // JAX_SM_FREE_CC_CUDA_KERNELS_EXPERT_TERMS_CUH_
