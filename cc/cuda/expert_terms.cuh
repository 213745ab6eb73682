// The expert rows that a token row is the sum of.

#ifndef JAX_SM_FREE_CC_CUDA_EXPERT_TERMS_CUH_
#define JAX_SM_FREE_CC_CUDA_EXPERT_TERMS_CUH_

#include <cstdint>

#include "cc/cuda/device.cuh"
#include "cc/cuda/kernels.h"
#include "cc/cuda/sums.cuh"

namespace jax_sm_free::cuda {

// By a warp; this lane's term is the k-th expert row of token row i.
__device__ inline Terms ExpertTerms(const RankView& view, Op op, const ExpertRows& rows,
                                    int64_t row_bytes, int64_t i) {
  const int k = threadIdx.x % kWarpSize;
  const LayoutIn& layout = rows.layout;
  int32_t row = k < layout.fanout ? layout.rows[i * layout.fanout + k] : -1;
  const bool bad = row < -1 || row >= layout.num_rows;
  if (bad) {
    Raise(view, op, {FaultCode::kLayout, -1, layout.num_rows, row});
    row = -1;
  }
  Terms terms;
  terms.poisoned = __any_sync(kFullWarp, bad) != 0;
  terms.present = __ballot_sync(kFullWarp, row >= 0);
  if (row < 0) return terms;
  terms.row = rows.y + row * row_bytes;
  if (rows.weights != nullptr) terms.weight = rows.weights[row];
  return terms;
}

}  // namespace jax_sm_free::cuda

#endif  // JAX_SM_FREE_CC_CUDA_EXPERT_TERMS_CUH_
