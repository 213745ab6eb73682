// The rows of a dispatch from their messages, token by token.

#include <cuda_runtime.h>

#include "cc/cuda/kernels/device.cuh"
#include "cc/cuda/kernels/kernels.h"
#include "cc/cuda/kernels/launch.h"
#include "cc/cuda/kernels/unpack.cuh"
#include "cc/cuda/kernels/unpack_tokens.cuh"

namespace jax_sm_free::cuda {
namespace {

__global__ void __launch_bounds__(kRowThreads)
    UnpackTokensKernel(const RankView view, const UnpackTokensArgs out) {
  UnpackTokens(view, out,
               [&](const TokenRow& from, int64_t i) { SplitRow(from.bytes(), out.rows, i); });
}

}  // namespace

void LaunchUnpackTokens(const RankView& view, const UnpackTokensArgs& out, cudaStream_t stream) {
  if (!out.format.is_plain()) return LaunchUnpackTokensDequantized(view, out, stream);
  static const int blocks = FullGrid(UnpackTokensKernel);
  EnqueueBehind(UnpackTokensKernel, {blocks, kRowThreads}, stream, view, out);
}

cudaError_t LoadUnpackTokens() { return Load(UnpackTokensKernel); }

}  // namespace jax_sm_free::cuda
