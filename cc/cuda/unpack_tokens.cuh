// The rows of a dispatch token by token, in the order of sources.

#ifndef JAX_SM_FREE_CC_CUDA_UNPACK_TOKENS_CUH_
#define JAX_SM_FREE_CC_CUDA_UNPACK_TOKENS_CUH_

#include <cstddef>
#include <cstdint>

#include "cc/cuda/device.cuh"
#include "cc/cuda/kernels.h"
#include "cc/cuda/launch.h"
#include "cc/cuda/unpack.cuh"

namespace jax_sm_free::cuda {

__device__ inline TokenRow FindRow(const RankView& view, const ConstRows& own_rows, int64_t i) {
  const DeviceState* state = view.state;
  int32_t source = 0;
  while (i >= state->first_row[source + 1]) ++source;
  TokenRow found = FirstRow(view, own_rows, source);
  found.row = static_cast<int32_t>(i - state->first_row[source]);
  return found;
}

// What lies beside a token row.
__device__ inline void UnpackRouting(const RankView& view, const TokensOut& out,
                                     const TokenRow& from, int64_t i) {
  const int32_t top_k = view.config.top_k;
  const int k = threadIdx.x % kWarpSize;
  const int64_t entry = int64_t{from.row} * top_k + k;
  if (k < top_k) {
    out.topk_idx[i * top_k + k] = PartOf<int32_t>(from.message, from.layout.local_expert)[entry];
    out.topk_weights[i * top_k + k] = PartOf<float>(from.message, from.layout.weight)[entry];
  }
  if (k == 0) out.layout_rows[i] = static_cast<int32_t>(i);
}

__device__ inline void CountTokens(const RankView& view, const TokensOut& out) {
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
    out.num_rows_from[source] = current.failed == kOk ? view.state->num_rows[source] : 0;
  }
  if (threadIdx.x == 0) {
    *out.num_tokens = current.failed == kOk ? view.state->first_row[config.ep_size] : 0;
  }
}

// All rows: write(from, i) in all lanes of a warp, for row i of the result. The rest is zero; all
// of it is NaN after a fault. The last block acknowledges.
template <typename Write>
__device__ void UnpackTokens(const RankView& view, const TokensOut& out, const Write& write) {
  AwaitPrevious();
  const Warps warps = WarpsOfGrid();
  const Current current = view.state->current;
  const bool ok = current.failed == kOk;
  const int32_t top_k = view.config.top_k;
  const int k = threadIdx.x % kWarpSize;
  const int64_t num_rows = ok ? view.state->first_row[view.config.ep_size] : 0;
  for (int64_t i = warps.index; i < view.config.max_recv_tokens(); i += warps.count) {
    if (i < num_rows) {
      const TokenRow from = FindRow(view, out.own_rows, i);
      UnpackRouting(view, out, from, i);
      write(from, i);
      continue;
    }
    FillRow(out.rows, i, ok ? 0 : kPoison);
    if (k < top_k) {
      out.topk_idx[i * top_k + k] = -1;
      out.topk_weights[i * top_k + k] = ok ? 0.0F : __int_as_float(-1);
    }
    if (k == 0) out.layout_rows[i] = -1;
  }
  if (blockIdx.x == 0) CountTokens(view, out);
  if (current.failed != kNothing && IsLastBlock(view.state)) Acknowledge(view);
}

}  // namespace jax_sm_free::cuda

#endif  // JAX_SM_FREE_CC_CUDA_UNPACK_TOKENS_CUH_
