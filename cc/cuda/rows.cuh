// Sums of rows by a warp: both sides of a combine.

#ifndef JAX_SM_FREE_CC_CUDA_ROWS_CUH_
#define JAX_SM_FREE_CC_CUDA_ROWS_CUH_

#include <cstddef>
#include <cstdint>

#include "cc/cuda/device.cuh"
#include "cc/cuda/elements.cuh"

namespace jax_sm_free::cuda {

// The terms of a sum, one in each lane whose bit is set in `present`, added in lane order.
struct Terms {
  unsigned present = 0;
  const std::byte* row = nullptr;  // this lane's
  float weight = 1;                // this lane's
};

// out = sum over the terms of weight * row, from zero, in float32, cast once. kWeighted false: a
// plain sum. All lanes of the warp call it.
template <typename T, int kWidth, bool kWeighted>
__device__ void WarpSum(const Terms& terms, int64_t hidden, std::byte* out) {
  using V = Vector<T, kWidth>;
  constexpr int kUnroll = kWidth == 1 ? 1 : 4;  // loads of a lane in flight
  const int lane = threadIdx.x % kWarpSize;
  const int64_t num_vectors = hidden / kWidth;
  for (int64_t first = 0; first < num_vectors; first += kUnroll * kWarpSize) {
    float total[kUnroll][kWidth] = {};
    for (unsigned left = terms.present; left != 0; left &= left - 1) {
      const int source = __ffs(static_cast<int>(left)) - 1;
      const auto* row = reinterpret_cast<const V*>(ShufflePointer(terms.row, source));
      const float weight = kWeighted ? __shfl_sync(kFullWarp, terms.weight, source) : 1.0F;
      V loaded[kUnroll];
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
        const int64_t i = first + u * kWarpSize + lane;
        if (i < num_vectors) loaded[u] = row[i];
      }
#pragma unroll
      for (int u = 0; u < kUnroll; ++u) {
#pragma unroll
        for (int c = 0; c < kWidth; ++c) {
          const float value = ToFloat(loaded[u].elements[c]);
          total[u][c] = __fadd_rn(total[u][c], kWeighted ? __fmul_rn(weight, value) : value);
        }
      }
    }
#pragma unroll
    for (int u = 0; u < kUnroll; ++u) {
      const int64_t i = first + u * kWarpSize + lane;
      if (i >= num_vectors) continue;
      V sum;
#pragma unroll
      for (int c = 0; c < kWidth; ++c) sum.elements[c] = FromFloat<T>(total[u][c]);
      reinterpret_cast<V*>(out)[i] = sum;
    }
  }
}

}  // namespace jax_sm_free::cuda

#endif  // JAX_SM_FREE_CC_CUDA_ROWS_CUH_
