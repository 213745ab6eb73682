// Token rows into messages. Each row of x is read once, however many ranks it goes to. A dispatch
// does not copy rows for its own rank, because its recv reads them from x.

#include <cuda_runtime.h>

#include "cc/cuda/kernels/device.cuh"
#include "cc/cuda/kernels/kernels.h"
#include "cc/cuda/kernels/launch.h"
#include "cc/cuda/kernels/pack.cuh"

namespace jax_sm_free::cuda {
namespace {

// The number of blocks that the registers leave room for.
constexpr int kMinBlocks = 2;

// Only rows without scales have more than one segment.
__host__ __device__ Segments SegmentsOf(const PackArgs& args) {
  return {args.rows.scales_bytes == 0 ? args.rows.values_bytes : 1, kCopyWords};
}

// Writes one segment of a token's row to all ranks that get the token.
__device__ void PackSegment(const ConstRows& rows, std::byte* out_row, const Segments& segments,
                            int64_t token, int32_t segment) {
  const std::byte* values = rows.values + token * rows.values_bytes;
  if (rows.scales_bytes == 0 && rows.values_bytes % 16 == 0) {
    WarpCopyToAll(out_row, values, segments.begin(segment), segments.end(segment));
    return;
  }
  const std::byte* scales = rows.scales + token * rows.scales_bytes;
  if (rows.values_bytes % 16 == 0 && rows.scales_bytes % 16 == 0) {
    std::byte* out_scales = out_row == nullptr ? nullptr : out_row + rows.values_bytes;
    WarpCopyToAll(out_row, values, 0, static_cast<int32_t>(rows.values_bytes / 16));
    WarpCopyToAll(out_scales, scales, 0, static_cast<int32_t>(rows.scales_bytes / 16));
    return;
  }
  for (unsigned left = __ballot_sync(kFullWarp, out_row != nullptr); left != 0; left &= left - 1) {
    std::byte* out = ShufflePointer(out_row, __ffs(static_cast<int>(left)) - 1);
    WarpCopy(out, values, rows.values_bytes);
    WarpCopy(out + rows.values_bytes, scales, rows.scales_bytes);
  }
}

__global__ void __launch_bounds__(kRowThreads, kMinBlocks)
    PackKernel(const RankView view, const PackArgs args) {
  const Segments segments = SegmentsOf(args);
  PackParts(view, segments, args.num_tokens, args.leaves_own,
            [&](std::byte* out_row, const Claim& at) {
              PackSegment(args.rows, out_row, segments, at.row, at.segment);
            });
}

}  // namespace

void LaunchPack(const RankView& view, const PackArgs& args, cudaStream_t stream) {
  if (!args.format.is_plain()) return LaunchPackQuantized(view, args, stream);
  static const int most = FullGrid(PackKernel);
  const int64_t warps = args.num_tokens * SegmentsOf(args).per_row;
  EnqueueBehind(PackKernel, {BlocksAndWatch(warps, most), kRowThreads}, stream, view, args);
}

cudaError_t LoadPack() { return Load(PackKernel); }

}  // namespace jax_sm_free::cuda
