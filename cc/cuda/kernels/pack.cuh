// Packs messages of token rows, part by part.

#ifndef JAX_SM_FREE_CC_CUDA_KERNELS_PACK_CUH_
#define JAX_SM_FREE_CC_CUDA_KERNELS_PACK_CUH_

#include <cstddef>
#include <cstdint>

#include "cc/cuda/kernels/claims.cuh"
#include "cc/cuda/kernels/device.cuh"
#include "cc/cuda/kernels/kernels.h"
#include "cc/cuda/kernels/launch.h"
#include "cc/cuda/kernels/post.cuh"

namespace jax_sm_free::cuda {

// Where the rows of a message are packed; null for a message that is not packed.
struct OutRows {
  std::byte* rows;
  int64_t row_stride;
  Placing placing;
};

// The row of a token in the message of a lane. Null if the row is not packed.
__device__ inline std::byte* PackOutRow(const RankView& view, const OutRows* outs, int64_t token) {
  const int lane = threadIdx.x % kWarpSize;
  const int32_t num_lanes = view.messages.num_lanes;
  const int32_t number = lane < num_lanes ? view.row_of[token * num_lanes + lane] : -1;
  if (number < 0 || outs[lane].rows == nullptr) return nullptr;
  const OutRows& out = outs[lane];
  int32_t place = number;
  if (out.placing.num_common > 0) {
    const CommonBefore common = CommonBefore::Of(view.common_before[token]);
    // A common row is packed once.
    if (common.is_one && EndOf(view, lane).stage != 0) return nullptr;
    place = PlaceOf(out.placing, number, common);
  }
  return out.rows + place * out.row_stride;
}

// Posts one part after the other. A warp of the watch calls this.
__device__ inline void PostAllParts(const RankView& view, const Steps& steps, int first_part) {
  const int lane = threadIdx.x % kWarpSize;
  const int32_t message = lane < view.messages.num_lanes ? view.messages.rows_sent[lane] : -1;
  for (int part = first_part; part < kNumParts; ++part) {
    steps.Await(part);
    PostParts(view, message, part);
  }
}

// Calls pack(out_row, claim) for all segments of all tokens' rows. All lanes of a warp call it, and
// `out_row` is the result of PackOutRow. It packs one part after the other: a part is posted when
// all blocks have packed it, while other blocks continue with the next part. If `leaves_own` is
// set, the rows for this rank are not packed. Runs behind the route.
template <typename Pack>
__device__ void PackParts(const RankView& view, const Segments& segments, int64_t num_tokens,
                          bool leaves_own, const Pack& pack) {
  __shared__ OutRows outs[kMaxRanks];
  AwaitPrevious();
  const Current current = view.state->current;
  if (current.failed == kNothing) return;
  const bool ok = current.failed == kOk;
  const Steps steps(view.state);
  const int64_t row_bytes = HeaderOf(OutMessage(view, current.slot, view.rank)).row_bytes;
  const int64_t first_part = FirstPartTokens(view.tile_tokens, num_tokens, row_bytes);
  if (IsWatch()) {
    if (threadIdx.x < kWarpSize) PostAllParts(view, steps, first_part == 0 ? kLastPart : 0);
    return;
  }
  const int32_t num_lanes = view.messages.num_lanes;
  for (int32_t lane = threadIdx.x; ok && lane < num_lanes; lane += blockDim.x) {
    const int32_t number = view.messages.of_lane[lane];
    std::byte* message = OutMessage(view, current.slot, number);
    const MessageHeader& header = HeaderOf(message);
    const MessageLayout layout = LayoutOf(view.config, header);
    const bool packs = number != view.rank || !leaves_own;
    outs[lane] = {packs ? message + layout.rows : nullptr, layout.row_stride, PlacingOf(header)};
  }
  __syncthreads();
  Claims claims(view.state, segments, ok ? num_tokens : 0, Workers());
  Claim at = claims.Next();
  for (int part = first_part == 0 ? kLastPart : 0; part < kNumParts; ++part) {
    const int64_t end = part == kLastPart ? num_tokens : first_part;
    for (; ok && at.row < end; at = claims.Next()) pack(PackOutRow(view, outs, at.row), at);
    steps.End(part);
  }
}

// LaunchPack for rows that the wire quantises: pack_quantized.cu.
void LaunchPackQuantized(const RankView& view, const PackArgs& args, cudaStream_t stream);

}  // namespace jax_sm_free::cuda

#endif  // JAX_SM_FREE_CC_CUDA_KERNELS_PACK_CUH_
