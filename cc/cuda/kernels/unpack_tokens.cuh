// The rows of a dispatch, token by token, in the order of sources.

#ifndef JAX_SM_FREE_CC_CUDA_KERNELS_UNPACK_TOKENS_CUH_
#define JAX_SM_FREE_CC_CUDA_KERNELS_UNPACK_TOKENS_CUH_

#include <cstddef>
#include <cstdint>

#include "cc/cuda/kernels/device.cuh"
#include "cc/cuda/kernels/kernels.h"
#include "cc/cuda/kernels/launch.h"
#include "cc/cuda/kernels/unpack.cuh"

namespace jax_sm_free::cuda {

// The rank that row i of all rows came from.
__device__ inline int32_t RankOfRow(const RankView& view, int64_t i) {
  int32_t rank = 0;
  while (i >= view.state->first_row[rank + 1]) ++rank;
  return rank;
}

// Writes what belongs to a token row: its experts, its weights, and its layout row.
__device__ inline void UnpackRouting(const RankView& view, const UnpackTokensArgs& out,
                                     const TokenRow& from, int64_t i) {
  const int32_t top_k = view.config.top_k;
  const int k = threadIdx.x % kWarpSize;
  const int64_t entry = int64_t{from.place} * top_k + k;
  if (k < top_k) {
    out.topk_idx[i * top_k + k] = from.source.local_expert[entry];
    out.topk_weights[i * top_k + k] = from.source.weight[entry];
  }
  if (k == 0) out.layout.rows[i] = static_cast<int32_t>(i);
}

__device__ inline void CountTokens(const RankView& view, const UnpackTokensArgs& out) {
  const Config& config = view.config;
  const Current current = view.state->current;
  for (int32_t e = threadIdx.x; e < config.num_local_experts(); e += blockDim.x) {
    int32_t count = 0;
    for (int32_t source = 0; source < config.ep_size && current.failed == kOk; ++source) {
      count += RowsPerExpert(Notice(view, view.rank, current.slot, source))[e];
    }
    out.counts[e] = count;
  }
  for (int32_t source = threadIdx.x; source < config.ep_size; source += blockDim.x) {
    out.layout.num_rows_from[source] = current.failed == kOk ? view.state->num_rows[source] : 0;
  }
  if (threadIdx.x == 0) {
    *out.num_tokens = current.failed == kOk ? view.state->first_row[config.ep_size] : 0;
  }
}

// Writes all rows. For row i of the result, all lanes of a warp call write(from, i). Rows without a
// token are zero. After a fault, all rows are NaN. The last block acknowledges.
template <typename Write>
__device__ void UnpackTokens(const RankView& view, const UnpackTokensArgs& out,
                             const Write& write) {
  AwaitPrevious();
  const Warps warps = WarpsOfGrid();
  const Current current = view.state->current;
  const bool ok = current.failed == kOk;
  const int32_t top_k = view.config.top_k;
  const int k = threadIdx.x % kWarpSize;
  const int64_t num_rows = ok ? view.state->first_row[view.config.ep_size] : 0;
  for (int64_t i = warps.index; i < view.config.max_recv_tokens(); i += warps.count) {
    if (i < num_rows) {
      const int32_t rank = RankOfRow(view, i);
      const Source source = SourceOf(view, out.own_rows, out.rows.values_bytes, rank);
      const int32_t first_row = view.state->first_row[rank];
      const TokenRow from{source, static_cast<int32_t>(i - first_row)};
      const int64_t row = first_row + from.number();
      UnpackRouting(view, out, from, row);
      write(from, row);
      continue;
    }
    FillRow(out.rows, i, ok ? 0 : kPoison);
    if (k < top_k) {
      out.topk_idx[i * top_k + k] = -1;
      out.topk_weights[i * top_k + k] = ok ? 0.0F : __int_as_float(-1);
    }
    if (k == 0) out.layout.rows[i] = -1;
  }
  if (blockIdx.x == 0) CountTokens(view, out);
  if (current.failed != kNothing && IsLastBlock(view.state)) Acknowledge(view);
}

// LaunchUnpackTokens for rows that the wire quantised: unpack_dequantized.cu.
void LaunchUnpackTokensDequantized(const RankView& view, const UnpackTokensArgs& out,
                                   cudaStream_t stream);

}  // namespace jax_sm_free::cuda

#endif  // JAX_SM_FREE_CC_CUDA_KERNELS_UNPACK_TOKENS_CUH_
