// The rows of a dispatch from their messages into groups of experts. Each token row is read once,
// however many expert rows it becomes.

#include <cuda_runtime.h>

#include "cc/cuda/kernels/device.cuh"
#include "cc/cuda/kernels/kernels.h"
#include "cc/cuda/kernels/launch.h"
#include "cc/cuda/kernels/unpack.cuh"
#include "cc/cuda/kernels/unpack_experts.cuh"

namespace jax_sm_free::cuda {
namespace {

// The number of blocks that the registers leave room for.
constexpr int kMinBlocks = 4;

// Writes a whole token row whose parts are not whole words.
__device__ void SpreadParts(const RowBytes& from, const MutableRows& out, int32_t expert_row) {
  for (unsigned left = __ballot_sync(kFullWarp, expert_row >= 0); left != 0; left &= left - 1) {
    SplitRow(from, out, __shfl_sync(kFullWarp, expert_row, __ffs(static_cast<int>(left)) - 1));
  }
}

__global__ void __launch_bounds__(kRowThreads, kMinBlocks)
    UnpackExpertsKernel(const RankView view, const UnpackExpertsArgs out, const Turn turn,
                        const Turn next) {
  const bool wide = out.rows.scales_bytes == 0 && out.rows.values_bytes % 16 == 0;
  const Segments segments(wide ? out.rows.values_bytes : 1, kCopyWords);
  TakeTurn(view, out, turn, next, [&](const TurnRows& rows) {
    Claims claims(view.state, segments, rows.size(), WarpsOfGrid());
    for (Claim at = claims.Next(); at.row < rows.size(); at = claims.Next()) {
      const TokenRow from = rows.at(at.row);
      const int32_t segment = at.segment;
      const RowBytes bytes = from.bytes();
      const int32_t expert_row = ExpertRow(view, from, out, segment == 0);
      if (wide) {
        WarpCopyToAll(ExpertOutRow(out, expert_row), bytes.values, segments.begin(segment),
                      segments.end(segment));
      } else {
        SpreadParts(bytes, out.rows, expert_row);
      }
    }
  });
}

}  // namespace

void LaunchUnpackExperts(const RankView& view, const UnpackExpertsArgs& out, cudaStream_t stream) {
  if (!out.format.is_plain()) return LaunchUnpackExpertsDequantized(view, out, stream);
  static const int blocks = FullGrid(UnpackExpertsKernel);
  LaunchPlan(view, out, stream);
  ForEachTurn(view.config, out.all_here, [&](const Turn& turn, const Turn& next) {
    EnqueueBehind(UnpackExpertsKernel, {blocks, kRowThreads}, stream, view, out, turn, next);
  });
}

cudaError_t LoadUnpackExperts() { return Load(UnpackExpertsKernel); }

}  // namespace jax_sm_free::cuda
