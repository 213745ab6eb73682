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

// How the rows of a dispatch are copied.
enum class Copied {
  kValues,  // whole words of values
  kScaled,  // whole words of values, and of scales
  kParts    // parts of any size
};

Copied HowCopied(const MutableRows& rows) {
  if (rows.values_bytes % 16 != 0 || rows.scales_bytes % 16 != 0) return Copied::kParts;
  return rows.scales_bytes == 0 ? Copied::kValues : Copied::kScaled;
}

template <Copied kCopied>
__global__ void __launch_bounds__(kRowThreads, kMinBlocks)
    UnpackExpertsKernel(const RankView view, const UnpackExpertsArgs out, const Turn turn,
                        const Turn next) {
  const Segments segments(kCopied == Copied::kParts ? 1 : out.rows.values_bytes, kCopyWords);
  TakeTurn(view, out, turn, next, [&](const TurnRows& rows) {
    Claims claims(view.state, segments, rows.size(), WarpsOfGrid());
    for (Claim at = claims.Next(); at.row < rows.size(); at = claims.Next()) {
      const TokenRow from = rows.at(at.row);
      const int32_t segment = at.segment;
      const RowBytes bytes = from.bytes();
      const int32_t expert_row = ExpertRow(view, from, out, segment == 0);
      if constexpr (kCopied == Copied::kParts) {
        SpreadParts(bytes, out.rows, expert_row);
        continue;
      }
      WarpCopyToAll(ExpertOutRow(out, expert_row), bytes.values, segments.begin(segment),
                    segments.end(segment));
      if constexpr (kCopied == Copied::kScaled) {
        if (segment != 0) continue;
        const int64_t scales_bytes = out.rows.scales_bytes;
        std::byte* scales = expert_row < 0 ? nullptr : out.rows.scales + expert_row * scales_bytes;
        WarpCopyToAll(scales, bytes.scales, 0, static_cast<int32_t>(scales_bytes / 16));
      }
    }
  });
}

template <Copied kCopied>
void Launch(const RankView& view, const UnpackExpertsArgs& out, cudaStream_t stream) {
  static const int blocks = FullGrid(UnpackExpertsKernel<kCopied>);
  LaunchPlan(view, out, stream);
  ForEachTurn(view.config, out.all_here, [&](const Turn& turn, const Turn& next) {
    EnqueueBehind(UnpackExpertsKernel<kCopied>, {blocks, kRowThreads}, stream, view, out, turn,
                  next);
  });
}

}  // namespace

void LaunchUnpackExperts(const RankView& view, const UnpackExpertsArgs& out, cudaStream_t stream) {
  if (!out.format.is_plain()) return LaunchUnpackExpertsDequantized(view, out, stream);
  switch (HowCopied(out.rows)) {
    case Copied::kValues:
      return Launch<Copied::kValues>(view, out, stream);
    case Copied::kScaled:
      return Launch<Copied::kScaled>(view, out, stream);
    case Copied::kParts:
      return Launch<Copied::kParts>(view, out, stream);
  }
}

cudaError_t LoadUnpackExperts() {
  for (const auto kernel :
       {UnpackExpertsKernel<Copied::kValues>, UnpackExpertsKernel<Copied::kScaled>,
        UnpackExpertsKernel<Copied::kParts>}) {
    if (const cudaError_t error = Load(kernel); error != cudaSuccess) return error;
  }
  return cudaSuccess;
}

}  // namespace jax_sm_free::cuda
